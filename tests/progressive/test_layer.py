"""`progressive.layer`: the sum of stages at one scale, frozen, merged and given back."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lora_course.injection import adapter_layers, disabled, inject, merge, unload, unmerge
from lora_course.progressive import (
    StackedLoRALinear,
    Stage,
    begin_stage,
    inject_stages,
)
from lora_course.qlora import quantize_model
from lora_course.states import adapter_state, factor_state, use_adapter
from tests.models import batch, config, linear4bit, qwen, relative
from tests.progressive.models import STAGES, fill, logits, same, stacked, weights
from tests.tolerances import EXACT, ROUNDED

pytestmark = pytest.mark.usefixtures("one_thread")


def layer_of_three_stages() -> tuple[StackedLoRALinear, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    layer = StackedLoRALinear(nn.Linear(7, 5), r=2, lora_alpha=3, lora_dropout=0.5)
    pairs = []
    for r in (2, 0, 4):
        if pairs:
            layer.freeze()
            layer.start(r)
        layer.A.data.normal_(), layer.B.data.normal_()
        pairs.append((layer.A.detach().clone(), layer.B.detach().clone()))
    return layer, pairs


def test_the_layer_computes_the_sum_of_its_stages_at_one_scale() -> None:
    layer, pairs = layer_of_three_stages()
    x = torch.randn(2, 3, 7)
    delta = sum(1.5 * B @ A for A, B in pairs)
    expected = layer.base_layer(x) + x @ delta.t()
    torch.testing.assert_close(layer.eval()(x), expected, **ROUNDED)
    torch.testing.assert_close(layer.delta_weight(), delta, **ROUNDED)
    A, B, scaling = layer.factors()
    assert A.shape == (6, 7) and B.shape == (5, 6) and scaling == 1.5 and layer.lora_alpha == 6
    assert all(
        torch.equal(a, b) for found, kept in zip(layer.stages(), pairs) for a, b in zip(found, kept)
    )
    layer.merge()
    torch.testing.assert_close(layer(x), expected, **ROUNDED)


def test_dropout_is_for_the_stage_that_trains_and_gradients_are_too() -> None:
    layer, pairs = layer_of_three_stages()
    x = torch.ones(1, 7)
    layer.train()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = layer.lora_dropout(x)
    frozen = sum(1.5 * x @ (B @ A).t() for A, B in pairs[:2])
    torch.testing.assert_close(
        found,
        layer.base_layer(x) + frozen + 1.5 * dropped @ (pairs[2][1] @ pairs[2][0]).t(),
        **ROUNDED,
    )
    layer.training = False  # dropout that is left on in evaluation, for several samples, is still for what trains
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), found, **EXACT)
    found.sum().backward()
    assert layer.A.grad.abs().max() > 0 and layer.B.grad.abs().max() > 0
    assert {name for name, _ in layer.named_parameters() if not name.startswith("base")} == {
        "A",
        "B",
    }
    assert not layer.frozen_A.requires_grad and layer.base_layer.weight.grad is None


def test_with_one_stage_it_is_lora() -> None:
    torch.manual_seed(0)
    plain = inject(qwen(), config())
    torch.manual_seed(0)
    ours = inject(qwen(), config(), StackedLoRALinear)
    for model in (plain, ours):
        fill(model, 4)
        model(**batch()).loss.backward()
    torch.testing.assert_close(logits(ours), logits(plain), **ROUNDED)
    for name, layer in adapter_layers(plain).items():
        assert relative(adapter_layers(ours)[name].B.grad, layer.B.grad) < 1e-5


@pytest.mark.parametrize("kind", ["autocast", "bf16", "4bit"])
def test_other_precisions_agree_with_plain_lora_of_the_same_factors(kind: str) -> None:
    base = (
        qwen().to(torch.bfloat16)
        if kind == "bf16"
        else quantize_model(qwen())
        if kind == "4bit"
        else qwen()
    )
    ours = stacked(copy.deepcopy(base))
    one = inject(base, config(r=1, target_modules=sorted(adapter_layers(ours))))
    use_adapter(one, factor_state(ours))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        mine, other = logits(ours), logits(one)
    assert mine.dtype == other.dtype
    assert all(p.dtype == torch.float32 for n, p in ours.named_parameters() if n.endswith(".A"))
    # in bf16 a layer's sum is rounded once for each of the two parts, to 8 bits
    assert relative(mine.float(), other.float()) < (1e-5 if kind == "4bit" else 3e-2)


def test_checkpointed_gradients_and_cached_generation_are_those_of_the_full_pass() -> None:
    model = stacked()
    model(**batch()).loss.backward()
    expected = {
        name: layer.B.grad.clone() for name, layer in adapter_layers(model).items() if layer.r
    }
    model.zero_grad()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch(), use_cache=False).loss.backward()
    assert all(
        relative(adapter_layers(model)[name].B.grad, grad) < 1e-5 for name, grad in expected.items()
    )
    model.eval().gradient_checkpointing_disable()
    ids = batch()["input_ids"][:1]
    written = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            use_cache=c,
            pad_token_id=0,
        )
        for c in (True, False)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("keep_original", [True, False])
def test_unmerging_gives_the_base_back_to_the_bit_only_from_a_copy(keep_original: bool) -> None:
    model = stacked(mode="merge", keep_original=keep_original)
    expected = logits(model)
    base = weights(qwen())
    unmerge(model)
    assert same(weights(model), base) == keep_original
    assert all((found - base[name]).abs().max() < 1e-6 for name, found in weights(model).items())
    torch.testing.assert_close(
        logits(model), expected, atol=5e-6, rtol=5e-6
    )  # the stages act beside the base again
    merge(model)
    unmerge(model)
    assert same(weights(unload(model)), base) == keep_original


def test_layers_refuse_what_would_make_the_sum_wrong() -> None:
    model = inject_stages(qwen(), STAGES[:1])
    with pytest.raises(ValueError, match="up_proj.*matches no layer that inject_stages"):
        begin_stage(model, Stage(2, ["up_proj"]))
    with pytest.raises(ValueError, match="injected with LoRALinear.*StackedLoRALinear"):
        begin_stage(inject(qwen(), config()), STAGES[0])
    with pytest.raises(ValueError, match="does not support use_rslora"):
        inject(qwen(), config(use_rslora=True), StackedLoRALinear)
    begin_stage(model, STAGES[0])
    merge(model)
    with pytest.raises(RuntimeError, match="Call freeze"):
        next(iter(adapter_layers(model).values())).start(2)
    with pytest.raises(RuntimeError, match="merged already"):
        merge(model)
    other = adapter_state(stacked(stages=STAGES[:1] * 2))
    begin_stage(model, STAGES[0])
    fill(model, 1)
    with pytest.raises(RuntimeError, match="are merged into the base and this one is not"):
        begin_stage(model, STAGES[0])
    with pytest.raises(RuntimeError, match="base holds earlier stages"), disabled(model):
        logits(model)
    with pytest.raises(ValueError, match="holds other stages"):
        use_adapter(model, other)
    with pytest.raises(RuntimeError, match="not merged"):
        next(iter(adapter_layers(model).values())).unmerge()
    wrong = other | {"model.layers.0.self_attn.q_proj.ranks": torch.tensor([1])}
    with pytest.raises(ValueError, match=r"frozen stages.*\[1\]"):
        use_adapter(stacked(stages=STAGES[:1] * 2), wrong)


def test_a_4bit_stack_refuses_its_merge_by_name() -> None:
    layer = StackedLoRALinear(linear4bit(), r=2, lora_alpha=4)
    with pytest.raises(TypeError, match="4-bit"):
        layer.merge()
