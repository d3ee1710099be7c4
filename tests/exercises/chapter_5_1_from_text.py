"""Answers to chapter 5.1's exercises by somebody who has read no more than the text and the stub."""

import itertools
import math
import statistics

import numpy as np
import torch
from scipy import stats

from tests.exercises.chapter_5_1 import fair, needed, same, student, sure


def planned(method, reference, margin, *, sd=None, t=None, first=2, reach=None, end=int):
    d = (
        sd(method, reference)
        if sd
        else statistics.stdev(a - b for a, b in zip(method, reference, strict=True))
    )
    t = t or (lambda n: student(0.975, n - 1))
    reach = reach or (lambda t, d, n: t * d / math.sqrt(n))
    n = first
    while reach(t(n), d, n) > margin and n < 10**5:
        n += 1
    return end(n)


def planning(**parts):
    return lambda *arguments: planned(*arguments, **parts)


needed.wrong("normal quantiles", planning(t=lambda n: 1.959964))
needed.wrong("2", planning(t=lambda n: 2.0))
needed.wrong("one side", planning(t=lambda n: student(0.95, n - 1)))
needed.wrong("n degrees", planning(t=lambda n: student(0.975, n)))
needed.wrong("2n - 2 degrees", planning(t=lambda n: student(0.975, 2 * n - 2)))
needed.wrong("99%", planning(t=lambda n: student(0.995, n - 1)))
needed.wrong(
    "the pilot's degrees",
    lambda m, r, g: planned(m, r, g, t=lambda n: student(0.975, len(m) - 1)),
)
needed.wrong(
    "the population's deviation",
    planning(sd=lambda m, r: statistics.pstdev(a - b for a, b in zip(m, r, strict=True))),
)
needed.wrong(
    "unpaired", planning(sd=lambda m, r: math.sqrt(statistics.variance(m) + statistics.variance(r)))
)
needed.wrong("the method's deviation", planning(sd=lambda m, r: statistics.stdev(m)))
needed.wrong(
    "the pooled deviation",
    planning(sd=lambda m, r: math.sqrt((statistics.variance(m) + statistics.variance(r)) / 2)),
)
needed.wrong(
    "the pilot's standard error",
    planning(
        sd=lambda m, r: statistics.stdev(a - b for a, b in zip(m, r, strict=True)) / len(m) ** 0.5
    ),
)
needed.wrong(
    "sorted pairs",
    planning(
        sd=lambda m, r: statistics.stdev(a - b for a, b in zip(sorted(m), sorted(r), strict=True))
    ),
)
needed.wrong("the whole width", lambda m, r, g: planned(m, r, g / 2))
needed.wrong("twice the margin", lambda m, r, g: planned(m, r, 2 * g))
needed.wrong("no root", planning(reach=lambda t, d, n: t * d / n))
needed.wrong("n - 1 under the root", planning(reach=lambda t, d, n: t * d / math.sqrt(n - 1)))
needed.wrong("two-sample", planning(reach=lambda t, d, n: t * d * math.sqrt(2 / n)))
needed.wrong("3 at least", planning(first=3))
needed.wrong("no fewer than the pilot", lambda m, r, g: planned(m, r, g, first=len(m)))
needed.wrong("less the pilot's", lambda m, r, g: max(2, planned(m, r, g) - len(m)))
needed.wrong("one more", planning(end=lambda n: n + 1))
needed.wrong("up to 100", lambda m, r, g: min(100, planned(m, r, g)))
needed.wrong("a text", planning(end=lambda n: f"{n} seeds"))
needed.wrong(
    "a fixed point of the formula",
    lambda m, r, g: (
        (d := statistics.stdev(a - b for a, b in zip(m, r, strict=True)))
        and max(
            2,
            math.ceil((student(0.975, max(1, math.ceil((1.96 * d / g) ** 2) - 1)) * d / g) ** 2),
        )
    ),
)


@needed.wrong("sorts the lists")
def _(method, reference, margin):
    found = planned(method, reference, margin)
    method.sort()
    return found


@needed.right("bisection")
def _(method, reference, margin):
    d = np.std(np.subtract(method, reference), ddof=1)

    def wide(n):
        return stats.t.isf(0.025, n - 1) * d / np.sqrt(n) > margin

    high = 2
    while wide(high):
        high *= 2
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wide(middle) else (low, middle)
    return high


