"""`adaptive.layer`: growth keeps the function, and sensitivity is that of the update."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from lora_course.adaptive import GrowingLoRALinear, RankGrower, rank_history
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, disabled, inject, merge, unload, unmerge
from lora_course.lora import LoRALinear
from lora_course.qlora import quantize_model
from lora_course.states import adapter_state, use_adapter
from tests.adaptive.models import (
    SCHEDULE,
    assert_same,
    growing,
    grown,
    randomized,
    train,
    trainable,
)
from tests.models import batch, config, qwen, randomize, relative
from tests.tolerances import EXACT, ROUNDED


def small(r: int = 2, **fields: object) -> GrowingLoRALinear:
    """One layer 7 → 5 with bias, scaling 3."""
    torch.manual_seed(2)
    layer = GrowingLoRALinear(nn.Linear(7, 5), r=r, lora_alpha=3 * r, **fields)
    nn.init.normal_(layer.B)
    return layer


def test_before_growth_it_is_plain_lora_to_the_bit() -> None:
    base = qwen()
    plain = inject(copy.deepcopy(base), config())
    ours = inject(base, config(), GrowingLoRALinear)
    for name, layer in adapter_layers(randomized(plain)).items():
        (
            adapter_layers(ours)[name].A.data.copy_(layer.A),
            adapter_layers(ours)[name].B.data.copy_(layer.B),
        )
    results = [model(**batch()) for model in (plain, ours)]
    assert torch.equal(results[0].logits, results[1].logits)
    for result in results:
        result.loss.backward()
    for name, layer in adapter_layers(plain).items():
        assert torch.equal(adapter_layers(ours)[name].A.grad, layer.A.grad)
        assert torch.equal(adapter_layers(ours)[name].B.grad, layer.B.grad)


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}], ids=str
)
def test_growth_keeps_the_function_and_the_scale_and_the_new_pair_learns(fields: dict) -> None:
    model = growing(**fields)
    before, scales = (
        model(**batch()).logits,
        [layer.scaling for layer in adapter_layers(model).values()],
    )
    for k, layer in enumerate(adapter_layers(model).values()):
        layer.grow(1 + k % 3, step=5)
    torch.testing.assert_close(
        model(**batch()).logits, before, atol=1e-6, rtol=1e-6
    )  # another order of summation, no more
    assert [layer.scaling for layer in adapter_layers(model).values()] == scales
    model(**batch()).loss.backward()
    for k, layer in enumerate(adapter_layers(model).values()):
        assert layer.r == 2 + 1 + k % 3 and layer.grown_at.tolist() == [5]
        alpha = layer.lora_alpha / (layer.r**0.5 if fields.get("use_rslora") else layer.r)
        assert alpha == pytest.approx(layer.scaling)
        assert (
            layer.B1.grad.abs().max() > 0 and layer.A1.grad.abs().max() == 0
        )  # as at the start: A1's passes through B1 = 0
        assert not layer.B1.any() and (layer.A1 != 0).all()


def test_new_rows_are_drawn_like_the_first_ones() -> None:
    for kind, deviation in ((True, 1 / (3 * 4000) ** 0.5), ("gaussian", 1 / 8)):
        layer = GrowingLoRALinear(nn.Linear(4000, 64), r=8, lora_alpha=8, init_lora_weights=kind)
        layer.grow(4, 1)
        assert layer.A1.std().item() == pytest.approx(deviation, rel=0.05)
        assert layer.A.std().item() == pytest.approx(deviation, rel=0.05)


def test_a_grown_layer_computes_what_the_plain_layer_of_its_factors_computes() -> None:
    layer = small()
    for k in (1, 2):
        layer.grow(k, step=k)
    for _, B in layer.pairs:
        nn.init.normal_(B)
    A, B, scaling = layer.factors()
    assert A.shape == (5, 7) and B.shape == (5, 5) and scaling == 3
    plain = LoRALinear(copy.deepcopy(layer.base_layer), r=5, lora_alpha=15)
    plain.A.data.copy_(A), plain.B.data.copy_(B)
    for shape in ((7,), (4, 7), (2, 3, 7), (0, 7)):
        x = torch.randn(shape)
        assert torch.equal(layer(x), plain(x))
        torch.testing.assert_close(
            layer(x), layer.base_layer(x) + x @ layer.delta_weight().t(), **ROUNDED
        )
    x = torch.randn(6, 7)
    layer(x).square().sum().backward(), plain(x).square().sum().backward()
    gradients = (
        torch.cat([A.grad for A, _ in layer.pairs]),
        torch.cat([B.grad for _, B in layer.pairs], 1),
    )
    torch.testing.assert_close(gradients, (plain.A.grad, plain.B.grad), atol=1e-4, rtol=1e-5)


def test_one_dropout_mask_serves_all_pairs() -> None:
    layer = small(lora_dropout=0.5)
    layer.grow(2, 1), nn.init.normal_(layer.B1)
    x = torch.randn(3, 7)
    torch.manual_seed(4)
    found = layer(x)
    torch.manual_seed(4)
    dropped = layer.lora_dropout(x)
    torch.testing.assert_close(
        found, layer.base_layer(x) + dropped @ layer.delta_weight().t(), **ROUNDED
    )


def test_merge_unmerge_and_switching_off_count_all_pairs() -> None:
    model = growing()
    base = unload(inject(qwen(), config()))
    for layer in adapter_layers(model).values():
        layer.grow(1, 1)
    expected = randomized(model)(**batch()).logits
    with disabled(model):
        torch.testing.assert_close(model(**batch()).logits, base(**batch()).logits, **EXACT)
    torch.testing.assert_close(merge(model)(**batch()).logits, expected, **ROUNDED)
    torch.testing.assert_close(unmerge(model)(**batch()).logits, expected, **ROUNDED)


def test_autocast_checkpointing_and_cached_generation() -> None:
    model = growing()
    for layer in adapter_layers(model).values():
        layer.grow(2, 1)
    randomized(model)
    ids = batch()["input_ids"]
    cached = [
        model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*cached)
    full = model(**batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**batch()).logits
    assert 1e-4 < relative(half, full) < 0.05  # bf16 keeps 8 bits
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch()).loss.backward()
        gradients.append([p.grad.clone() for p in trainable(model)])
        model.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_a_4bit_base_grows_and_trains_and_its_bytes_stay() -> None:
    base = quantize_model(qwen())
    model = growing(base)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    grower = RankGrower(model, SCHEDULE)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = train(model, optimizer, range(1, 9), grower)
    assert grower.finished and losses[-1] < losses[0]
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in before.items())


def test_growth_of_a_layer_is_refused_with_a_reason() -> None:
    layer = small()
    for k in (0, -1, 4):
        with pytest.raises(
            ValueError, match=f"k={k}: a layer of rank 2 and shape \\[5, 7\\] can gain 1 to 3"
        ):
            layer.grow(k, 1)
    layer.merge()
    with pytest.raises(RuntimeError, match="merged.*unmerge"):
        layer.grow(1, 1)
    assert layer.r == 2 and len(layer.pairs) == 1


def test_sensitivity_is_that_of_the_materialised_update_under_autograd() -> None:
    """Each ΔWᵢ as a leaf `[out, in]`: |⟨ΔWᵢ, ∂L/∂ΔWᵢ⟩| from autograd itself, with accumulation over two batches."""
    layer = small()
    layer.grow(2, 1), nn.init.normal_(layer.B1)
    A, B, scaling = layer.factors()
    leaves = [(scaling * torch.outer(B[:, i], A[i])).detach().requires_grad_() for i in range(4)]
    batches = torch.randn(2, 6, 7)
    for x in batches:
        (layer(x).sin() * 2).sum().backward()
        ((layer.base_layer(x) + x @ sum(leaves).t()).sin() * 2).sum().backward()
    expected = sum((leaf * leaf.grad).sum().abs() for leaf in leaves) / 35**0.5
    torch.testing.assert_close(layer.sensitivity(), expected.detach(), **ROUNDED)
    through_A = sum((A * A.grad).sum(1).abs().sum() for A, _ in layer.pairs) / 35**0.5
    torch.testing.assert_close(layer.sensitivity(), through_A.detach(), **ROUNDED)


def test_sensitivity_is_the_first_order_change_of_the_loss_when_a_layer_of_rank_one_is_dropped() -> (
    None
):
    layer, x = small(r=1), torch.randn(6, 7)
    layer.B.data *= 1e-3  # so that the second order is small against the first
    loss = layer(x).sin().sum()
    loss.backward()
    layer.enabled = False
    change = (layer(x).sin().sum() - loss).abs() / 35**0.5
    assert layer.sensitivity().item() == pytest.approx(change.item(), rel=0.02)


def test_layers_of_different_size_and_equal_noise_have_equal_sensitivity() -> None:
    generator = torch.Generator().manual_seed(0)

    def mean(features: tuple[int, int], draws: int = 300) -> float:
        layer, total = GrowingLoRALinear(nn.Linear(*features), r=2, lora_alpha=2), 0.0
        for _ in range(draws):
            layer.A.data.normal_(generator=generator), layer.B.data.normal_(generator=generator)
            G = torch.randn(features[1], features[0], generator=generator)
            layer.B.grad = G @ layer.A.t()
            total += layer.sensitivity().item()
        return total / draws

    # |bᵀ G a| / √(in · out) is nearly |N(0, 1)|: 2 · √(2/π), to 4% with 600 draws; √numel more would be 12 times as much
    assert (
        mean((200, 300))
        == pytest.approx(mean((20, 20)), rel=0.15)
        == pytest.approx(2 * (2 / 3.14159) ** 0.5, rel=0.15)
    )


def test_importance_and_uncertainty_are_the_two_moving_averages() -> None:
    layer, beta = small(), 0.85
    mean = deviation = 0.0
    for _ in range(4):
        layer.zero_grad()
        layer(torch.randn(3, 7)).square().sum().backward()
        value = layer.sensitivity().item()
        layer.observe(beta)
        mean = beta * mean + (1 - beta) * value
        deviation = beta * deviation + (1 - beta) * abs(value - mean)
        assert layer.importance.item() == pytest.approx(mean, rel=1e-5)
        assert layer.uncertainty.item() == pytest.approx(deviation, rel=1e-4)
    layer.B.grad.fill_(float("inf"))
    layer.observe(beta)
    assert layer.importance.item() == pytest.approx(mean, rel=1e-5) and layer.uncertainty.isfinite()


def test_an_adapter_with_fewer_or_more_pairs_is_taken_over() -> None:
    early, late = growing(), grown()
    first, last = adapter_state(early), adapter_state(late)
    logits = [model(**batch()).logits for model in (early, late)]
    for model in (early, late):
        for state, expected in ((last, logits[1]), (first, logits[0]), (last, logits[1])):
            use_adapter(model, state)
            assert torch.equal(model(**batch()).logits, expected)
            assert_same(adapter_state(model), state)
    same = adapter_layers(late)["model.layers.0.mlp.up_proj"].A
    use_adapter(late, last)
    assert (
        adapter_layers(late)["model.layers.0.mlp.up_proj"].A is same
    )  # where shapes agree, the tensors stay: an optimiser may hold them


def test_a_plain_adapter_of_another_rank_becomes_the_first_pair_and_grows(tmp_path: Path) -> None:
    plain = randomize(inject(qwen(), config(r=3, lora_alpha=12)), 1)
    export_peft(plain, tmp_path)
    expected = plain.eval()(**batch()).logits
    model = grown().eval()  # whatever it had before is gone
    use_adapter(model, read_factors(tmp_path))
    torch.testing.assert_close(model(**batch()).logits, expected, **ROUNDED)
    assert rank_history(model) == [{"step": 0, "ranks": dict.fromkeys(adapter_layers(model), 3)}]
    for layer in adapter_layers(model).values():
        assert (layer.scaling, layer.lora_alpha) == (4.0, 12.0)
        assert layer.importance == 0 and layer.uncertainty == 0
        layer.grow(2, step=5)
        assert (layer.r, layer.scaling, layer.lora_alpha) == (5, 4.0, 20.0)
    torch.testing.assert_close(model(**batch()).logits, expected, **ROUNDED)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = grown()
    before = adapter_state(model)
    name = next(n for n, layer in adapter_layers(model).items() if len(layer.pairs) > 1)
    wrong = [
        (before | {f"{name}.gates": torch.ones(2)}, "was made with another kind of layer"),
        ({k: v for k, v in before.items() if k != f"{name}.B1"}, "grew [12] times keeps .*'B1'"),
        (before | {f"{name}.A1": torch.zeros(2, 3)}, r"A1 \[2, 3\] and B1"),
        (before | {f"{name}.B1": torch.zeros(before[f"{name}.B1"].shape[0], 7)}, "needs A "),
    ]
    for state, message in wrong:
        with pytest.raises(ValueError, match=message):
            use_adapter(model, state)
        assert_same(adapter_state(model), before)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=str)
def test_the_exported_adapter_is_plain_lora_for_peft(tmp_path: Path, fields: dict) -> None:
    model = growing(**fields)
    train(
        model,
        torch.optim.AdamW(trainable(model), lr=1e-2),
        range(1, 6),
        RankGrower(model, SCHEDULE),
    )
    export_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(qwen(), tmp_path).eval()
    torch.testing.assert_close(theirs(**batch()).logits, model(**batch()).logits, **ROUNDED)
    ranks = {name: layer.r for name, layer in adapter_layers(model).items()}
    assert len(set(ranks.values())) > 1
    for name, r in ranks.items():
        assert theirs.base_model.model.get_submodule(name).lora_A["default"].weight.shape[0] == r
