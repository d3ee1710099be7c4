"""`quantized_served`: what each arm serves is what it says, and what is aware of the rounding is trained as it is served."""

from typing import Any

import pytest
import torch

from lora_course.experiments import quantized_served as study
from lora_course.experiments.arms import base_of, rows_of
from lora_course.injection import adapter_layers
from lora_course.states import adapter_state
from tests.models import randomize, relative

BITS = (4, 3)
IDS = torch.arange(5, 45).reshape(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def weights(model: Any) -> dict[str, torch.Tensor]:
    """The seven matrices of the block."""
    return {n: w for n, w in model.named_parameters() if "layers." in n and w.dim() == 2}


@pytest.mark.parametrize("bits", BITS)
def test_32_neighbours_of_a_row_share_a_scale_and_their_largest_gets_the_largest_code(
    bits: int,
) -> None:
    name, weight = next(iter(weights(base_of(study.SETTINGS)).items()))
    assert weight.shape[1] % 32 == 0, name
    found, largest = study.rounded(weight, bits).double(), 2 ** (bits - 1) - 1
    near = 0
    for row, mine in zip(weight[:20].double(), found[:20], strict=True):
        for group, got in zip(row.split(32), mine.split(32), strict=True):
            step = group.abs().max() / largest
            at = group / step
            # the package's scales have 16 bits: a number at a border may go either way
            clear = (at - at.floor() - 0.5).abs() > 1e-3
            torch.testing.assert_close(got[clear], (at.round() * step)[clear], atol=0, rtol=2**-15)
            near += int((~clear).sum())
    assert near < 0.01 * 20 * weight.shape[1]


@pytest.mark.parametrize("bits", BITS)
def test_a_fresh_adapter_that_is_aware_starts_as_the_rounded_base_and_learns_as_lora_on_it(
    bits: int,
) -> None:
    aware, there = study.start("aware", bits, 3), study.start("rounded", bits, 3)
    # the sum W₀ + 0 is exact, and both compute the same product
    assert torch.equal(logits(aware), logits(there))
    plain = logits(base_of(study.SETTINGS))
    assert 0.01 < relative(logits(aware), plain) < 0.5
    for model in (aware, there):
        model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    twins = adapter_layers(there)
    for name, layer in adapter_layers(aware).items():
        assert torch.equal(layer.A, twins[name].A)
        assert twins[name].B.grad.norm() > 0
        # straight through: sums in another order
        assert relative(layer.B.grad, twins[name].B.grad) < 1e-3


@torch.no_grad()
def loss(model: Any) -> float:
    """Nats a token of the rows that it is trained on, in training mode."""
    rows = {key: value[:, :64] for key, value in rows_of(study.SETTINGS)[:2].items()}
    return model.train()(**rows, use_cache=False).loss.item()


@pytest.mark.parametrize("bits", BITS)
def test_what_is_aware_is_scored_as_it_was_trained(bits: int) -> None:
    model = randomize(study.start("aware", bits, 0), 2)
    state, trained = adapter_state(model), loss(model)
    assert loss(study.serve(state, study.WAYS["aware"], bits)) == pytest.approx(trained, abs=1e-5)
    # not so the adapter beside the base, rounded or not
    for base in ("as it is", "rounded"):
        assert abs(loss(study.serve(state, study.Way("aware", base, False), bits)) - trained) > 1e-3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("way", study.WAYS)
def test_each_way_serves_the_weights_that_it_names(way: str, bits: int) -> None:
    state = adapter_state(randomize(study.start("as it is", 32, 0), 4))
    plain = weights(base_of(study.SETTINGS))
    model = study.serve(state, study.WAYS[way], bits)
    for name, w in plain.items():
        module = name.removesuffix(".weight")
        delta = state[f"{module}.scaling"].float() * state[f"{module}.B"] @ state[f"{module}.A"]
        on_grid = study.rounded(w, bits)
        wanted = {
            "merged": study.rounded(w + delta, bits),
            "beside": on_grid + delta,
            "trained there": on_grid + delta,
            "trained there, merged": study.rounded(on_grid + delta, bits),
            "trained there, back": study.rounded(w + delta, bits),
            "aware": study.rounded(w + delta, bits),
        }[way]
        layer = model.get_submodule(module)
        if study.WAYS[way].merged:
            served = layer.weight
            assert torch.equal(study.rounded(served, bits), served)  # on the grid: int4 and a scale
            assert all(len(group.unique()) < 2**bits for group in served[0].split(32))
        else:
            assert torch.equal(layer.base_layer.weight, on_grid)
            served = layer.base_layer.weight + layer.delta_weight()
        # a number at a border may go either way
        assert relative(served, wanted) < 0.01
    rest = dict(base_of(study.SETTINGS).named_parameters())
    kept = dict(model.named_parameters())
    assert all(torch.equal(kept[n], p) for n, p in rest.items() if n not in plain and n in kept)


def test_arms_that_serve_one_adapter_train_it_once_and_each_where_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    class Found:
        def __init__(self, model: Any) -> None:
            self.model = model

    def train_as(settings: Any, arm: Any, rate: float, seed: int) -> Found:
        layer = next(iter(adapter_layers(arm.model).values()))
        on_grid = {b for b in BITS if torch.equal(study.rounded(layer.base_layer.weight, b), layer.base_layer.weight)}  # fmt: skip
        asked.append((type(layer).__name__, getattr(layer, "bits", None), min(on_grid, default=32), rate, seed))  # fmt: skip
        return Found(randomize(arm.model, seed))

    monkeypatch.setattr(study, "train_as", train_as)
    study.adapter.cache_clear()
    found = {arm: study.served(arm, 0.01, 7) for arm in study.ARMS}
    study.adapter.cache_clear()
    assert sorted(asked, key=str) == sorted(
        [
            ("LoRALinear", None, 32, 0.01, 7), ("LoRALinear", None, 4, 0.01, 7), ("LoRALinear", None, 3, 0.01, 7),
            ("RoundedSumLinear", 4, 32, 0.01, 7), ("RoundedSumLinear", 3, 32, 0.01, 7),
        ],
        key=str,
    )  # fmt: skip
    lengths = {arm: study.lengths(each) for arm, each in found.items()}
    assert lengths["lora"]["error"] == pytest.approx(0, abs=1e-6)
    assert (
        len({each["update"] for each in lengths.values()}) == 1
    )  # one state, wherever it came from
    for way in study.WAYS:
        four, three = (lengths[f"{way}, {bits} bits"]["error"] for bits in BITS)
        # the step at 3 bits is 7/3 of that at 4
        assert three / four == pytest.approx(7 / 3, rel=0.15)
    # rounded twice: two errors at about right angles
    twice = lengths["trained there, merged, 4 bits"]["error"] / lengths["merged, 4 bits"]["error"]
    assert 1.2 < twice < 1.6
