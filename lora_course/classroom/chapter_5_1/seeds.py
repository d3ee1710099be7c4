"""Exercise 5.1-a: how many seeds a difference needs."""

import math
import statistics

import numpy as np
from scipy import stats

from lora_course.classroom.exercises import Draw, case, exercise

ENOUGH = 10_000


def _of_differences(method, reference):
    return statistics.stdev(m - r for m, r in zip(method, reference, strict=True))


def _apart(method, reference):
    return math.sqrt(statistics.variance(method) + statistics.variance(reference))


def seeds_needed(
    method,
    reference,
    margin,
    *,
    deviation=_of_differences,
    quantile=0.975,
    freedom=-1,
    of=None,
    half=1.0,
):
    """The least n whose interval is narrow enough, with each part exchangeable for a mistake."""
    s, n = deviation(method, reference), np.arange(2, ENOUGH)
    degrees = n + freedom if of is None else of(len(method))
    t = stats.t.ppf(quantile, degrees) if np.all(degrees) else stats.norm.ppf(quantile)
    enough = half * t * s / np.sqrt(n) <= margin
    return int(n[enough.argmax()]) if enough.any() else ENOUGH


def _needed(**other):
    return lambda method, reference, margin: seeds_needed(method, reference, margin, **other)


SEED_MISTAKES = {
    "This is for independent values. The seeds are paired: take the deviation of the differences.": _needed(deviation=_apart),
    "The deviation divides by n; of a sample it divides by n − 1, or it comes out too small.":
        _needed(deviation=lambda m, r: statistics.pstdev(a - b for a, b in zip(m, r, strict=True))),
    "This is the deviation of the method's own scores; those of the differences count.":
        _needed(deviation=lambda m, r: statistics.stdev(m)),
    "The variance stands where the deviation belongs.": _needed(deviation=lambda m, r: _of_differences(m, r) ** 2),
    "The quantile is the normal one, 1.96; with few seeds it is Student's, which is larger.": _needed(of=lambda pilot: 0),
    "Student's quantile has the pilot's degrees of freedom; the new interval has n − 1.": _needed(of=lambda pilot: pilot - 1),
    "Student's quantile has n degrees of freedom here; they are n − 1.": _needed(freedom=0),
    "The quantile is for a 90% interval: a 95% one leaves 2.5% on each side.": _needed(quantile=0.95),
    "The whole interval is made as narrow as the margin; its half is asked for.": _needed(half=2.0),
    "This is the interval of a single difference; that of the mean is √n narrower.":
        _needed(deviation=lambda m, r: _of_differences(m, r) * math.sqrt(len(m))),
    "One seed too many: at the least n the half width is at most the margin.":
        lambda method, reference, margin: seeds_needed(method, reference, margin) + 1,
    "These are the seeds that are still to run; the number of all is asked for.":
        lambda method, reference, margin: max(0, seeds_needed(method, reference, margin) - len(method)),
}  # fmt: skip


def _pilot(draw: Draw, seeds: int, spread: float):
    """Scores of a method and a reference whose order by size differs: who sorts them breaks the pairs."""
    while True:
        both = [draw.number(2, 2 + spread) for _ in range(seeds)]
        method = [x + draw.number(-0.05, 0.05) for x in both]
        if spread == 1 or sorted(range(seeds), key=method.__getitem__) != sorted(
            range(seeds), key=both.__getitem__
        ):
            return method, both


@exercise(
    "5.1-a",
    right=seeds_needed,
    mistakes=SEED_MISTAKES,
    otherwise="The half width of the 95% interval of the paired differences is more than the margin there, or fewer seeds do.",
)
def check_seeds_needed(draw: Draw):
    """The number of seeds for an interval of a given half width; no width is nearly the margin."""
    for low, high, hint in [
        (6, 12, ""),
        (20, 60, "Where many seeds are needed it goes wrong."),
        (3, 5, "Where few seeds are needed it goes wrong."),
        (6, 20, ""),
        (2, 2, "Where two seeds are enough it goes wrong: an interval needs two."),
        (110, 150, "Where more than a hundred seeds are needed it goes wrong."),
    ]:
        seeds, n = draw.integer(3, 6), draw.integer(low, high)
        # more than a hundred pairs, and no thousands where somebody does not pair
        method, both = _pilot(draw, seeds, 1.0 if high < 100 else 0.1)
        s = _of_differences(method, both)
        width = lambda n: stats.t.ppf(0.975, n - 1) * s / math.sqrt(n)  # noqa: B023, E731
        share = draw.number(0.6, 0.9) if high < 6 else draw.number(0.2, 0.8)
        above = width(n - 1) if n > 2 else 2 * width(n)
        yield case(method, both, width(n) + share * (above - width(n)), hint=hint)
    same = [draw.number(2, 3) for _ in range(4)]
    shifted = [x + 0.5 for x in same]
    yield case(
        shifted,
        same,
        0.01,
        hint="Where all differences are equal it goes wrong: two seeds are enough.",
    )
