"""`sparse`: what all three layers must do."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, disabled, inject, merge, unload
from lora_course.linears import is_4bit
from lora_course.qlora import quantize_model
from lora_course.sparse import (
    GatedLoRALinear,
    SparseLoRALinear,
)
from lora_course.states import adapter_state, use_adapter
from tests.models import batch, config, qwen, relative
from tests.sparse.models import KINDS, adapted, trained_parameters
from tests.tolerances import EXACT, ROUNDED


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_and_then_learns(kind: type) -> None:
    base = qwen()
    reference = base(**batch()).logits
    model = inject(base, config(), layer=kind)
    torch.testing.assert_close(model(**batch()).logits, reference, **EXACT)
    optimizer = torch.optim.Adam(trained_parameters(model), lr=0.01)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(3):
        losses.append(model(**batch()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert all(
        not torch.equal(p, start[name]) for name, p in model.named_parameters() if p.requires_grad
    )


@pytest.mark.parametrize("kind", KINDS)
def test_layer_computes_its_equation_on_any_shape_merges_and_unmerges(kind: type) -> None:
    torch.manual_seed(0)
    base = nn.Linear(11, 7, bias=True)
    weight = base.weight.detach().clone()
    layer = kind(base, r=3, lora_alpha=12)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    if kind is GatedLoRALinear:
        delta = 4 * layer.B @ torch.diag(layer.gate) @ layer.A
    elif kind is SparseLoRALinear:
        delta = 4 * layer.matrix("B") @ layer.matrix("A")
    else:
        delta = 4 * layer.matrix("delta")
    for shape in ((11,), (4, 11), (2, 3, 11), (0, 11)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), base(x) + x @ delta.T, **ROUNDED)
    torch.testing.assert_close(layer.delta_weight(), delta, **ROUNDED)
    x = torch.randn(4, 11)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(base.weight, weight + delta, **ROUNDED)
    torch.testing.assert_close(layer(x), before, **ROUNDED)
    layer.unmerge()
    torch.testing.assert_close(base.weight, weight, **ROUNDED)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_accumulation_autocast_cache_and_dropout(kind: type) -> None:
    model = adapted(kind).train()
    model(**batch(), use_cache=False).loss.backward()
    expected = [p.grad.clone() for p in trained_parameters(model)]
    assert all(gradient.abs().max() > 0 for gradient in expected)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for i in range(2):
        (
            model(**{k: v[i : i + 1] for k, v in batch().items()}, use_cache=False).loss / 2
        ).backward()
    for parameter, gradient in zip(trained_parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    model.gradient_checkpointing_disable()
    model.eval()
    exact = model(**batch())
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**batch())
    assert relative(rounded.logits.float(), exact.logits) < 0.02  # bf16 keeps 8 bits
    rounded.loss.backward()
    found = [p.grad.flatten() for p in trained_parameters(model)]
    assert {gradient.dtype for gradient in found} == {torch.float32}
    assert (
        relative(torch.cat(found), torch.cat([gradient.flatten() for gradient in expected])) < 0.1
    )
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with sdpa_kernel(SDPBackend.MATH):
        ids = batch(1, 6)["input_ids"]
        assert torch.equal(
            model.generate(ids, use_cache=True, **kwargs),
            model.generate(ids, use_cache=False, **kwargs),
        )
    layer = kind(nn.Linear(6, 5), r=2, lora_alpha=6, lora_dropout=0.5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.ones(64, 6)
    spread = lambda y: (y - y[0]).abs().max().item()  # noqa: E731
    assert spread(layer(x)) > 0.1 and spread(layer.eval()(x)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_reloaded_switched_and_taken_out(kind: type, tmp_path: Path) -> None:
    model = adapted(kind, rank_pattern={"q_proj": 2}, use_rslora=True)
    expected = model(**batch()).logits
    torch.manual_seed(123)  # the masks of the model that loads are drawn anew, and then replaced
    again = load_adapter(qwen(), save_adapter(model, tmp_path))
    assert torch.equal(again(**batch()).logits, expected)
    state, reloaded = adapter_state(model), adapter_state(again)
    assert state.keys() == reloaded.keys() and all(
        torch.equal(state[k], reloaded[k]) and state[k].dtype == reloaded[k].dtype for k in state
    )
    other = adapted(kind, seed=5, rank_pattern={"q_proj": 2}, use_rslora=True)
    assert relative(other(**batch()).logits, expected) > 0.01
    assert torch.equal(use_adapter(other, state)(**batch()).logits, expected)
    with disabled(other):
        assert torch.equal(other(**batch()).logits, qwen()(**batch()).logits)
    assert torch.equal(unload(other)(**batch()).logits, qwen()(**batch()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_on_a_4bit_base(kind: type, tmp_path: Path) -> None:
    model = adapted(kind, base=quantize_model(qwen())).train()
    weights = [layer.base_layer.weight.data.clone() for layer in adapter_layers(model).values()]
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=0.01)
    losses = []
    for _ in range(3):
        losses.append(model(**batch()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for layer, weight in zip(adapter_layers(model).values(), weights, strict=True):
        assert is_4bit(layer.base_layer) and torch.equal(layer.base_layer.weight.data, weight)
    model.eval()
    again = load_adapter(quantize_model(qwen()), save_adapter(model, tmp_path))
    torch.testing.assert_close(again.eval()(**batch()).logits, model(**batch()).logits, **ROUNDED)
    with pytest.raises(TypeError, match="4-bit"):
        merge(model)


@pytest.mark.parametrize("kind", [GatedLoRALinear, SparseLoRALinear])
def test_peft_loads_the_exported_factors_with_equal_logits(kind: type, tmp_path: Path) -> None:
    model = adapted(kind, rank_pattern={"q_proj": 2})
    theirs = PeftModel.from_pretrained(qwen(), export_peft(model, tmp_path))
    assert theirs.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(theirs(**batch()).logits, model(**batch()).logits, **ROUNDED)
