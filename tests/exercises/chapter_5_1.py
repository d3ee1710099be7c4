"""Wrong and right answers to the exercises of chapter 5.1."""

import functools
import itertools
import math
import statistics

import numpy as np
import torch
from scipy import optimize, stats

from lora_course.classroom.chapter_5_1 import (
    check_equal_rank,
    check_fair_differences,
    check_seeds_needed,
    check_sure_front,
)
from lora_course.lab.evidence import interval, pareto
from tests.exercises import Answers

needed = Answers(check_seeds_needed)
# Who does not pair tries thousands of numbers of seeds, each answer the same ones.
student = functools.cache(stats.t.ppf)


def paired(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def least(s, margin, t=lambda n: student(0.975, n - 1), start=2):
    return next(n for n in itertools.count(start) if t(n) * s / n**0.5 <= margin)


def from_deviation(s):
    return lambda a, b, margin: least(s(a, b), margin)


def differences(a, b):
    return statistics.stdev(paired(a, b))


def with_t(t):
    return lambda a, b, margin: least(differences(a, b), margin, t)


def without_end(a, b, margin):
    """Normal quantile, in one step."""
    return max(2, math.ceil((1.96 * differences(a, b) / margin) ** 2))


needed.wrong(
    "independent",
    from_deviation(lambda a, b: math.sqrt(statistics.variance(a) + statistics.variance(b))),
)
needed.wrong("pooled", from_deviation(lambda a, b: statistics.stdev([*a, *b])))
needed.wrong("the method's own", from_deviation(lambda a, b: statistics.stdev(a)))
needed.wrong("the reference's own", from_deviation(lambda a, b: statistics.stdev(b)))
needed.wrong("divided by n", from_deviation(lambda a, b: statistics.pstdev(paired(a, b))))
needed.wrong("the variance", from_deviation(lambda a, b: statistics.variance(paired(a, b))))
needed.wrong("the standard error", from_deviation(lambda a, b: differences(a, b) / len(a) ** 0.5))
needed.wrong("the mean", from_deviation(lambda a, b: abs(statistics.fmean(paired(a, b)))))
needed.wrong("the range", from_deviation(lambda a, b: max(paired(a, b)) - min(paired(a, b))))
needed.wrong("1.96", with_t(lambda n: 1.96))
needed.wrong("1.96, in one step", without_end)
needed.wrong("2.776", with_t(lambda n: 2.776))
needed.wrong("2", with_t(lambda n: 2))
needed.wrong(
    "the pilot's freedom",
    lambda a, b, margin: least(differences(a, b), margin, lambda n: student(0.975, len(a) - 1)),
)
needed.wrong("n degrees", with_t(lambda n: student(0.975, n)))
needed.wrong("n − 2 degrees", with_t(lambda n: student(0.975, n - 2) if n > 2 else math.inf))
needed.wrong("90%", with_t(lambda n: student(0.95, n - 1)))
needed.wrong("99%", with_t(lambda n: student(0.995, n - 1)))
needed.wrong("the whole width", with_t(lambda n: 2 * student(0.975, n - 1)))
needed.wrong("half the half", with_t(lambda n: student(0.975, n - 1) / 2))
needed.wrong("one more", lambda a, b, margin: from_deviation(differences)(a, b, margin) + 1)
needed.wrong(
    "one fewer", lambda a, b, margin: max(2, from_deviation(differences)(a, b, margin) - 1)
)
needed.wrong(
    "still to run", lambda a, b, margin: max(0, from_deviation(differences)(a, b, margin) - len(a))
)
needed.wrong(
    "not less than the pilot",
    lambda a, b, margin: max(len(a), from_deviation(differences)(a, b, margin)),
)
needed.wrong(
    "from 1",
    lambda a, b, margin: (
        1 if differences(a, b) < 1e-9 else from_deviation(differences)(a, b, margin)
    ),
)
needed.wrong("from 3", lambda a, b, margin: max(3, from_deviation(differences)(a, b, margin)))
needed.wrong(
    "in steps of five", lambda a, b, margin: -(-from_deviation(differences)(a, b, margin) // 5) * 5
)
needed.wrong("up to 20", lambda a, b, margin: min(20, from_deviation(differences)(a, b, margin)))
needed.wrong(
    "until the interval leaves zero",
    lambda a, b, margin: least(differences(a, b), abs(statistics.fmean(paired(a, b)))),
)
needed.wrong(
    "n, not √n",
    lambda a, b, margin: next(
        n for n in range(2, 10**4) if student(0.975, n - 1) * differences(a, b) / n <= margin
    ),
)
needed.wrong(
    "the half width",
    lambda a, b, margin: interval(paired(a, b))[2] - statistics.fmean(paired(a, b)),
)


@needed.wrong("sorts the caller's scores")
def _(a, b, margin):
    answer = from_deviation(differences)(a, b, margin)
    a.sort()
    return answer


needed.right("as the solution", from_deviation(differences))
needed.right(
    "by name only",
    lambda *, method, reference, margin: from_deviation(differences)(method, reference, margin),
)
needed.right("numpy's deviation", from_deviation(lambda a, b: np.std(np.subtract(a, b), ddof=1)))
needed.right(
    "a numpy number", lambda a, b, margin: np.int64(from_deviation(differences)(a, b, margin))
)
needed.right(
    "torch's deviation",
    from_deviation(
        lambda a, b: float(
            (torch.tensor(a, dtype=torch.double) - torch.tensor(b, dtype=torch.double)).std()
        )
    ),
)


@needed.right("the interval of scipy")
def _(a, b, margin):
    s = differences(a, b)
    if s < 1e-9:
        return 2
    n = 2
    while stats.t.interval(0.95, n - 1, scale=s / math.sqrt(n))[1] > margin:
        n += 1
    return n


@needed.right("the package's interval of values made for it")
def _(a, b, margin):
    s = differences(a, b)
    for n in itertools.count(2):
        t = interval([-1.0, 1.0] * (n // 2) + [0.0] * (n % 2))
        values = [-1.0, 1.0] * (n // 2) + [0.0] * (n % 2)
        if t[2] * s / statistics.stdev(values) <= margin:
            return n


@needed.right("by bisection")
def _(a, b, margin):
    s = differences(a, b)
    width = lambda n: student(0.975, n - 1) * s / math.sqrt(n) - margin  # noqa: E731
    return 2 if width(2) <= 0 else math.ceil(optimize.brentq(width, 2, 10**6))


needed.equivalent(
    "stats.t.ppf(0.975, n - 1) * deviation / n ** 0.5 > margin → "
    "stats.t.ppf(0.975, n - 1) * deviation / n ** 0.5 >= margin",
    "no width is exactly the margin",
)
needed.equivalent("m - r → r - m", "the deviation is the same")
needed.equivalent("zip(method, reference) → zip(reference, method)", "the deviation is the same")


sure = Answers(check_sure_front)


def front(beats):
    return lambda P: [n for n, p in P.items() if not any(beats(q, p) for q in P.values())]


def all_le(q, p):
    return all(a[j] <= b[j] for a, b in zip(q, p, strict=True) for j in (0, 1))


def all_lt(q, p, j):
    return all(a[j] < b[j] for a, b in zip(q, p, strict=True))


def beats(q, p):
    return all_le(q, p) and (all_lt(q, p, 0) or all_lt(q, p, 1))


def one(a, b):
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def means(s):
    return tuple(sum(x[j] for x in s) / len(s) for j in (0, 1))


sure.wrong("the package's on means", lambda P: pareto({n: means(p) for n, p in P.items()}))
sure.wrong("the package's on the first seed", lambda P: pareto({n: p[0] for n, p in P.items()}))
sure.wrong("the package's on the best seed", lambda P: pareto({n: min(p) for n, p in P.items()}))
sure.wrong(
    "the package's on the least of each",
    lambda P: pareto({n: tuple(map(min, zip(*p, strict=True))) for n, p in P.items()}),
)
sure.wrong(
    "the package's on medians",
    lambda P: pareto(
        {n: tuple(map(statistics.median, zip(*p, strict=True))) for n, p in P.items()}
    ),
)
sure.wrong(
    "fronts of all seeds together",
    lambda P: list(
        {
            n
            for s in range(len(next(iter(P.values()))))
            for n in pareto({m: p[s] for m, p in P.items()})
        }
    ),
)
sure.wrong(
    "on the front with every seed",
    lambda P: [
        n for n in P if all(n in pareto({m: p[s] for m, p in P.items()}) for s in range(len(P[n])))
    ],
)
sure.wrong("any seed", front(lambda q, p: any(one(a, b) for a, b in zip(q, p, strict=True))))
sure.wrong(
    "most seeds", front(lambda q, p: sum(one(a, b) for a, b in zip(q, p, strict=True)) > len(p) / 2)
)
sure.wrong(
    "with every seed in some number",
    front(lambda q, p: all(one(a, b) for a, b in zip(q, p, strict=True))),
)
sure.wrong("better with one seed", front(lambda q, p: all_le(q, p) and q != p))
sure.wrong("better in both", front(lambda q, p: all_lt(q, p, 0) and all_lt(q, p, 1)))
sure.wrong(
    "equal ones drop each other",
    lambda P: [n for n, p in P.items() if not any(all_le(q, p) for m, q in P.items() if m != n)],
)
sure.wrong("all beat themselves", front(all_le))
sure.wrong(
    "better in one, whatever the other", front(lambda q, p: all_lt(q, p, 0) or all_lt(q, p, 1))
)
sure.wrong("the first number", front(lambda q, p: all_lt(q, p, 0)))
sure.wrong("the second number", front(lambda q, p: all_lt(q, p, 1)))
sure.wrong(
    "the first better, the second not worse", front(lambda q, p: all_le(q, p) and all_lt(q, p, 0))
)
sure.wrong(
    "the second better, the first not worse", front(lambda q, p: all_le(q, p) and all_lt(q, p, 1))
)
sure.wrong("more is better", front(lambda q, p: beats(p, q)))
sure.wrong(
    "more is better in the second",
    front(lambda q, p: beats([(a, -b) for a, b in q], [(a, -b) for a, b in p])),
)
sure.wrong("the beaten", lambda P: [n for n in P if n not in front(beats)(P)])
sure.wrong("all", list)
sure.wrong("none", lambda P: [])
sure.wrong("names twice", lambda P: front(beats)(P) * 2)
sure.wrong("one of equals", lambda P: list({str(P[n]): n for n in front(beats)(P)}.values()))
sure.wrong("points", lambda P: [P[n] for n in front(beats)(P)])
sure.wrong("a string", lambda P: ",".join(front(beats)(P)))
sure.wrong(
    "the worst against the best",
    front(
        lambda q, p: (
            max(a[0] for a in q) <= min(a[0] for a in p)
            and max(a[1] for a in q) <= min(a[1] for a in p)
            and q != p
        )
    ),
)
sure.wrong("unpaired seeds", front(lambda q, p: beats(sorted(q), sorted(p))))
sure.wrong("the best sum", lambda P: [min(P, key=lambda n: sum(means(P[n])))])


@sure.wrong("takes the beaten out of the caller's dictionary")
def _(P):
    for name in set(P) - set(front(beats)(P)):
        del P[name]
    return list(P)


sure.right("as the solution", front(beats))
sure.right("a set", lambda points: set(front(beats)(points)))
sure.right("a generator", lambda points: (n for n in front(beats)(points)))
sure.right("a tuple", lambda points: tuple(front(beats)(points)))
sure.right("numpy's names", lambda points: np.array(front(beats)(points)))
sure.right("a dictionary", lambda points: {n: points[n] for n in front(beats)(points)})


@sure.right("numpy")
def _(points):
    names, X = list(points), np.array(list(points.values()))  # methods, seeds, two
    d = X[:, None] - X[None]
    beaten = ((d <= 0).all((2, 3)) & (d < 0).all(2).any(-1)).any(0)
    return [n for n, b in zip(names, beaten, strict=True) if not b]


@sure.right("one after the other is taken away")
def _(points):
    left = dict(points)
    for p in points.values():
        for name in [n for n, q in left.items() if beats(p, q)]:
            del left[name]
    return left.keys()


same = Answers(check_equal_rank)


def extra(shapes):
    return sum(out for out, _ in shapes)


def each(shapes):
    return sum(out + inner for out, inner in shapes)


def rank(shapes, parameters, dora):
    return max(0, (parameters - (extra(shapes) if dora else 0)) // each(shapes))


same.wrong("no magnitudes", lambda shapes, n, dora: rank(shapes, n, False))
same.wrong("always magnitudes", lambda shapes, n, dora: rank(shapes, n, True))
same.wrong("turned round", lambda shapes, n, dora: rank(shapes, n, not dora))
same.wrong(
    "magnitudes of inputs",
    lambda shapes, n, dora: rank(shapes, n - dora * sum(i for _, i in shapes), False),
)
same.wrong(
    "one magnitude a layer", lambda shapes, n, dora: rank(shapes, n - dora * len(shapes), False)
)
same.wrong(
    "magnitudes a rank", lambda shapes, n, dora: max(0, n // (each(shapes) + dora * extra(shapes)))
)
same.wrong(
    "magnitudes added", lambda shapes, n, dora: rank(shapes, n + dora * extra(shapes), False)
)
same.wrong("the full matrices", lambda shapes, n, dora: n // sum(o * i for o, i in shapes))
same.wrong(
    "outputs only",
    lambda shapes, n, dora: max(0, (n - dora * extra(shapes)) // sum(o for o, _ in shapes)),
)
same.wrong("the first layer", lambda shapes, n, dora: rank(shapes[:1], n, dora))
same.wrong(
    "the largest layer", lambda shapes, n, dora: rank([max(shapes, key=sum)] * len(shapes), n, dora)
)
same.wrong("layers of one shape once", lambda shapes, n, dora: rank(list(set(shapes)), n, dora))
same.wrong("shared out", lambda shapes, n, dora: rank(shapes, n, dora) // len(shapes))
same.wrong(
    "a rank a layer", lambda shapes, n, dora: [rank([s], n // len(shapes), dora) for s in shapes]
)
same.wrong(
    "rounded", lambda shapes, n, dora: max(0, round((n - dora * extra(shapes)) / each(shapes)))
)
same.wrong(
    "rounded up",
    lambda shapes, n, dora: max(0, math.ceil((n - dora * extra(shapes)) / each(shapes))),
)
same.wrong("less than", lambda shapes, n, dora: rank(shapes, n - 1, dora))
same.wrong("one more", lambda shapes, n, dora: rank(shapes, n, dora) + 1)
same.wrong("one less", lambda shapes, n, dora: max(0, rank(shapes, n, dora) - 1))
same.wrong("at least 1", lambda shapes, n, dora: max(1, rank(shapes, n, dora)))
same.wrong("negative", lambda shapes, n, dora: (n - dora * extra(shapes)) // each(shapes))
same.wrong(
    "cut towards zero from below",
    lambda shapes, n, dora: (
        int((n - dora * extra(shapes)) / each(shapes)) - (n < dora * extra(shapes))
    ),
)
same.wrong("a float", lambda shapes, n, dora: float(rank(shapes, n, dora)))
same.wrong("undivided", lambda shapes, n, dora: (n - dora * extra(shapes)) / each(shapes))
same.wrong(
    "powers of two", lambda shapes, n, dora: 2 ** int(math.log2(max(1, rank(shapes, n, dora))))
)
same.wrong("8", lambda shapes, n, dora: 8)
same.wrong("up to 16", lambda shapes, n, dora: min(16, rank(shapes, n, dora)))
same.wrong("the parameters", lambda shapes, n, dora: rank(shapes, n, dora) * each(shapes))


@same.wrong("empties the caller's list")
def _(shapes, n, dora):
    answer = rank(shapes, n, dora)
    shapes.clear()
    return answer


same.right("as the solution", rank)
same.right("numpy's", lambda shapes, n, dora: np.int64(rank(shapes, n, dora)))
same.right("a tensor", lambda shapes, n, dora: torch.tensor(rank(shapes, n, dora)))
same.right(
    "through floats",
    lambda shapes, n, dora: max(0, math.floor((n - dora * extra(shapes)) / each(shapes))),
)
same.right("by name only", lambda *, shapes, parameters, dora: rank(shapes, parameters, dora))


@same.right("counting up")
def _(shapes, parameters, dora):
    r = 0
    while sum((r + 1) * (o + i) + (o if dora else 0) for o, i in shapes) <= parameters:
        r += 1
    return r


@same.right("numpy")
def _(shapes, parameters, dora):
    outputs, inputs = np.array(shapes).T
    return int(max(0, (parameters - dora * outputs.sum()) // (outputs + inputs).sum()))


fair = Answers(check_fair_differences)
NAN = math.nan


def mean(scores):
    scores = list(scores)
    return math.inf if any(map(math.isnan, scores)) else sum(scores) / len(scores)


def choose(rates, by=0, over=mean, order=sorted):
    return min(order(rates), key=lambda rate: over(s[by] for s in rates[rate].values()))


def compare(runs, method, reference, choose=choose, part=1, rates=None):
    rates = rates or [choose(runs[arm]) for arm in (method, reference)]
    a, b = (runs[arm][rate] for arm, rate in zip((method, reference), rates, strict=True))
    return [a[seed][part] - b[seed][part] for seed in sorted(a) if seed in b]


def chosen_by(**other):
    return lambda runs, m, r: compare(runs, m, r, choose=lambda rates: choose(rates, **other))


def best_runs(runs, m, r):
    return runs[m][choose(runs[m])], runs[r][choose(runs[r])]


def snippet(runs, method, reference):
    def scores(arm):
        rates = runs[arm]
        best = min(rates, key=lambda rate: min(test for _, test in rates[rate].values()))
        return [test for _, test in rates[best].values()]

    return [m - r for m, r in zip(scores(method), scores(reference), strict=False)]


def finite(scores):
    return statistics.fmean(s for s in scores if not math.isnan(s))


fair.wrong("the snippet", snippet)
fair.wrong("by test", chosen_by(by=1))
fair.wrong(
    "by the luckiest seed",
    chosen_by(over=lambda s: min(math.inf if math.isnan(x) else x for x in s)),
)
fair.wrong(
    "by the unluckiest seed",
    chosen_by(over=lambda s: max(math.inf if math.isnan(x) else x for x in s)),
)
fair.wrong(
    "by the median",
    chosen_by(over=lambda s: statistics.median(math.inf if math.isnan(x) else x for x in s)),
)
fair.wrong(
    "by the sum",
    chosen_by(over=lambda s: (lambda s: math.inf if any(map(math.isnan, s)) else sum(s))(list(s))),
)
fair.wrong("by the first seed", chosen_by(over=lambda s: next(iter(s))))
fair.wrong("without diverged runs", chosen_by(over=finite))
fair.wrong(
    "NaN as zero", chosen_by(over=lambda s: statistics.fmean(0 if math.isnan(x) else x for x in s))
)
fair.wrong("NaN compared", chosen_by(over=lambda s: statistics.fmean(s), order=list))
fair.wrong(
    "NaN compared, sorted rates",
    chosen_by(
        over=lambda s: statistics.fmean(s),
        order=lambda rates: sorted(
            rates, key=lambda rate: -any(math.isnan(s[0]) for s in rates[rate].values())
        ),
    ),
)
fair.wrong("the larger of equals", chosen_by(order=lambda rates: sorted(rates, reverse=True)))
fair.wrong("the first of equals", chosen_by(order=list))
fair.wrong("the last of equals", chosen_by(order=lambda rates: list(rates)[::-1]))
fair.wrong(
    "the worst rate",
    lambda runs, m, r: compare(
        runs,
        m,
        r,
        choose=lambda rates: max(
            rates,
            key=lambda x: (
                -math.inf
                if math.isinf(mean(s[0] for s in rates[x].values()))
                else mean(s[0] for s in rates[x].values())
            ),
        ),
    ),
)
fair.wrong("the smallest rate", lambda runs, m, r: compare(runs, m, r, choose=min))
fair.wrong(
    "the reference's rate for both",
    lambda runs, m, r: compare(runs, m, r, rates=[choose(runs[r])] * 2),
)
fair.wrong(
    "the method's rate for both",
    lambda runs, m, r: compare(runs, m, r, rates=[choose(runs[m])] * 2),
)
fair.wrong("validation scores", lambda runs, m, r: compare(runs, m, r, part=0))
fair.wrong("sign", lambda runs, m, r: [-d for d in compare(runs, m, r)])
fair.wrong("sorted differences", lambda runs, m, r: sorted(compare(runs, m, r)))
fair.wrong(
    "sorted scores",
    lambda runs, m, r: [
        x - y
        for x, y in zip(
            *(sorted(s[1] for s in a.values()) for a in best_runs(runs, m, r)), strict=False
        )
    ],
)
fair.wrong(
    "as they lie",
    lambda runs, m, r: [
        x[1] - y[1] for x, y in zip(*(a.values() for a in best_runs(runs, m, r)), strict=False)
    ],
)
fair.wrong(
    "in the dictionary's order",
    lambda runs, m, r: (lambda a, b: [a[s][1] - b[s][1] for s in a if s in b])(
        *best_runs(runs, m, r)
    ),
)
fair.wrong(
    "sorted by seed, then zipped",
    lambda runs, m, r: (
        lambda a, b: [a[s][1] - b[t][1] for s, t in zip(sorted(a), sorted(b), strict=False)]
    )(*best_runs(runs, m, r)),
)
fair.wrong(
    "0 for a missing seed",
    lambda runs, m, r: (
        lambda a, b: [a.get(s, (0, 0))[1] - b.get(s, (0, 0))[1] for s in sorted({*a, *b})]
    )(*best_runs(runs, m, r)),
)
fair.wrong(
    "stops at a missing seed",
    lambda runs, m, r: (lambda a, b: [a[s][1] - b[s][1] for s in sorted({*a, *b})])(
        *best_runs(runs, m, r)
    ),
)
fair.wrong("the mean", lambda runs, m, r: statistics.fmean(compare(runs, m, r)))
fair.wrong(
    "by seed",
    lambda runs, m, r: (lambda a, b: {s: a[s][1] - b[s][1] for s in sorted(a) if s in b})(
        *best_runs(runs, m, r)
    ),
)
fair.wrong("against the first arm", lambda runs, m, r: compare(runs, m, next(iter(runs))))
fair.wrong(
    "seeds of all rates only",
    lambda runs, m, r: (lambda a, b: [a[s][1] - b[s][1] for s in sorted(a)[1:] if s in b])(
        *best_runs(runs, m, r)
    ),
)
fair.wrong(
    "a rate for each seed",
    lambda runs, m, r: [
        min(v[s][1] for v in runs[m].values() if s in v)
        - min(v[s][1] for v in runs[r].values() if s in v)
        for s in sorted(next(iter(runs[m].values())))
    ],
)


@fair.wrong("takes diverged rates out of the caller's record")
def _(runs, m, r):
    for rates in runs.values():
        for rate in [
            x for x, seeds in rates.items() if any(math.isnan(s[0]) for s in seeds.values())
        ]:
            del rates[rate]
    return compare(runs, m, r)


fair.right("as the solution", compare)
fair.right("a tuple", lambda runs, method, reference: tuple(compare(runs, method, reference)))
fair.right("an array", lambda runs, method, reference: np.array(compare(runs, method, reference)))
fair.right(
    "a tensor", lambda runs, method, reference: torch.tensor(compare(runs, method, reference))
)
fair.right("by name only", lambda *, runs, method, reference: compare(runs, method, reference))


@fair.right("numpy")
def _(runs, method, reference):
    arms = []
    for arm in (method, reference):
        rates = sorted(runs[arm])
        means = [np.mean([v for v, _ in runs[arm][rate].values()]) for rate in rates]
        arms.append(runs[arm][rates[int(np.nanargmin(means))]])
    a, b = arms
    return np.array([a[s][1] - b[s][1] for s in sorted(a.keys() & b.keys())])


@fair.right("pairs of mean and rate")
def _(runs, method, reference):
    def scores(arm):
        sound = [
            (math.fsum(v for v, _ in seeds.values()) / len(seeds), rate)
            for rate, seeds in runs[arm].items()
            if not any(v != v for v, _ in seeds.values())
        ]
        return {seed: test for seed, (_, test) in runs[arm][min(sound)[1]].items()}

    a, b = scores(method), scores(reference)
    return [a[seed] - b[seed] for seed in sorted(a) if seed in b]
