"""`lora_course.experiments.arms`: one search that goes on beyond an edge, one training, and an arm from search to test."""

import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from lora_course.experiments import Arm, Kept, Runs, adapted, compete, config_of, search, train
from lora_course.experiments.arms import rows_of
from lora_course.experiments.record import Record
from lora_course.injection import adapter_layers

SETTINGS = {
    "model": "nano", "domain": "bible", "length": 32, "train_bytes": 20_000, "score_bytes": 500, "seeds": [0, 1], "steps": 3,
}  # fmt: skip


def parabola(best: dict[int, float]):
    """Lost bits in the exponent of the rate, lowest at a rate of each seed's own; and what was asked."""
    asked: list[tuple[float, int]] = []

    def value(rate: float, seed: int) -> float:
        asked.append((rate, seed))
        return 2 + math.log2(rate / best[seed]) ** 2

    return value, asked


@pytest.mark.parametrize(("best", "tried"), [
    (8e-3, [4e-3, 8e-3, 1.6e-2]),
    (6.4e-2, [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128]),
    (1e-3, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]),
])  # fmt: skip
def test_the_search_goes_on_while_the_best_lies_at_an_edge(best: float, tried: list[float]) -> None:
    value, asked = parabola({0: best})
    assert search(value, [4e-3, 8e-3, 1.6e-2], [0]) == best
    assert sorted({rate for rate, _ in asked}) == tried  # doubled and halved floats are exact


def test_a_rate_that_has_no_end_is_refused_and_a_nan_is_the_worst() -> None:
    with pytest.raises(ValueError, match="still lies at the edge of"):
        search(lambda rate, seed: -rate, [1e-3, 2e-3], [0])
    values = {1e-3: 3.0, 2e-3: 2.0, 4e-3: float("nan")}
    assert search(lambda rate, seed: values[rate], [1e-3, 2e-3, 4e-3], [0]) == 2e-3
    assert search(lambda rate, seed: rate, [1.0, 2.0], [0], edges=False) == 1.0


def test_all_seeds_decide_together_and_agreement_asks_as_many_as_it_needs() -> None:
    own = {0: 8e-3, 1: 8e-3, 2: 3.2e-2}
    value, asked = parabola(own)
    assert search(value, [4e-3, 8e-3, 1.6e-2], [0, 1, 2], agree=2) == 8e-3
    assert {seed for _, seed in asked} == {0, 1}
    value, asked = parabola(own)
    # the first and the last of three disagree, so that the middle one is asked; two then find 0.008 best by themselves
    assert search(value, [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2], [0, 2, 1], agree=2) in (8e-3, 1.6e-2)
    assert {seed for _, seed in asked} == {0, 1, 2}
    value, _ = parabola({0: 4e-3, 1: 1.6e-2})
    assert search(value, [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], [0, 1]) == 8e-3  # the mean's best


def test_an_arm_is_searched_on_validation_and_only_the_chosen_rate_is_tested(
    tmp_path: Path,
) -> None:
    made = []

    def trained(name: str, rate: float, seed: int) -> tuple[str, float, int]:
        made.append((rate, seed))
        return name, rate, seed

    def score(found: tuple[str, float, int], split: str) -> dict[str, float]:
        return {"bits_per_byte": 2 + math.log2(found[1] / 3.2e-2) ** 2, "seed": found[2]}

    runs = Runs(Record(tmp_path / "s.json", "s", SETTINGS), progress=str)
    best = compete(runs, "dora", Kept(trained, "x"), score, [4e-3, 8e-3, 1.6e-2], [0])
    tested = [key for key in runs.recorded if key.endswith("/test")]
    assert best == 3.2e-2 and tested == ["dora/0.032/0/test", "dora/0.032/1/test"]
    # what was searched is not trained again to be tested, and other rates' trainings are not held
    assert made == [(r, 0) for r in (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)] + [(3.2e-2, 1)]
    kept = Kept(trained, "x")
    kept(1.0, 0), kept(2.0, 0), kept.only([2.0])
    assert list(kept.made) == [(2.0, 0)]


def test_a_score_that_is_to_be_high_is_searched_by_its_negative(tmp_path: Path) -> None:
    runs = Runs(Record(tmp_path / "s.json", "s", SETTINGS), progress=str)
    score = lambda rate, split: {"accuracy": 1 / (1 + math.log2(rate / 8e-3) ** 2)}  # noqa: E731
    high = lambda run: -run["accuracy"]  # noqa: E731
    kept = Kept(lambda rate, seed: rate)
    assert compete(runs, "a", kept, score, [2e-3, 4e-3], [0], value=high) == 8e-3


class Counter(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_optimizer_step(self, args, state, control, **_) -> None:
        self.steps += 1


def test_an_arms_own_parts_take_part_in_its_training() -> None:
    rows = rows_of(SETTINGS)
    model, counter, seen = adapted(SETTINGS, 0, config_of(2)), Counter(), []
    before = {name: layer.B.clone() for name, layer in adapter_layers(model).items()}
    arm = Arm(
        model, [counter], lambda model: torch.tensor(100.0),
        finish=lambda model: {"after": len(seen), "steps": counter.steps},
    )  # fmt: skip
    found = train(arm, rows, 1e-2, 0, 3, 2, before_finish=lambda: seen.append("measured"))
    assert len(found.losses) == len(found.curve) == 3 and min(found.losses) > 100
    assert found.seen == {"after": 1, "steps": 3} and found.seconds > 0 and found.model is model
    layers = adapter_layers(model)
    assert all((layers[name].B - before[name]).abs().max() > 0 for name in layers)
    assert arm.parameters(model) == sum(layer.A.numel() + layer.B.numel() for layer in layers.values())  # fmt: skip


def test_a_training_repeats_itself_and_the_seed_draws_factors_and_order() -> None:
    def losses(seed: int) -> list[float]:
        arm = Arm(adapted(SETTINGS, seed, config_of(2)))
        return train(arm, rows_of(SETTINGS), 1e-2, seed, 3, 2).losses

    first = losses(1)
    assert losses(1) == first and losses(2) != first


def test_an_arm_with_its_own_fit_is_trained_by_it() -> None:
    asked = []

    def fit(rows, learning_rate: float, seed: int) -> list[float]:
        asked.append((len(rows), learning_rate, seed))
        return [1.0, 2.0]

    arm = Arm(adapted(SETTINGS, 0, config_of(2)), fit=fit, finish=lambda model: model)
    found = train(arm, rows_of(SETTINGS), 1e-2, 3, 5, 2)
    assert found.losses == [1.0, 2.0] and found.seen == {}
    assert asked == [(len(rows_of(SETTINGS)), 1e-2, 3)]
