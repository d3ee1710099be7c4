"""What overflows in fp16 is found on the first batch, and named."""

import pytest
import torch

from lora_course.lab.models import base_path, load_base
from lora_course.lab.precision import check_fp16, largest_activation
from lora_course.qlora import load_4bit

BATCH = {"input_ids": torch.arange(5, 37).reshape(2, 16)}


def test_the_largest_activation_is_found_where_it_is() -> None:
    model, _ = load_base("nano")
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.weight *= 1e6
    seen = []
    layer.register_forward_hook(lambda *call: seen.append(call[-1].abs().max().item()))
    name, largest = largest_activation(model.train(), BATCH)
    assert model.training and largest >= seen[0] > 65504 and name.startswith("model.layers.1")


def test_a_model_in_fp16_that_overflows_is_refused_with_its_module(capsys) -> None:
    model, _ = load_base("nano", torch.float16)
    check_fp16(model, BATCH)
    printed = capsys.readouterr().out
    assert printed.startswith("fp16: the largest activation") and "0 of" not in printed
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(
        RuntimeError, match=r"'model.layers.1.mlp.up_proj' on the first batch.*bf16.*tiny"
    ):
        check_fp16(model, BATCH)
    check_fp16(load_base("nano")[0], BATCH)
    assert capsys.readouterr().out == ""


def test_four_bits_that_are_multiplied_in_fp16_are_measured_too(capsys) -> None:
    """Their embeddings and norms lie in fp32, so the weights' type doesn't tell."""
    nano = base_path("nano")
    options = {"gradient_checkpointing": False}
    model = load_4bit(nano, compute_dtype=torch.float16, **options)
    check_fp16(model, BATCH)
    assert capsys.readouterr().out.startswith("fp16: the largest activation")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(3e4)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp.*compute_dtype=torch\.float32"):
        check_fp16(model, BATCH)
    check_fp16(load_4bit(nano, compute_dtype=torch.float32, **options), BATCH)
    assert capsys.readouterr().out == ""
