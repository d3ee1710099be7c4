"""`lora_course.merging`: what each merge must be, and PEFT's `add_weighted_adapter` beside it."""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.model import LoraModel
from torch import Tensor

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, merge
from lora_course.lora import AdapterState
from lora_course.merging import average_factors, cross_term_error, dare, ties
from lora_course.states import (
    adapter_state,
    concatenate,
    relative_error,
    split_state,
    truncate,
    use_adapter,
)
from tests.models import batch, config, qwen, randomize
from tests.tolerances import EXACT, ROUNDED

TARGETS = ["q_proj", "v_proj", "down_proj"]  # square, out < in, and out < in with another width


def make(
    ranks: tuple[int, ...] = (3, 3), alphas: tuple[int, ...] | None = None, **fields: object
) -> list[AdapterState]:
    alphas = alphas or tuple(4 * r for r in ranks)
    return [
        adapter_state(
            randomize(
                inject(qwen(), config(r=r, lora_alpha=alpha, target_modules=TARGETS, **fields)),
                seed,
            )
        )
        for seed, (r, alpha) in enumerate(zip(ranks, alphas, strict=True))
    ]


def deltas(state: AdapterState) -> dict[str, Tensor]:
    return {m: t["scaling"].float() * t["B"] @ t["A"] for m, t in split_state(state).items()}


