"""`lora_course.linears`: a 4-bit base under an adapter."""

import math

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lora_course.lora import LoRALinear
from tests.models import linear4bit, relative


def test_4bit_base_forward_and_gradients_equal_the_dequantised_base() -> None:
    base = linear4bit()
    bytes_before = base.weight.data.clone()
    plain = nn.Linear(128, 192)
    plain.weight.data = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    plain.bias.data = base.bias.data.clone()
    layers = [LoRALinear(b, r=4, lora_alpha=12) for b in (base, plain)]
    for layer in layers:
        for factor, seed in ((layer.A, 1), (layer.B, 2)):
            factor.data.normal_(generator=torch.Generator().manual_seed(seed))
    outputs, gradients = [], []
    for layer in layers:
        x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(4), requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        outputs.append(y)
        gradients.append((x.grad, layer.A.grad, layer.B.grad))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < 1e-5
    assert torch.equal(base.weight.data, bytes_before) and base.weight.grad is None
    with pytest.raises(TypeError, match="4-bit.*dequantize_model"):
        layers[0].merge()


def test_4bit_base_is_kept_from_the_cpu_kernel_that_repacks() -> None:
    base = linear4bit()
    base.support_avx512bf16_for_cpu = True
    assert LoRALinear(base, r=2, lora_alpha=2).base_layer.support_avx512bf16_for_cpu is False
    packed = linear4bit()
    packed.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked"):
        LoRALinear(packed, r=2, lora_alpha=2)


class ScaledFP8(nn.Linear):
    """As FP8 linears are: the forward pass multiplies a low-precision weight by a scale."""

    def __init__(self) -> None:
        super().__init__(16, 12)
        self.weight = nn.Parameter(
            (self.weight.data * 50).to(torch.float8_e4m3fn), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 50, self.bias)


class Doubled(nn.Linear):
    """A weight in fp32, and a forward pass that does not compute with it as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


NOT_WHAT_RUNS = {
    "fp8": ScaledFP8,
    "own forward": lambda: Doubled(16, 12),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 12)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 12)),
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(16, 12)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(16, 12)),
}


@pytest.mark.parametrize("kind", NOT_WHAT_RUNS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_not_what_runs_is_adapted_and_not_merged(kind: str) -> None:
    torch.manual_seed(0)
    base = NOT_WHAT_RUNS[kind]().eval()
    x = torch.randn(3, 16)
    expected = base(x)
    layer = LoRALinear(base, r=2, lora_alpha=6).eval()
    torch.testing.assert_close(layer(x), expected, atol=0, rtol=0)
    nn.init.normal_(layer.B, std=0.1)
    served = layer(x)
    torch.testing.assert_close(
        served, expected + 3 * x @ layer.A.T @ layer.B.T, atol=1e-6, rtol=1e-6
    )
    with pytest.raises(TypeError, match="'the layer'"):
        layer.check_merge("the layer")
    with pytest.raises(TypeError):
        layer.merge()
    torch.testing.assert_close(layer(x), served, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, math.nan), (torch.float32, math.inf), (torch.float16, 1e5)]
)
def test_an_update_that_is_not_finite_in_the_weights_type_is_not_merged(
    dtype: torch.dtype, size: float
) -> None:
    layer = LoRALinear(nn.Linear(16, 12).to(dtype), r=2, lora_alpha=6)
    nn.init.ones_(layer.A)
    nn.init.zeros_(layer.B)
    with torch.no_grad():
        layer.B[1, 0] = size
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
