"""`lora_course.linears`: a 4-bit base under an adapter."""

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