def weighted(states: list[AdapterState], weights: list[float]) -> dict[str, Tensor]:
    parts = [deltas(state) for state in states]
    return {m: sum(w * part[m] for w, part in zip(weights, parts, strict=True)) for m in parts[0]}


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """1e-5: an SVD in fp32 of matrices whose entries are about 0.1."""
    assert list(found) == list(expected)
    for module in expected:
        torch.testing.assert_close(found[module], expected[module], atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------------ averaging the factors


@pytest.mark.parametrize("count", [2, 4])
def test_the_mean_of_the_factors_is_off_by_the_root_of_one_minus_one_over_n(count: int) -> None:
    states = make((3,) * count)
    error = cross_term_error(states)
    assert error == pytest.approx(math.sqrt(1 - 1 / count), abs=0.03)  # .71 and .87
    mean, wrong = weighted(states, [1 / count] * count), deltas(average_factors(states))
    dense = math.sqrt(
        sum((wrong[m] - mean[m]).square().sum() for m in mean)
        / sum(d.square().sum() for d in mean.values())
    )
    assert error == pytest.approx(dense, rel=1e-5)


def test_averaged_factors_hold_each_pair_of_adapters() -> None:
    states = make()
    merged = split_state(average_factors(states, [0.5, 2.0]))
    for module, (a, b) in {
        m: (split_state(states[0])[m], split_state(states[1])[m]) for m in merged
    }.items():
        found = merged[module]["B"] @ merged[module]["A"]
        expected = 0.25 * a["B"] @ a["A"] + 4 * b["B"] @ b["A"] + a["B"] @ b["A"] + b["B"] @ a["A"]
        torch.testing.assert_close(found, expected, **ROUNDED)
    assert cross_term_error([states[0], states[0]]) == pytest.approx(0, abs=1e-6)  # nothing to mix


def test_factors_in_16_bits_are_averaged_in_32() -> None:
    """Exactly: a mean in bfloat16 would be off by up to 2^-9 of each entry."""
    half = [
        {key: t if key.endswith("scaling") else t.bfloat16() for key, t in state.items()}
        for state in make((3, 3))
    ]
    wide = [{key: t.to(torch.float32) for key, t in state.items()} for state in half]
    found, expected = average_factors(half, [0.3, 0.7]), average_factors(wide, [0.3, 0.7])
    for key in expected:
        assert torch.equal(found[key].float(), expected[key]), key


def test_averaging_factors_ignores_the_scale_and_needs_one_rank() -> None:
    states = make((3, 3), (3, 30))
    assert cross_term_error(states) > 0.85  # the second adapter is ten times too small
    with pytest.raises(ValueError, match="only be averaged at one rank"):
        average_factors(make((3, 4)))


# ------------------------------------------------------------------------------------------ the exact merges


@pytest.mark.parametrize("count", [1, 3])
def test_concatenation_is_exact_and_the_cut_is_from_the_sum_of_ranks_on(count: int) -> None:
    ranks = (2, 3, 4)[:count]
    states, weights = make(ranks), [1.0, -0.5, 2.0][:count]
    whole = concatenate(states, weights)
    assert_same(deltas(whole), weighted(states, weights))
    assert relative_error(truncate(whole, sum(ranks)), whole) < 1e-6
    errors = [relative_error(truncate(whole, r), whole) for r in range(1, sum(ranks))]
    assert all(a > b > 1e-3 for a, b in zip(errors, errors[1:], strict=False))


def test_relative_error_is_that_of_the_dense_updates() -> None:
    a, b = make()
    one, other = deltas(a), deltas(b)
    dense = math.sqrt(
        sum((one[m] - other[m]).square().sum() for m in one)
        / sum(d.square().sum() for d in other.values())
    )
    assert relative_error(a, b) == pytest.approx(dense, rel=1e-5)
    assert relative_error(a, a) < 1e-12
    nothing = {key: tensor * 0 if key.endswith(".B") else tensor for key, tensor in a.items()}
    assert relative_error(nothing, nothing) == 0 and relative_error(a, nothing) == math.inf


@pytest.mark.parametrize(
    "merge",
    [
        concatenate,
        lambda s: truncate(s[0], 5),
        lambda s: ties(s, 5, 1.0).state,
        lambda s: dare(s, 5, 1.0).state,
    ],
)
def test_one_adapter_of_weight_one_comes_out_as_it_was(merge) -> None:
    (state,) = make((5,), (7,))
    model = inject(qwen(), config(r=5, lora_alpha=7, target_modules=TARGETS))
    expected = use_adapter(model, state)(**batch()).logits
    merged = merge([state])
    assert_same(deltas(merged), deltas(state))
    torch.testing.assert_close(use_adapter(model, merged)(**batch()).logits, expected, **ROUNDED)


# ------------------------------------------------------------------------------------------ TIES


def rank_one(values: list[list[float]]) -> AdapterState:
    """A state whose update is the matrix given, for cases that can be worked out by hand: A is the identity."""
    matrix = torch.tensor(values)
    return {
        "m.A": torch.eye(matrix.shape[1]),
        "m.B": matrix / 2,
        "m.scaling": torch.tensor(2.0, dtype=torch.float64),
    }


def test_ties_trims_elects_and_averages_what_agrees() -> None:
    one = rank_one([[5.0, -1.0, 4.0], [3.0, 0.1, 0.2]])  # top half: 5, 4, 3
    two = rank_one([[-6.0, 0.3, 2.0], [1.0, 0.2, -0.1]])  # top half: -6, 2, 1
    three = rank_one([[4.0, 0.1, 6.0], [-9.0, 0.3, 0.2]])  # top half: 4, 6, -9
    merged = ties([one, two, three], None, 0.5)
    expected = torch.tensor([[(5 + 4) / 2, 0, (4 + 2 + 6) / 3], [-9, 0, 0]])
    torch.testing.assert_close(deltas(merged.state)["m"], expected, atol=1e-5, rtol=0)
    assert merged.truncation_error == 0
    half = ties([one, two, three], None, 0.5, weights=[2, 7, 1])  # the elected signs are as before
    torch.testing.assert_close(
        deltas(half.state)["m"][0, 0], torch.tensor((2 * 5 + 4) / 2), atol=1e-5, rtol=0
    )


def test_ties_at_density_one_with_agreeing_signs_is_the_mean() -> None:
    states = make((3, 3, 3))
    agreeing = [
        {key: value.abs() if not key.endswith("scaling") else value for key, value in state.items()}
        for state in states
    ]
    merged = ties(agreeing, None, 1.0)
    assert_same(deltas(merged.state), weighted(agreeing, [1 / 3] * 3), 1e-4)
    assert relative_error(ties(states, None, 1.0).state, concatenate(states, [1 / 3] * 3)) > 0.3


def test_factors_of_adapters_with_other_modules_are_not_averaged_in_any_order() -> None:
    states = make()
    partial = {key: value for key, value in states[1].items() if "v_proj" in key}
    for given in ([states[0], partial], [partial, states[0]]):
        with pytest.raises(ValueError, match="one rank"):
            average_factors(given)


def test_the_cut_loses_what_it_says() -> None:
    states = make((3, 3))
    full = ties(states, None, 0.2)
    for r in (1, 6, 20):
        cut = ties(states, r, 0.2)
        assert split_state(cut.state)["model.layers.0.self_attn.q_proj"]["A"].shape[0] == r
        assert cut.truncation_error == pytest.approx(
            relative_error(cut.state, full.state), rel=1e-3
        )
    assert full.truncation_error == 0
    assert (
        ties(states, 6, 0.2).truncation_error > 0.3
    )  # the rank of the sum is not that of its largest entries


# ------------------------------------------------------------------------------------------ DARE


def test_dare_is_unbiased_and_as_noisy_as_it_says() -> None:
    states, weights, density = make((3, 3)), [1.0, -0.5], 0.4
    expected, runs = weighted(states, weights), 80
    total = {module: torch.zeros_like(delta) for module, delta in expected.items()}
    squares = 0.0
    for seed in range(runs):
        found = deltas(dare(states, None, density, weights, seed).state)
        for module in expected:
            total[module] += found[module] / runs
            squares += (found[module] - expected[module]).square().sum().item() / runs
    parts = [weighted([state], [weight]) for state, weight in zip(states, weights, strict=True)]
    variance = (1 / density - 1) * sum(
        delta.square().sum().item() for part in parts for delta in part.values()
    )
    assert squares == pytest.approx(variance, rel=0.02)
    bias = sum((total[m] - expected[m]).square().sum().item() for m in expected)
    assert bias == pytest.approx(
        variance / runs, rel=0.15
    )  # what is left of the noise, and nothing else
    assert_same(deltas(dare(states, None, 1.0, weights).state), expected)


def test_the_seed_decides_the_mask() -> None:
    states = make()
    one, same, other = (dare(states, 6, 0.5, seed=seed).state for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert relative_error(other, one) > 0.1
    assert dare(states, 6, 0.1).truncation_error > dare(states, 6, 0.9).truncation_error > 0.1


# ------------------------------------------------------------------------------------------ beside PEFT


def peft_model(states: list[AdapterState], **fields: object) -> PeftModel:
    """A PEFT model that carries the states as adapters "0", "1", …"""
    model: PeftModel | None = None
    for i, state in enumerate(states):
        tensors = split_state(state)
        r, scaling = (
            next(iter(tensors.values()))["A"].shape[0],
            float(next(iter(tensors.values()))["scaling"]),
        )
        settings = config(
            r=r,
            lora_alpha=scaling * (math.sqrt(r) if fields.get("use_rslora") else r),
            target_modules=TARGETS,
            **fields,
        )
        if model is None:
            model = get_peft_model(qwen(), settings, str(i))
        else:
            model.add_adapter(str(i), settings)
        for name, module in model.base_model.model.named_modules():
            if name in tensors:
                module.lora_A[str(i)].weight.data.copy_(tensors[name]["A"])
                module.lora_B[str(i)].weight.data.copy_(tensors[name]["B"])
    return model


def peft_merge(
    states: list[AdapterState],
    kind: str,
    weights: list[float],
    fields: dict | None = None,
    **arguments: object,
) -> dict[str, Tensor]:
    """The updates of PEFT's merged adapter."""
    model = peft_model(states, **(fields or {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # density 1: nothing is pruned
        model.base_model.add_weighted_adapter(
            [str(i) for i in range(len(states))], weights, "merged", kind, **arguments
        )
    modules = dict(model.base_model.model.named_modules())
    return {
        name: modules[name].get_delta_weight("merged").detach() for name in split_state(states[0])
    }


def test_cat_and_svd_are_pefts() -> None:
    states, weights = make((2, 4)), [0.7, -1.5]
    whole = concatenate(states, weights)
    assert_same(peft_merge(states, "cat", weights), deltas(whole))
    assert_same(peft_merge(states, "svd", weights, svd_rank=3), deltas(truncate(whole, 3)))


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_on_updates_is_pefts_ties_svd(density: float) -> None:
    states, weights = make((3, 3, 3)), [1.0, 0.5, 2.0]
    theirs = peft_merge(states, "ties_svd", weights, svd_rank=7, density=density)
    assert_same(deltas(ties(states, 7, density, weights).state), theirs, 1e-4)


def test_dare_on_updates_is_pefts_with_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    inject_adapter = LoraModel.inject_adapter

    def then_seed(self: LoraModel, *args: object, **kwargs: object) -> None:
        inject_adapter(self, *args, **kwargs)  # its initialisation draws numbers too
        torch.manual_seed(5)

    monkeypatch.setattr(LoraModel, "inject_adapter", then_seed)
    states, weights = make((3, 3)), [1.0, 0.5]
    theirs = peft_merge(states, "dare_linear_svd", weights, svd_rank=7, density=0.6)
    assert_same(deltas(dare(states, 7, 0.6, weights, seed=5).state), theirs, 1e-4)


def test_pefts_linear_holds_the_cross_terms() -> None:
    """PEFT issue 3004. Its weights go into both factors as square roots, so the terms i = j are right."""
    states = make((3, 3, 3, 3))
    theirs, right = peft_merge(states, "linear", [0.25] * 4), weighted(states, [0.25] * 4)
    assert_same(theirs, deltas(average_factors(states, [0.5] * 4)))
    error = math.sqrt(
        sum((theirs[m] - right[m]).square().sum() for m in right)
        / sum(d.square().sum() for d in right.values())
    )
    assert error == pytest.approx(
        math.sqrt(4 - 1), rel=0.05
    )  # n − 1 wrong terms for each right one
    opposed = peft_merge(states[:2], "linear", [1.0, -1.0])
    parts = [split_state(state) for state in states[:2]]
    for module, delta in opposed.items():
        (a, b), s = (part[module] for part in parts), 4.0
        torch.testing.assert_close(
            delta, s * (a["B"] + b["B"]) @ (a["A"] - b["A"]), atol=1e-4, rtol=1e-4
        )


def test_pefts_ties_and_dare_act_on_the_factors() -> None:
    states = make((3, 3))
    mean = concatenate(states, [0.5, 0.5])
    size = math.sqrt(sum(d.square().sum() for d in deltas(mean).values()))
    for kind in ("ties", "dare_linear"):
        theirs = peft_merge(states, kind, [0.5, 0.5], density=1.0)
        off = math.sqrt(sum((theirs[m] - d).square().sum() for m, d in deltas(mean).items())) / size
        assert off > 0.5, kind
        # dare_linear without dropping is "linear"; ours without dropping is the sum of the updates
        if kind == "dare_linear":
            assert_same(theirs, peft_merge(states, "linear", [0.5, 0.5]))
    assert relative_error(dare(states, 6, 1.0, [0.5, 0.5]).state, mean) < 1e-5


def test_peft_over_scales_rank_stabilised_adapters_and_concatenation_does_not() -> None:
    """PEFT issue 3761: the merged adapter inherits use_rslora, and √r with it."""
    states = make((4, 4), (8, 8), use_rslora=True)
    right = weighted(states, [1.0, 0.5])
    assert_same(deltas(concatenate(states, [1.0, 0.5])), right)
    theirs = peft_merge(states, "cat", [1.0, 0.5], {"use_rslora": True})
    assert_same(theirs, {module: math.sqrt(8) * delta for module, delta in right.items()}, 1e-4)


def test_a_merge_of_adapters_with_a_rank_pattern_can_be_saved_loaded_and_exported(
    tmp_path: Path,
) -> None:
    states = make((3, 5), rank_pattern={"q_proj": 2})
    model = use_adapter(inject(qwen(), config(target_modules=TARGETS)), ties(states, 4, 0.5).state)
    expected = model(**batch()).logits
    loaded = PeftModel.from_pretrained(qwen(), export_peft(model, tmp_path / "peft"))
    torch.testing.assert_close(loaded(**batch()).logits, expected, **ROUNDED)
    again = load_adapter(qwen(), save_adapter(model, tmp_path / "own"))
    torch.testing.assert_close(again(**batch()).logits, expected, **EXACT)


# ------------------------------------------------------------------------------------------ states and refusals


def test_a_module_that_one_state_lacks_is_merged_from_the_others_and_nothing_given_changes() -> (
    None
):
    states = make((3, 3))
    partial = {key: value for key, value in states[1].items() if "v_proj" in key}
    before = copy.deepcopy([states[0], partial])
    for way in (lambda s: ties(s, None, 1.0).state, lambda s: dare(s, None, 1.0).state):
        found = deltas(way([states[0], partial]))
        alone = deltas(states[0])
        for module in alone:
            if "v_proj" not in module:
                torch.testing.assert_close(found[module], alone[module], **ROUNDED)
    for state, copied in zip([states[0], partial], before, strict=True):
        assert all(torch.equal(state[key], copied[key]) for key in copied)


def test_a_state_of_zeros_merges_to_zero() -> None:
    state = adapter_state(inject(qwen(), config(target_modules=TARGETS)))
    merged = ties([state, state], 3)
    assert merged.truncation_error == 0 and all(
        delta.abs().max() == 0 for delta in deltas(merged.state).values()
    )


def test_bad_input_is_refused_in_a_sentence() -> None:
    states = make()
    for density in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match="more than 0 and at most 1"):
            ties(states, 4, density)
        with pytest.raises(ValueError, match="more than 0 and at most 1"):
            dare(states, 4, density)
    with pytest.raises(ValueError, match="2 states and 1 weights"):
        ties(states, 4, weights=[1.0])
    with pytest.raises(ValueError, match="one or more states"):
        average_factors([])
    with pytest.raises(ValueError, match="r=0"):
        dare(states, 0)
    with pytest.raises(ValueError, match="factor_state"):
        ties([{"m.A": torch.zeros(1, 2), "m.B": torch.zeros(3, 1)}], 1)
    other = {
        key: value.repeat(1, 2) if key.endswith(".A") else value for key, value in states[1].items()
    }
    with pytest.raises(ValueError, match="different base models"):
        ties([states[0], other], 4)


def test_merged_states_serve_on_the_model() -> None:
    states = make((3, 3))
    model = inject(qwen(), config(target_modules=TARGETS))
    use_adapter(model, dare(states, 5, 0.5).state)
    assert {layer.r for layer in adapter_layers(model).values()} == {5}
    unmerged = model(**batch()).logits
    torch.testing.assert_close(merge(model)(**batch()).logits, unmerged, **ROUNDED)
