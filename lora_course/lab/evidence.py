"""What values of several seeds say: paired differences, an interval, and how often noise alone would say as much.

Two methods that share a seed share text, order and start, so their difference seed by seed is steadier than either value.
A claim holds by a rule that noise alone passes less than one time in twenty: `interval` is such a rule for differences that
are about normal, and `chance` counts, exactly and without that assumption, how often any rule is passed by chance.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from scipy.special import stdtrit

MOST = 2**20  # relabellings that are counted one by one


def check_finite(values: Iterable[float]) -> None:
    """Raise ValueError for NaN or infinity: compared with anything NaN is false, so that a run that diverged would pass for a result."""
    if wrong := [value for value in values if not math.isfinite(value)]:
        raise ValueError(
            f"{wrong[0]} is among the values: a run diverged. Say so, and leave its method or its rate out of what is compared."
        )


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """`first` less `second`, seed by seed. Raises ValueError where they have not one value for each of the same seeds."""
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} values against {len(second)}: pairs need one value a seed in both"
        )
    return [a - b for a, b in zip(first, second, strict=True)]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the ends of its two-sided interval: mean ± t · s / √n, with s the standard deviation of the n values and t
    Student's quantile with n − 1 degrees of freedom.

    Raises:
        ValueError: fewer than 2 values, or one that is not finite.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values: an interval needs 2 or more of them")
    check_finite(values)
    t = float(stdtrit(n - 1, (1 + confidence) / 2))
    mean, half = statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def verdict(values: Sequence[float]) -> str:
    """ "lower", "higher" or "within noise": on which side of zero the whole 95% interval of paired differences lies."""
    _, low, high = interval(values)
    return "lower" if high < 0 else "higher" if low > 0 else "within noise"


def equivalent(values: Sequence[float], margin: float) -> bool:
    """Whether the whole 90% interval of paired differences lies within ±margin: two one-sided tests at 5%.

    That no difference was found is not this: the margin is to be stated before.
    """
    _, low, high = interval(values, 0.9)
    return -margin < low and high < margin


def chance(
    values: Sequence[float], holds: Callable[[Sequence[float]], bool] | None = None
) -> float:
    """How often a rule about paired differences would be passed if the two methods were one: the share of the 2ⁿ ways to
    swap their labels within pairs, that is to turn signs, under which it holds. Exact.

    Args:
        holds: the rule, a function of n differences, such as `lambda d: verdict(d) == "lower"` or `lambda d: max(d) < 0`.
            By default: a mean as far from zero as the mean of `values`, on either side.

    Five pairs have 32 ways: a rule that only the values as they are pass has chance 1/32, about 0.03; on either side 1/16.

    Raises:
        ValueError: no values, more than 20, or one that is not finite.
    """
    if not 1 <= len(values) <= 20:
        raise ValueError(f"{len(values)} values: signs are turned one by one for 1 to 20 of them")
    check_finite(values)
    if holds is None:
        least = abs(math.fsum(values)) * (
            1 - 1e-12
        )  # sums of turned signs are equal up to rounding
        holds = lambda turned: abs(math.fsum(turned)) >= least  # noqa: E731
    ways = itertools.product((1, -1), repeat=len(values))
    passed = sum(holds([s * v for s, v in zip(signs, values, strict=True)]) for signs in ways)
    return passed / 2 ** len(values)


def chance_of_labels(
    first: Sequence[float],
    second: Sequence[float],
    statistic: Callable[[Sequence[float], Sequence[float]], float] | None = None,
) -> float:
    """For groups that are not paired: the share of all ways to deal the values into groups of these sizes whose statistic is
    at least that of `first` and `second`. Exact.

    statistic: of two groups, large where they differ as claimed; by default the distance of their means.

    Raises:
        ValueError: an empty group, more than about a million ways, or a value that is not finite.
    """
    if statistic is None:
        statistic = lambda a, b: abs(statistics.fmean(a) - statistics.fmean(b))  # noqa: E731
    pool, size = [*first, *second], len(first)
    ways = math.comb(len(pool), size)
    if not first or not second or ways > MOST:
        raise ValueError(
            f"groups of {size} and {len(second)} can be dealt in {ways} ways: 1 to {MOST} are counted, with no group empty"
        )
    check_finite(pool)
    seen = statistic(first, second)
    least, passed = seen - 1e-12 * abs(seen), 0
    for chosen in itertools.combinations(range(len(pool)), size):
        inside = set(chosen)
        a = [pool[i] for i in chosen]
        b = [value for i, value in enumerate(pool) if i not in inside]
        passed += statistic(a, b) >= least
    return passed / ways


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other point beats: none is as low or lower in both and lower in one. By the first number.

    Raises ValueError for a number that is not finite.
    """
    check_finite(itertools.chain(*points.values()))

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])
