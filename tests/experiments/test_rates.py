"""`lora_course.experiments.rates`: one search that goes on beyond an edge, and an arm from search to test."""

import math
from pathlib import Path

import pytest

from lora_course.experiments import Kept, Runs, choose, compete, run_key, search
from lora_course.experiments.rates import at_rate, compete_all, first_rates
from lora_course.experiments.record import Record

SETTINGS = {"seeds": [0, 1]}


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


def test_a_choice_reads_and_keeps_the_runs_on_validation_text_alone(tmp_path: Path) -> None:
    runs, asked = Runs(Record(tmp_path / "s.json", "s", SETTINGS), progress=str), []

    def compute(rate: float, seed: int, split: str) -> dict[str, float]:
        asked.append((rate, seed, split))
        return {"ACC": abs(math.log2(rate / 4)) + seed}

    how = (runs, "arm", compute, [1.0, 2.0], [0, 1])
    assert choose(*how, value=lambda run: run["ACC"]) == 4
    assert asked == [(rate, seed, "validation") for rate in (1, 2, 4, 8) for seed in (0, 1)]
    assert list(runs.recorded) == [f"arm/{rate:g}/{s}/{split}" for rate, s, split in asked]
    assert choose(*how, value=lambda run: run["ACC"], edges=False) == 2 and len(asked) == 8


def test_arms_compete_from_where_the_settings_say_and_a_chosen_one_is_scored_on_every_split(
    tmp_path: Path,
) -> None:
    settings = SETTINGS | {
        "search_seeds": [0], "first": [4e-3, 8e-3, 1.6e-2], "first_of": {"vera": [3.2e-2, 6.4e-2, 0.128]},
    }  # fmt: skip
    best, made = {"lora": 8e-3, "vera": 6.4e-2}, []

    def trained(arm: str, rate: float, seed: int) -> tuple[str, float]:
        made.append((arm, rate, seed))
        return arm, rate

    def score(found: tuple[str, float], split: str) -> dict[str, float]:
        return {"bits_per_byte": 2 + math.log2(found[1] / best[found[0]]) ** 2}

    runs = Runs(Record(tmp_path / "s.json", "s", settings), progress=str)
    splits = ("test", "validation")
    assert compete_all(runs, settings, iter(best), trained, score, splits=splits) == best
    asked = [(arm, settings["first_of"].get(arm, settings["first"])) for arm in best]
    searched = [(arm, rate, 0) for arm, first in asked for rate in first]
    # the second seed is trained once for both splits
    assert sorted(made) == sorted([*searched, *((arm, rate, 1) for arm, rate in best.items())])
    assert set(runs.recorded) == {
        *(run_key(arm, rate, seed, "validation") for arm, rate, seed in made),
        *(run_key(arm, rate, seed, "test") for arm, rate in best.items() for seed in (0, 1)),
    }
    assert runs.expected == len(runs.recorded) == len(runs.done)


def test_rates_may_be_by_arm() -> None:
    by_arm = {"learning_rates": {"small": [1e-3], "random": [2e-3]}}
    assert first_rates(by_arm, "random") == [2e-3]
    assert first_rates({"learning_rates": [4e-3]}, "small") == [4e-3]


def test_an_arm_without_a_search_has_every_seed_at_the_given_rate(tmp_path: Path) -> None:
    runs = Runs(Record(tmp_path / "s.json", "s", SETTINGS), progress=str)
    at_rate(runs, "control", 8e-3, lambda rate, seed: {"bits_per_byte": rate + seed})
    assert runs.recorded == {
        "control/0.008/0/test": {"bits_per_byte": 8e-3},
        "control/0.008/1/test": {"bits_per_byte": 1.008},
    }
