"""`lora_course.lab.evidence`: what scipy and counting by hand give."""

import itertools
import math
import statistics

import pytest
from scipy import stats

from lora_course.lab.evidence import (
    chance,
    chance_of_labels,
    differences,
    equivalent,
    interval,
    pareto,
    verdict,
)

SPREAD, STEADY = [0.01, 0.02, -0.01, 0.03, 0.01], [0.02, 0.021, 0.019, 0.02, 0.02]


def test_differences_are_seed_by_seed() -> None:
    assert differences([2.0, 2.5, 3.0], [1.0, 2.0, 3.5]) == [1.0, 0.5, -0.5]
    with pytest.raises(ValueError, match="2 values against 3"):
        differences([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("values", [SPREAD, STEADY, [-1.0, -2.0], [0.3 * i * i for i in range(15)]])
@pytest.mark.parametrize("confidence", [0.95, 0.9])
def test_an_interval_is_students(values: list[float], confidence: float) -> None:
    mean, error = statistics.fmean(values), stats.sem(values)
    low, high = stats.t.interval(confidence, len(values) - 1, loc=mean, scale=error)
    assert interval(values, confidence) == pytest.approx((mean, low, high), rel=1e-9)
    with pytest.raises(ValueError, match="1 values: an interval needs 2"):
        interval([1.0])


def test_verdicts_need_the_whole_interval_on_one_side() -> None:
    assert verdict(STEADY) == "higher" and verdict([-v for v in STEADY]) == "lower"
    assert verdict([0.02, -0.021, 0.019, 0.02, 0.02]) == "within noise"


def test_a_verdict_agrees_with_a_paired_t_test() -> None:
    for values in (SPREAD, STEADY, [0.1, 0.2, 0.3], [0.5, -0.1, 0.4, 0.3, 0.35]):
        assert (stats.ttest_1samp(values, 0).pvalue < 0.05) == (verdict(values) != "within noise")


def test_equivalence_is_two_one_sided_tests() -> None:
    values = [0.004, -0.002, 0.001, 0.003, -0.001]
    for margin in (0.001, 0.003, 0.0035, 0.01):
        above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(values, margin, alternative="less").pvalue
        assert equivalent(values, margin) == (max(above, below) < 0.05)
    assert not equivalent(SPREAD, 0.01)  # no difference was found, and no equivalence either


@pytest.mark.parametrize("values", [SPREAD, STEADY, [1.0, -2.0, 3.0], [0.1, 0.1, -0.1, 0.1]])
def test_the_chance_of_a_mean_is_scipys_exact_permutation_test(values: list[float]) -> None:
    test = stats.permutation_test(
        (values,), lambda v, axis: v.mean(axis), permutation_type="samples", n_resamples=math.inf
    )
    assert chance(values) == pytest.approx(test.pvalue)


def test_the_chance_of_a_rule_counts_the_ways_that_pass_it() -> None:
    all_below = lambda d: max(d) < 0  # noqa: E731
    assert chance([-1.0, -2.0, -0.5, -3.0, -1.5], all_below) == 1 / 32
    assert (
        chance([-1.0, 2.0, -0.5], all_below) == 1 / 8
    )  # of the rule, whatever the values' own signs
    assert chance([1.0, 1.0, 1.0, 1.0, 1.0]) == 2 / 32
    rule = lambda d: verdict(d) == "lower"  # noqa: E731
    by_hand = sum(
        rule([s * v for s, v in zip(signs, STEADY, strict=True)])
        for signs in itertools.product((1, -1), repeat=5)
    )
    assert chance(STEADY, rule) == by_hand / 32 > 0
    for wrong in ([], [1.0] * 21):
        with pytest.raises(ValueError, match="1 to 20"):
            chance(wrong)


def test_unpaired_groups_are_dealt_in_all_ways() -> None:
    first, second = [1.0, 2.0, 3.5, 2.5], [4.0, 3.0, 5.0]
    test = stats.permutation_test(
        (first, second), lambda a, b, axis: abs(a.mean(axis) - b.mean(axis)), n_resamples=math.inf,
        alternative="greater",
    )  # fmt: skip
    assert chance_of_labels(first, second) == pytest.approx(test.pvalue)
    assert chance_of_labels([1.0, 2.0], [3.0, 4.0], lambda a, b: min(b) - max(a)) == 1 / 6
    with pytest.raises(ValueError, match="can be dealt in"):
        chance_of_labels([0.0] * 20, [1.0] * 20)
    with pytest.raises(ValueError, match="no group empty"):
        chance_of_labels([], [1.0])


def test_the_front_holds_what_nothing_beats() -> None:
    points = {
        "a": (1.0, 5.0), "b": (2.0, 3.0), "c": (2.0, 4.0), "d": (3.0, 3.0), "e": (4.0, 1.0), "f": (4.5, 1.5), "g": (2.0, 3.0),
    }  # fmt: skip
    assert pareto(points) == ["a", "b", "g", "e"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_run_that_diverged_is_no_result(bad: float) -> None:
    values = [bad, -0.1, 0.2, -0.3, 0.1]
    for said in (
        lambda: interval(values),
        lambda: verdict(values),
        lambda: equivalent(values, 1.0),
        lambda: chance(values),
        lambda: chance(values, lambda differences: max(differences) < 0),
        lambda: chance_of_labels(values, [1.0, 2.0]),
        lambda: pareto({"diverged": (1.0, bad), "lora": (1.0, 1.0)}),
    ):
        with pytest.raises(ValueError, match="among the values: a run diverged"):
            said()
