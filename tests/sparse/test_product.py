"""`sparse.product`: the product with a sparse ΔW and its gradients, without a dense matrix."""

import copy

import pytest
import torch
from torch import nn

from lora_course.sparse import (
    Places,
    SparseDeltaLinear,
    SparseProduct,
    random_places,
)
from tests.models import Calls


def test_the_sparse_products_gradients_are_those_of_a_masked_dense_matrix() -> None:
    torch.manual_seed(0)
    x, values = torch.randn(2, 3, 6, dtype=torch.double), torch.randn(9, dtype=torch.double)
    indices = random_places(30, 9).sort().values.int()
    places = Places.from_indices(indices.long(), 5, 6)
    assert (
        len(places.rows.unique()) < 5 or len(places.columns.unique()) < 6
    )  # a row or column without entries is among them
    x.requires_grad_(), values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: SparseProduct.apply(x, v, places), (x, values))
    dense = torch.zeros(30, dtype=torch.double)
    dense[indices.long()] = values.detach()
    dense = dense.view(5, 6).requires_grad_()
    (x @ dense.T).square().sum().backward()
    of_x = x.grad.clone()
    x.grad = None
    SparseProduct.apply(x, values, places).square().sum().backward()
    torch.testing.assert_close(values.grad, dense.grad.flatten()[indices.long()])
    torch.testing.assert_close(x.grad, of_x)


def test_training_makes_no_dense_delta_w() -> None:
    layer = SparseDeltaLinear(nn.Linear(40, 30), r=1, lora_alpha=1)
    nn.init.normal_(layer.values_delta)
    x = torch.randn(2, 40, requires_grad=True)
    with Calls() as calls:
        layer(x).sum().backward()
    computed = [
        out for name, _, out in calls.made if name != "aten.t.default"
    ]  # the base's weight, seen from the other side
    sizes = [
        t.numel()
        for out in computed
        for t in (out if isinstance(out, (tuple, list)) else [out])
        if isinstance(t, torch.Tensor)
    ]
    assert x.grad is not None and len(sizes) > 20 and max(sizes) < 30 * 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_of_16_bits_is_summed_in_32(dtype: torch.dtype) -> None:
    layer = SparseDeltaLinear(nn.Linear(12, 10).to(dtype), r=2, lora_alpha=2)
    nn.init.normal_(layer.values_delta)
    x = torch.randn(3, 12).to(dtype).requires_grad_()
    with Calls() as calls:
        layer(x).float().square().sum().backward()
    assert [
        args[0].dtype for name, args, _ in calls.made if "per_sample_weights_backward" in name
    ] == [torch.float32]
    assert x.grad.dtype == dtype and layer.values_delta.grad.dtype == torch.float32
    exact = copy.deepcopy(layer).double()
    exact(x.detach().double()).square().sum().backward()
    torch.testing.assert_close(
        layer.values_delta.grad.double(), exact.values_delta.grad, atol=0.1, rtol=0.05
    )  # y has 8 bits
