"""The studies on tasks, tried on nano with few steps: what arms have in common, what a score holds, what is taken up again."""

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch

from lora_course.experiments import beginning, smol_past, smol_several, task_scores, tasks_nano
from lora_course.experiments.arms import base_of, train
from lora_course.experiments.smol_past import METHODS
from lora_course.injection import trainable_parameters
from lora_course.lab import tasks

SMALL = {"model": "nano", "steps": 6, "batch": 3, "length": 48, "new_tokens": 4, "own_bytes": 400}
WORDS = {"validation": 5, "test": 20}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """Few steps, few words, and two hundred training words of each task: all of them take long to encode."""
    whole = tasks.load_task

    def load_task(name: str, split: str) -> datasets.Dataset:
        found = whole(name, split)
        return found.select(range(200)) if split == "train" else found

    monkeypatch.setattr(tasks, "load_task", load_task)
    task_scores._rows.cache_clear()
    for study in (smol_past, smol_several, tasks_nano):
        for key, value in {**SMALL, "words": WORDS, "router": {"steps": 2}}.items():
            if key in study.SETTINGS:
                monkeypatch.setitem(study.SETTINGS, key, value)
    monkeypatch.setattr(smol_several, "TRAINED", tmp_path)
    for cached in (smol_past.plain, smol_several.plain):
        cached.cache_clear()
    yield
    task_scores._rows.cache_clear()


@pytest.mark.parametrize("arm", METHODS)
def test_an_arm_starts_as_the_base_with_as_many_parameters_as_lora(small: None, arm: str) -> None:
    settings = smol_past.SETTINGS | {"steps": 40}
    lora = trainable_parameters(METHODS["lora"](settings, 0).model)
    made = METHODS[arm](settings, 0)
    ids = torch.arange(5, 25)[None]
    base = base_of(settings) if arm not in ("qlora",) else None
    with torch.no_grad():
        if base is not None:
            torch.testing.assert_close(made.model(ids).logits, base(ids).logits)
    expected = {"lora-2": 1 / 4, "adalora": 3 / 2, "gates": 3 / 2, "adaptive": 1 / 4, "progressive": None, "dora": 1.066}.get(arm, 1)  # fmt: skip
    if expected:  # what is pruned or grown later comes to LoRA's number in the end
        assert trainable_parameters(made.model) / lora == pytest.approx(expected, rel=0.02)


def test_rows_have_the_order_of_the_seed_and_the_length_of_the_study(small: None) -> None:
    found = [task_scores.task_rows_of(smol_past.SETTINGS, "past", seed) for seed in (0, 0, 1)]
    first, again, other = (rows["input_ids"][:] for rows in found)
    assert first.shape == (18, 48)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_score_of_lora_holds_answers_cuts_and_rounded_factors(small: None) -> None:
    found = smol_past.trained("lora", 1e-2, 0)
    validation, test = (smol_past.score("lora", found, split) for split in ("validation", "test"))
    assert set(validation) == {"bits_per_token"}
    assert len(test["right"]) == 20 and test["exact"] == test["right"].count("1") / 20
    assert len(test["losses"]) == 6 and test["losses"][-1] < test["losses"][0]
    # the cut at the full rank, and the sums with 16 bits, are the adapter itself
    assert test["cut"][8] == pytest.approx(test["bits_per_token"], rel=0.01)
    assert test["cut"][1] > test["cut"][8]
    assert abs(test["rounded"][2] - test["bits_per_token"]) > abs(test["rounded"][4] - test["bits_per_token"])  # fmt: skip


def test_as_many_of_mixed_rows_are_of_each_task_and_says_so(small: None) -> None:
    rows = smol_several.mixed_rows(seed=0, steps=6)
    domain, ids = rows["domain"][:], rows["input_ids"][:]
    assert sorted(domain.tolist()) == [0] * 9 + [1] * 9
    specialist = task_scores.task_rows_of(smol_several.SETTINGS, "plural", 0)["input_ids"][:]
    for row in ids[domain == 1]:
        assert (specialist == row).all(1).any()


def test_specialists_are_taken_up_from_disk_and_serve_their_own_task(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = smol_several.specialists(1e-2, 0)

    def train(*_: Any) -> None:
        raise AssertionError("trained anew")

    monkeypatch.setattr(smol_several, "fit", train)
    again = smol_several.specialists(1e-2, 0)
    assert all(torch.equal(states[t][k], again[t][k]) for t in states for k in states[t])
    with pytest.raises(AssertionError, match="anew"):
        smol_several.specialists(2e-2, 0)
    own = smol_several.score(states, "validation")["tasks"]
    swapped = dict(zip(states, [*list(states.values())[1:], states["past"]]))
    other = smol_several.score(swapped, "validation")["tasks"]
    assert all(own[t]["bits_per_token"] < other[t]["bits_per_token"] for t in states)


def test_the_average_of_specialists_of_weight_one_is_their_sum(small: None) -> None:
    merged = smol_several.merged_score(1e-2, 0, 1.0, "validation")
    model = base_of(smol_several.SETTINGS)
    from lora_course.experts import fixed_gates, mix_experts

    mix_experts(model, list(smol_several.specialists(1e-2, 0).values()))
    with fixed_gates(model, [1.0] * len(smol_several.TASKS)):
        summed = smol_several.score(model, "validation")
    assert merged["bits_per_token"] == pytest.approx(summed["bits_per_token"], rel=0.01)


def test_the_witness_begins_as_the_joint_training_does(small: None) -> None:
    losses = smol_several.beginning()["losses"]
    assert len(losses) == beginning.STEPS and losses[-1] < losses[0]
    assert losses == smol_several.beginning()["losses"]


@pytest.mark.parametrize("name", smol_several.STRATEGIES)
def test_a_sequence_gives_a_row_of_bits_after_each_task(small: None, name: str) -> None:
    model, matrix = smol_several.in_sequence(name, 1e-2, 0)
    count = len(smol_several.TASKS)
    assert len(matrix) == count + 1 and all(len(row) == count for row in matrix)
    for task in range(count):
        assert matrix[task + 1][task] < matrix[0][task]  # learning it helps it
    last = smol_several.score((model, matrix), "test")
    for task, bits in zip(smol_several.TASKS, matrix[-1]):
        assert last["tasks"][task]["bits_per_token"] == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize("rate", [4e-3, 1.6e-2])
def test_gates_end_with_about_loras_parameters_at_every_rate(small: None, rate: float) -> None:
    settings = smol_past.SETTINGS | {"steps": 30}
    lora = trainable_parameters(METHODS["lora"](settings, 0).model)
    rows = task_scores.task_rows_of(settings, "past", 0)
    found = train(METHODS["gates"](settings, 0), rows, rate, 0, 30, settings["batch"])
    assert found.arm.parameters(found.model) / lora == pytest.approx(1, abs=0.15)