needed.right(
    "scipy's interval",
    lambda m, r, g: next(
        n
        for n in itertools.count(2)
        if stats.t.interval(
            0.95, n - 1, scale=max(1e-300, np.std(np.array(m) - np.array(r), ddof=1)) / n**0.5
        )[1]
        <= g
    ),
)
needed.right(
    "many at once",
    lambda m, r, g: int(
        (n := np.arange(2, 20001))[
            np.argmax(
                stats.t.ppf(0.975, n - 1) * np.std(np.subtract(m, r), ddof=1) / np.sqrt(n) <= g
            )
        ]
    ),
)
needed.right(
    "torch's deviation, in double",
    lambda m, r, g: planned(
        m,
        r,
        g,
        sd=lambda m, r: float(
            (torch.tensor(m, dtype=torch.float64) - torch.tensor(r, dtype=torch.float64)).std()
        ),
    ),
)
needed.right(
    "from the normal's number upwards",
    lambda m, r, g: planned(
        m,
        r,
        g,
        first=max(
            2, int((1.9599 * statistics.stdev(a - b for a, b in zip(m, r, strict=True)) / g) ** 2)
        ),
    ),
)
needed.right(
    "by hand",
    planning(
        sd=lambda m, r: (
            lambda d: math.sqrt(sum((v - sum(d) / len(d)) ** 2 for v in d) / (len(d) - 1))
        )([a - b for a, b in zip(m, r, strict=True)])
    ),
)
needed.right("a numpy integer", planning(end=np.int64))


def unbeaten(points, beats):
    return [
        a for a, p in points.items() if not any(beats(q, p) for b, q in points.items() if b != a)
    ]


def front(beats):
    return lambda points: unbeaten(points, beats)


def never_worse(q, p):
    return all(a <= c and b <= d for (a, b), (c, d) in zip(q, p, strict=True))


def always_better(q, p, i):
    return all(a[i] < b[i] for a, b in zip(q, p, strict=True))


def means(p):
    return tuple(map(statistics.fmean, zip(*p, strict=True)))


sure.wrong(
    "the front of the means",
    front(lambda q, p: (m := means(q)) != (n := means(p)) and m[0] <= n[0] and m[1] <= n[1]),
)
sure.wrong("better somewhere", front(lambda q, p: never_worse(q, p) and q != p))
sure.wrong(
    "better in either at every seed",
    front(lambda q, p: never_worse(q, p) and all(a != b for a, b in zip(q, p, strict=True))),
)
sure.wrong("better in both", front(lambda q, p: always_better(q, p, 0) and always_better(q, p, 1)))
sure.wrong("never worse", front(never_worse))
sure.wrong(
    "the first number decides", front(lambda q, p: never_worse(q, p) and always_better(q, p, 0))
)
sure.wrong(
    "the second number decides", front(lambda q, p: never_worse(q, p) and always_better(q, p, 1))
)
sure.wrong(
    "better in one, whatever the other",
    front(lambda q, p: always_better(q, p, 0) or always_better(q, p, 1)),
)
sure.wrong(
    "with some seed",
    front(
        lambda q, p: any(
            a <= c and b <= d and (a, b) != (c, d) for (a, b), (c, d) in zip(q, p, strict=True)
        )
    ),
)
sure.wrong(
    "with most seeds",
    front(
        lambda q, p: (
            sum(a <= c and b <= d and (a, b) != (c, d) for (a, b), (c, d) in zip(q, p, strict=True))
            > len(p) / 2
        )
    ),
)
sure.wrong(
    "by the mean in one number",
    front(
        lambda q, p: never_worse(q, p) and (means(q)[0] < means(p)[0] or means(q)[1] < means(p)[1])
    ),
)
sure.wrong(
    "more is better",
    front(lambda q, p: never_worse(p, q) and (always_better(p, q, 0) or always_better(p, q, 1))),
)
sure.wrong(
    "the worst against the best",
    front(
        lambda q, p: (
            all(max(v[i] for v in q) <= min(v[i] for v in p) for i in (0, 1))
            and any(max(v[i] for v in q) < min(v[i] for v in p) for i in (0, 1))
        )
    ),
)
sure.wrong(
    "seeds sorted",
    front(
        lambda q, p: (
            never_worse(sorted(q), sorted(p))
            and (always_better(sorted(q), sorted(p), 0) or always_better(sorted(q), sorted(p), 1))
        )
    ),
)
sure.wrong(
    "the first seed",
    front(
        lambda q, p: (
            never_worse(q[:1], p[:1])
            and (always_better(q[:1], p[:1], 0) or always_better(q[:1], p[:1], 1))
        )
    ),
)
sure.wrong(
    "all but the last seed",
    front(
        lambda q, p: (
            never_worse(q, p)
            and len(p) > 1
            and any(always_better(q[:-1], p[:-1], i) for i in (0, 1))
        )
    ),
)
sure.wrong(
    "the beaten",
    lambda points: [
        n
        for n in points
        if n
        not in unbeaten(
            points, lambda q, p: never_worse(q, p) and any(always_better(q, p, i) for i in (0, 1))
        )
    ],
)
sure.wrong(
    "only the best in a number",
    lambda points: {min(points, key=lambda n: means(points[n])[i]) for i in (0, 1)},
)
sure.wrong(
    "the points",
    lambda points: [
        points[n]
        for n in unbeaten(
            points, lambda q, p: never_worse(q, p) and any(always_better(q, p, i) for i in (0, 1))
        )
    ],
)
sure.wrong(
    "one of equals",
    lambda points: list(
        {
            tuple(map(tuple, points[n])): n
            for n in unbeaten(
                points,
                lambda q, p: never_worse(q, p) and any(always_better(q, p, i) for i in (0, 1)),
            )
        }.values()
    ),
)
sure.wrong(
    "a tolerance",
    front(
        lambda q, p: (
            all(a <= c + 1e-2 and b <= d + 1e-2 for (a, b), (c, d) in zip(q, p, strict=True))
            and any(always_better(q, p, i) for i in (0, 1))
        )
    ),
)


