"""Exercise 5.1-b: the front that every seed confirms."""

import statistics

from lora_course.classroom.exercises import Draw, case, exercise


def beats(q, p):
    """With every seed nowhere worse, and in one of the numbers better with every seed."""
    pairs = list(zip(q, p, strict=True))
    nowhere_worse = all(a[j] <= b[j] for a, b in pairs for j in (0, 1))
    return nowhere_worse and any(all(a[j] < b[j] for a, b in pairs) for j in (0, 1))


def _front(beats):
    return lambda points: {
        n for n, p in points.items() if not any(beats(q, p) for q in points.values())
    }


def _single(a, b):
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def _of_means(q, p):
    return _single(
        *(tuple(round(statistics.fmean(x[j] for x in s), 9) for j in (0, 1)) for s in (q, p))
    )


def _each(q, p):
    return [_single(a, b) for a, b in zip(q, p, strict=True)]


FRONT_MISTAKES = {
    "This is the front of the means. A method is dropped only if another beats it with every seed.": _front(_of_means),
    "You look at the first seed only.": _front(lambda q, p: _single(q[0], p[0])),
    "You compare the best seed of each method.": _front(lambda q, p: _single(min(q), min(p))),
    "It is enough for you that most seeds say so; all have to.": _front(lambda q, p: sum(_each(q, p)) > len(p) / 2),
    "It is enough for you that one seed says so; all have to.": _front(lambda q, p: any(_each(q, p))),
    "Which of the numbers is better changes from seed to seed; it has to be one and the same.":
        _front(lambda q, p: all(_each(q, p))),
    "Better with one seed is enough for you; it has to be better in that number with every seed.":
        _front(lambda q, p: all(a[j] <= b[j] for a, b in zip(q, p, strict=True) for j in (0, 1)) and q != p),
    "You ask for better in both numbers; nowhere worse, and better in one, is enough.":
        _front(lambda q, p: all(a[j] < b[j] for a, b in zip(q, p, strict=True) for j in (0, 1))),
    "Equal methods drop each other: to beat, one has to be better in one number.":
        lambda points: {n for n, p in points.items() if not any(
            all(a[j] <= b[j] for a, b in zip(q, p, strict=True) for j in (0, 1)) for m, q in points.items() if m != n)},
    "This is the front where more is better: here bits and bytes are to be small.": _front(lambda q, p: beats(p, q)),
    "These are the methods that another one beats.":
        lambda points: {n for n, p in points.items() if any(beats(q, p) for q in points.values())},
    "The first number alone decides for you.":
        _front(lambda q, p: all(a[0] < b[0] for a, b in zip(q, p, strict=True))),
    "The second number alone decides for you.":
        _front(lambda q, p: all(a[1] < b[1] for a, b in zip(q, p, strict=True))),
}  # fmt: skip


@exercise(
    "5.1-b",
    points=2,
    right=_front(beats),
    mistakes=FRONT_MISTAKES,
    otherwise="A method is missing that none beats with every seed, or one is left that another does beat.",
)
def check_sure_front(draw: Draw):
    """Methods by name, a pair of numbers a seed; equal ones and such that are equal in one number among them."""
    equal = "Where methods are equal, or equal in one number, it goes wrong."
    yield case({"lora": [(2, 3), (2, 4)], "dora": [(1, 3), (1, 4)], "gates": [(3, 1), (4, 2)]})
    yield case(
        {"lora": [(2, 3), (3, 3)], "dora": [(1, 3), (3, 2)], "twin": [(2, 3), (3, 3)]}, hint=equal
    )
    yield case(
        {"lora": [(2, 3), (3, 3)], "dora": [(2, 3), (2, 3)], "mask": [(4, 3), (5, 3)]}, hint=equal
    )
    yield case({"lora": [(1, 5), (1, 5), (9, 1)], "dora": [(2, 6), (2, 6), (1, 2)]})
    yield case({"alone": [(1.0, 2.0), (1.5, 1.0)]}, hint="With a single method it goes wrong.")
    for number in range(14):
        seeds, names = draw.integer(2, 4), draw.random.sample("abcdefgh", draw.integer(4, 7))
        points = {}
        for name in names:
            at = draw.integer(2, 6), draw.integer(2, 6)
            noise = [(draw.integer(-1, 1), draw.integer(-1, 1)) for _ in range(seeds)]
            points[name] = [(at[0] + a, at[1] + b) for a, b in noise]
            if (
                points and draw.integer(0, 2) == 0
            ):  # nowhere worse than another one, and perhaps better
                old = points[draw.choice(list(points))]
                points[name] = [(x - draw.integer(0, 1), y - draw.integer(0, 1)) for x, y in old]
        if number % 2:
            points[names[-1]] = list(points[names[0]])
        unit = draw.choice([1, 2**-12])  # small differences count as large ones do
        points = {name: [(x * unit, y * unit) for x, y in p] for name, p in points.items()}
        yield case(points, hint=equal if number % 2 else "")
