"""`lora_course.layers_4bit`: 4-bit layers are found under an adapter, and a weight set in them is quantised once."""

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from torch import nn

from lora_course.injection import inject
from lora_course.layers_4bit import layers_4bit, set_weight, stored_bytes
from lora_course.nf4 import dequantize_nf4, quantize_nf4, storage_bits
from lora_course.qlora import quantize_model
from tests.models import qwen


def test_layers_are_found_by_name_under_an_adapter_too() -> None:
    model = quantize_model(qwen(), skip=("down_proj",))
    plain = layers_4bit(model)
    assert plain and all(type(layer) is Linear4bit for layer in plain.values())
    assert not any("down_proj" in name for name in plain)
    inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    renamed = {n + ".base_layer" if n.endswith("q_proj") else n for n in plain}
    assert set(layers_4bit(model)) == renamed


def test_a_weight_that_is_set_is_the_formats_and_counts_its_constants() -> None:
    model = nn.ModuleDict({"layer": Linear4bit(128, 96, bias=False)})
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(3))
    set_weight(model["layer"], weight, "nf4", False)
    expected = dequantize_nf4(quantize_nf4(weight, double_quant=False))
    got = model["layer"](torch.eye(128)).T
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)  # one product by 1 a weight
    assert 8 * stored_bytes(model) == storage_bits(96 * 128, double_quant=False) * 96 * 128