@sure.wrong("takes the beaten out of the dictionary")
def _(points):
    for name in list(points):
        if name not in unbeaten(
            points, lambda q, p: never_worse(q, p) and any(always_better(q, p, i) for i in (0, 1))
        ):
            del points[name]
    return list(points)


sure.right(
    "the chapter's words",
    front(lambda q, p: never_worse(q, p) and (always_better(q, p, 0) or always_better(q, p, 1))),
)
sure.right(
    "arrays",
    lambda points: {
        a
        for a in points
        if not any(
            (d := np.array(points[b]) - np.array(points[a])).max() <= 0 and (d < 0).all(0).any()
            for b in points
        )
    },
)


@sure.right("removing one after another")
def _(points):
    left = dict(points)
    for a in points:
        for b in points:
            if never_worse(points[a], points[b]) and any(
                always_better(points[a], points[b], i) for i in (0, 1)
            ):
                left.pop(b, None)
    return left.keys()


@sure.right("a tensor of all pairs")
def _(points):
    x = torch.tensor([list(map(list, p)) for p in points.values()], dtype=torch.float64)
    gap = x[:, None] - x[None]
    beats = (gap <= 0).all(-1).all(-1) & (gap < 0).all(2).any(-1)
    return [n for n, beaten in zip(points, beats.any(0).tolist(), strict=True) if not beaten]


@sure.right("transposed, as a tuple")
def _(points):
    both = {n: list(zip(*p, strict=True)) for n, p in points.items()}

    def beats(a, b):
        return all(
            x <= y for u, v in zip(both[a], both[b], strict=True) for x, y in zip(u, v, strict=True)
        ) and any(
            all(x < y for x, y in zip(u, v, strict=True))
            for u, v in zip(both[a], both[b], strict=True)
        )

    return tuple(b for b in both if not any(beats(a, b) for a in both))


sure.right(
    "sorted names",
    lambda points: sorted(
        unbeaten(
            points, lambda q, p: never_worse(q, p) and any(always_better(q, p, i) for i in (0, 1))
        )
    ),
)
sure.right(
    "a generator",
    lambda points: (
        n
        for n in unbeaten(
            points, lambda q, p: never_worse(q, p) and any(always_better(q, p, i) for i in (0, 1))
        )
    ),
)


