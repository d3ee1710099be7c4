"""`adalora.layer`: PEFT's forward pass and gradients, the start, the regulariser, and what is refused."""

import warnings

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_course.adalora import (
    AdaLoRALinear,
    regularizer,
)
from lora_course.injection import adapter_layers, inject, merge
from tests.adalora.models import adapted, config, optimizer_of, peft_of
from tests.models import batch, qwen, relative
from tests.tolerances import EXACT, ROUNDED


@pytest.mark.parametrize(
    "fields",
    [{}, {"target_modules": ["q_proj", "down_proj"]}, {"exclude_modules": ["v_proj"]}],
    ids=str,
)
def test_forward_gradients_and_merged_weights_equal_pefts(fields: dict) -> None:
    ours = adapted(**fields).double()
    theirs = peft_of(ours, qwen().double(), **fields)
    mine, other = ours(**batch()), theirs(**batch())
    torch.testing.assert_close(mine.logits, other.logits)
    (mine.loss + regularizer(ours)).backward()
    other.loss.backward()
    for name, layer in adapter_layers(ours).items():
        peft = theirs.base_model.model.get_submodule(name)
        for key in "AEB":
            assert (
                relative(getattr(layer, key).grad, getattr(peft, f"lora_{key}")["default"].grad)
                < 1e-8
            )
    merge(ours)
    theirs.merge_adapter()
    for name, layer in adapter_layers(ours).items():
        merged = theirs.base_model.model.get_submodule(name).base_layer.weight
        torch.testing.assert_close(
            layer.base_layer.weight, merged, atol=1e-6, rtol=1e-6
        )  # delta_weight() is fp32


def test_layer_computes_its_equation_merges_and_gives_plain_factors() -> None:
    torch.manual_seed(0)
    base = nn.Linear(7, 5, bias=True)
    layer = AdaLoRALinear(base, r=3, lora_alpha=12)
    assert torch.equal(layer(torch.ones(7)), base(torch.ones(7)))
    layer.E.data.normal_(), layer.A.data.normal_(), layer.B.data.normal_()
    for shape in ((7,), (4, 7), (2, 3, 7), (0, 7)):
        x = torch.randn(shape)
        expected = base(x) + 4 * (x @ layer.A.T * layer.E[:, 0]) @ layer.B.T
        torch.testing.assert_close(layer(x), expected, **ROUNDED)
    A, B, scaling = layer.factors()
    torch.testing.assert_close(layer.delta_weight(), scaling * B @ A)
    x = torch.randn(4, 7)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before, **ROUNDED)


def test_it_starts_as_the_base_with_pefts_deviations_and_lambda_learns_first() -> None:
    base = qwen()
    reference = base(**batch()).logits
    model = inject(base, config(init_r=40), layer=AdaLoRALinear)
    torch.testing.assert_close(model(**batch()).logits, reference, **EXACT)
    A = torch.cat([layer.A.flatten() for layer in adapter_layers(model).values()])
    assert A.std().item() == pytest.approx(0.02, rel=0.03)  # 29,000 draws: 0.4% standard error
    model(**batch()).loss.backward()
    for layer in adapter_layers(model).values():
        assert (
            layer.E.grad.abs().max() > 0
            and layer.A.grad.abs().max() == layer.B.grad.abs().max() == 0
        )


def test_checkpointing_accumulation_autocast_and_cache_change_nothing() -> None:
    model = adapted().train()
    model(**batch(), use_cache=False).loss.backward()
    expected = [layer.E.grad.clone() for layer in adapter_layers(model).values()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for i in range(2):
        (
            model(**{k: v[i : i + 1] for k, v in batch().items()}, use_cache=False).loss / 2
        ).backward()
    for layer, gradient in zip(adapter_layers(model).values(), expected, strict=True):
        torch.testing.assert_close(layer.E.grad, gradient, atol=1e-6, rtol=1e-4)
    model.gradient_checkpointing_disable()
    model.eval()
    exact = model(**batch()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**batch()).logits
        penalty = regularizer(model)
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)  # bf16 keeps 8 bits
    assert penalty.dtype == torch.float32 and penalty == regularizer(model)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with sdpa_kernel(SDPBackend.MATH):
        ids = batch(1, 6)["input_ids"]
        assert torch.equal(
            model.generate(ids, use_cache=True, **kwargs),
            model.generate(ids, use_cache=False, **kwargs),
        )


def test_regularizer_equals_pefts_and_is_zero_iff_the_factors_are_orthonormal() -> None:
    ours = adapted(orth_reg_weight=0.3)
    theirs = peft_of(ours, qwen(), orth_reg_weight=0.3)
    with torch.no_grad():
        penalty = theirs(**batch()).loss - theirs.base_model.model(**batch()).loss
        torch.testing.assert_close(regularizer(ours), penalty, **ROUNDED)
    for layer in adapter_layers(ours).values():
        nn.init.orthogonal_(layer.A), nn.init.orthogonal_(layer.B)
    assert regularizer(ours) < 1e-6  # rounding of products of 80 numbers
    last = layer.B.data.clone()
    for spoilt in (
        2 * last,
        last[:, [0, 0, 2, 3]],
    ):  # no longer of length 1; no longer perpendicular
        layer.B.data.copy_(spoilt)
        assert regularizer(ours) > 0.01


def test_training_with_the_regularizer_makes_the_factors_orthonormal() -> None:
    model = adapted(total_step=400, orth_reg_weight=1.0)
    optimizer, before = optimizer_of(model), regularizer(model).item()
    for _ in range(60):
        regularizer(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert regularizer(model).item() < 0.1 * before


@pytest.mark.parametrize(("fields", "words"), [
    ({"init_r": 2}, "init_r=2, target_r=2.*start with init_r=3"),
    ({"init_r": 1, "target_r": 3}, "1 <= target_r < init_r"),
    ({"target_r": 0}, "1 <= target_r"),
    ({"deltaT": 0}, "deltaT >= 1"),
    ({"tinit": -1}, "tinit=-1.*try tinit=1"),
    ({"beta1": 1.0}, "beta1=1.0"),
    ({"beta2": 0.0}, "beta2=0.0"),
    ({"use_rslora": True}, "use_rslora"),
    ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
    ({"init_lora_weights": "gaussian"}, "leave it at True"),
])  # fmt: skip
def test_impossible_budgets_and_schedules_are_refused_and_nothing_is_changed(
    fields: dict, words: str
) -> None:
    model = qwen()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=words):
        inject(model, config(**fields), layer=AdaLoRALinear)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names


def test_a_schedule_changed_after_pefts_own_check_and_a_plain_config_are_refused() -> None:
    late = config()
    late.tinit = 8
    with pytest.raises(ValueError, match="no step is left"):
        inject(qwen(), late, layer=AdaLoRALinear)
    with pytest.raises(TypeError, match=r"AdaLoraConfig\(init_r"):
        inject(qwen(), LoraConfig(r=4, target_modules="all-linear"), layer=AdaLoRALinear)
    with pytest.raises(ValueError, match="LoRALinear does not support.*total_step=11"):
        inject(qwen(), config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it ignores r
        with pytest.raises(ValueError, match="r=16.*Set init_r"):
            inject(qwen(), config(r=16), layer=AdaLoRALinear)