def fitting(shapes, n, dora, *, one=None, extra=None, end=None):
    each = sum(one(o, i) if one else o + i for o, i in shapes)
    more = extra(shapes, dora) if extra else sum(o for o, _ in shapes) * bool(dora)
    return end(n, more, each) if end else max(0, (n - more) // each)


def ranked(**parts):
    return lambda *arguments: fitting(*arguments, **parts)


same.wrong("no magnitudes", ranked(extra=lambda s, d: 0))
same.wrong("always magnitudes", ranked(extra=lambda s, d: sum(o for o, _ in s)))
same.wrong("a magnitude for each input", ranked(extra=lambda s, d: sum(i for _, i in s) * d))
same.wrong("one magnitude a layer", ranked(extra=lambda s, d: len(s) * d))
same.wrong("one layer's magnitudes", ranked(extra=lambda s, d: s[0][0] * d))
same.wrong("distinct layers", lambda s, n, d: fitting(sorted(set(map(tuple, s))), n, d))
same.wrong("outputs only", ranked(one=lambda o, i: o))
same.wrong("twice the inputs", ranked(one=lambda o, i: 2 * i))
same.wrong("the product", ranked(one=lambda o, i: o * i))
same.wrong(
    "magnitudes with each rank",
    lambda s, n, d: n // (sum(2 * o + i for o, i in s) if d else sum(o + i for o, i in s)),
)
same.wrong("rounded", ranked(end=lambda n, m, e: max(0, round((n - m) / e))))
same.wrong("rounded up", ranked(end=lambda n, m, e: max(0, -((m - n) // e))))
same.wrong("1 at least", ranked(end=lambda n, m, e: max(1, (n - m) // e)))
same.wrong("below zero", ranked(end=lambda n, m, e: (n - m) // e))
same.right(
    "cut toward zero, then its size, which is 0 where nothing fits",
    ranked(end=lambda n, m, e: abs(int((n - m) / e))),
)
same.wrong("fewer, not at most", ranked(end=lambda n, m, e: max(0, (n - m - 1) // e)))
same.wrong("a float", ranked(end=lambda n, m, e: max(0.0, float((n - m) // e))))
same.wrong(
    "the smallest of the layers' own",
    lambda s, n, d: max(0, min((n // len(s) - o * d) // (o + i) for o, i in s)),
)
same.wrong(
    "the first layer, times their number",
    lambda s, n, d: max(0, (n - s[0][0] * len(s) * d) // (sum(s[0]) * len(s))),
)
same.wrong("powers of two", lambda s, n, d: (r := fitting(s, n, d)) and 1 << (r.bit_length() - 1))
same.wrong(
    "up to 64",
    lambda s, n, d: next(
        (
            r
            for r in range(64, 0, -1)
            if r * sum(o + i for o, i in s) + d * sum(o for o, _ in s) <= n
        ),
        0,
    ),
)
same.wrong(
    "a power-of-two search",
    lambda s, n, d: next(
        (r - 1 for r in range(1, 9) if r * sum(o + i for o, i in s) + d * sum(o for o, _ in s) > n),
        8,
    ),
)


@same.wrong("uses the list up")
def _(shapes, parameters, dora):
    found = fitting(list(shapes), parameters, dora)
    shapes.pop()
    return found


same.right(
    "counting up",
    lambda s, n, d: next(
        r
        for r in itertools.count()
        if (r + 1) * sum(o + i for o, i in s) + d * sum(o for o, _ in s) > n
    ),
)
same.right("divmod", ranked(end=lambda n, m, e: divmod(n - m, e)[0] if n >= m else 0))
same.right(
    "numpy",
    lambda s, n, d: int(max(0, (n - int(np.array(s)[:, 0].sum()) * d) // int(np.array(s).sum()))),
)
same.right("a numpy integer", ranked(end=lambda n, m, e: np.maximum(0, np.int64((n - m) // e))))
same.right(
    "torch",
    lambda s, n, d: (
        torch.tensor(n - d * sum(o for o, _ in s))
        .div(torch.tensor(s).sum(), rounding_mode="floor")
        .clamp(min=0)
        .item()
    ),
)
same.right("math.floor", ranked(end=lambda n, m, e: max(0, math.floor((n - m) / e))))


@same.right("bisection")
def _(shapes, parameters, dora):
    def cost(r):
        return sum(r * (o + i) + (o if dora else 0) for o, i in shapes)

    low, high = 0, parameters + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= parameters else (low, middle)
    return low


def compared(runs, method, reference, *, pick=None, among=None, seeds=None, value=None, end=None):
    def chosen(arm):
        rates = {}
        for rate, of in runs[arm].items():
            v = [a for a, _ in of.values()]
            if not any(x != x for x in v):
                rates[rate] = statistics.fmean(v)
        if among:
            rates = among(runs, arm, rates)
        rate = pick(rates, runs[arm]) if pick else min(rates, key=lambda r: (rates[r], r))
        return {s: (value(pair) if value else pair[1]) for s, pair in runs[arm][rate].items()}

    a, b = chosen(method), chosen(reference)
    order = seeds(a, b) if seeds else sorted(a.keys() & b.keys())
    found = [a[s] - b[s] for s in order]
    return end(found) if end else found


def comparing(**parts):
    return lambda *arguments: compared(*arguments, **parts)


fair.wrong(
    "by the test scores",
    comparing(
        pick=lambda r, of: min(r, key=lambda k: (statistics.fmean(t for _, t in of[k].values()), k))
    ),
)
fair.wrong(
    "the best single run",
    comparing(pick=lambda r, of: min(r, key=lambda k: (min(v for v, _ in of[k].values()), k))),
)
fair.wrong(
    "the median",
    comparing(
        pick=lambda r, of: min(
            r, key=lambda k: (statistics.median(v for v, _ in of[k].values()), k)
        )
    ),
)
fair.wrong(
    "the sum",
    comparing(pick=lambda r, of: min(r, key=lambda k: (sum(v for v, _ in of[k].values()), k))),
)
fair.wrong(
    "the worst run",
    comparing(pick=lambda r, of: min(r, key=lambda k: (max(v for v, _ in of[k].values()), k))),
)
fair.wrong(
    "the larger of equal rates", comparing(pick=lambda r, of: min(r, key=lambda k: (r[k], -k)))
)
fair.wrong("the first of equal rates", comparing(pick=lambda r, of: min(r, key=r.get)))
fair.wrong("the highest score", comparing(pick=lambda r, of: max(r, key=lambda k: (r[k], -k))))
fair.wrong("the smallest rate", comparing(pick=lambda r, of: min(r)))
fair.wrong(
    "NaN runs left out of the mean",
    lambda runs, m, r: compared(
        {
            a: {k: {s: p for s, p in of.items() if p[0] == p[0]} for k, of in rs.items()}
            for a, rs in runs.items()
        },
        m,
        r,
    ),
)
fair.wrong("the validation scores", comparing(value=lambda p: p[0]))
fair.wrong("validation less test", comparing(value=lambda p: p[0] - p[1]))
fair.wrong("the reference first", lambda runs, m, r: compared(runs, r, m))
fair.wrong("absolute", comparing(end=lambda d: [abs(v) for v in d]))
fair.wrong("the mean", comparing(end=statistics.fmean))
fair.wrong("sorted differences", comparing(end=sorted))
fair.wrong("from the largest seed", comparing(end=lambda d: d[::-1]))
fair.wrong("seeds as they come", comparing(seeds=lambda a, b: [s for s in a if s in b]))
fair.wrong("seeds as text", comparing(seeds=lambda a, b: sorted(a.keys() & b.keys(), key=str)))
fair.wrong(
    "by position",
    lambda runs, m, r: (
        (lambda a, b: [x - y for x, y in zip(a, b, strict=False)])(
            *[
                list(
                    compared(runs, arm, arm, value=lambda p: p, end=None, seeds=lambda a, b: [])
                    or []
                )
                for arm in (m, r)
            ]
        )
        or compared(runs, m, r, seeds=lambda a, b: list(a)[: len(b)])
    ),
)
fair.wrong("all seeds of the method", comparing(seeds=lambda a, b: sorted(a)))
fair.wrong(
    "one rate for both",
    lambda runs, m, r: compared(
        runs,
        m,
        r,
        among=lambda runs, arm, rates: (
            {
                k: v
                for k, v in rates.items()
                if k
                == min(
                    (
                        k
                        for k in runs[r]
                        if k in runs[m] and all(v == v for v, _ in runs[r][k].values())
                    ),
                    key=lambda k: statistics.fmean(v for v, _ in runs[r][k].values()),
                )
            }
            or rates
        ),
    ),
)
fair.wrong(
    "only rates with the most seeds",
    comparing(
        among=lambda runs, arm, rates: (
            {
                k: v
                for k, v in rates.items()
                if len(runs[arm][k]) == max(len(of) for of in runs[arm].values())
            }
            or rates
        )
    ),
)
fair.wrong(
    "means over the common seeds",
    lambda runs, m, r: compared(
        runs,
        m,
        r,
        pick=lambda rates, of: min(
            rates,
            key=lambda k: (
                statistics.fmean(
                    [v for s, (v, _) in of[k].items() if all(s in o for o in of.values())]
                    or [math.inf]
                ),
                k,
            ),
        ),
    ),
)
fair.wrong("a dictionary", lambda runs, m, r: dict(enumerate(compared(runs, m, r))))
fair.wrong(
    "seeds of all rates",
    lambda runs, m, r: compared(
        runs,
        m,
        r,
        seeds=lambda a, b: sorted(
            s
            for s in a.keys() & b.keys()
            if all(s in of for arm in (m, r) for of in runs[arm].values())
        ),
    ),
)


@fair.wrong("drops the diverged from the record")
def _(runs, method, reference):
    for arm in runs:
        for rate in [k for k, of in runs[arm].items() if any(v != v for v, _ in of.values())]:
            del runs[arm][rate]
    return compared(runs, method, reference)


@fair.right("numpy")
def _(runs, method, reference):
    def at_best(arm):
        rates = sorted(runs[arm])
        means = np.array([np.mean([v for v, _ in runs[arm][rate].values()]) for rate in rates])
        return runs[arm][rates[int(np.nanargmin(means))]]

    a, b = at_best(method), at_best(reference)
    return np.array([a[s][1] - b[s][1] for s in sorted(set(a) & set(b))])


@fair.right("infinite where it diverged")
def _(runs, method, reference):
    def mean(of):
        m = sum(v for v, _ in of.values()) / len(of)
        return math.inf if math.isnan(m) else m

    best = {
        arm: min((mean(of), rate) for rate, of in runs[arm].items())[1]
        for arm in (method, reference)
    }
    a, b = runs[method][best[method]], runs[reference][best[reference]]
    return [a[s][1] - b[s][1] for s in sorted(a) if s in b]


@fair.right("statistics.mean, in exact fractions")
def _(runs, method, reference):
    def best(arm):
        good = [r for r, of in runs[arm].items() if all(math.isfinite(v) for v, _ in of.values())]
        return runs[arm][
            min(good, key=lambda r: (statistics.mean(v for v, _ in runs[arm][r].values()), r))
        ]

    a, b = best(method), best(reference)
    return [a[seed][1] - b[seed][1] for seed in sorted(a.keys() & b.keys())]


@fair.right("a loop that keeps the best")
def _(runs, method, reference):
    found = []
    for arm in (method, reference):
        best, kept = None, None
        for rate in sorted(runs[arm]):
            v = [pair[0] for pair in runs[arm][rate].values()]
            if any(math.isnan(x) for x in v):
                continue
            m = statistics.fmean(v)
            if best is None or m < best:
                best, kept = m, runs[arm][rate]
        found.append(kept)
    return [
        found[0][s][1] - found[1][s][1]
        for s in range(min(found[0]), max(found[0]) + 1)
        if s in found[0] and s in found[1]
    ]


@fair.right("pandas")
def _(runs, method, reference):
    import pandas as pd

    def at_best(arm):
        table = pd.DataFrame(
            [(r, s, v, t) for r, of in runs[arm].items() for s, (v, t) in of.items()],
            columns=["rate", "seed", "v", "t"],
        )
        means = table.groupby("rate").v.agg(lambda v: v.mean(skipna=False)).dropna().sort_index()
        return table[table.rate == means.idxmin()].set_index("seed").t

    return (at_best(method) - at_best(reference)).dropna().sort_index().tolist()


fair.right("a tuple of floats", lambda *a: tuple(float(v) for v in compared(*a)))
fair.right(
    "torch in double",
    lambda runs, m, r: (
        lambda a, b: [
            float(torch.tensor(a[s][1], dtype=torch.float64) - b[s][1])
            for s in sorted(set(a).intersection(b))
        ]
    )(
        *[
            of[
                min(
                    (
                        torch.tensor([v for v, _ in of[k].values()], dtype=torch.float64)
                        .mean()
                        .nan_to_num(nan=torch.inf)
                        .item(),
                        k,
                    )
                    for k in of
                )[1]
            ]
            for of in (runs[m], runs[r])
        ]
    ),
)
