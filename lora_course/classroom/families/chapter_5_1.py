"""Graded problems of chapter 5.1, the comparison: a difference of another kind, and a front to mend."""

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _difference_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [
        ([1.5, 2.0, 2.25, 4.0], [1.0, 2.5, 2.0, 3.0]),
        ([3.0, 1.0, 2.0, 5.0], [2.0, 2.0, 1.0, 2.5]),
    ]
    for seeds in (4, 5, 6, 7, 8):
        method = [round(draw.number(1, 4), 3) for _ in range(seeds)]
        reference = [round(draw.number(1, 4), 3) for _ in range(seeds)]
        made.append((method, reference))
    return made


difference = Family(
    id="5.1-difference",
    title="A difference and how sure it is",
    points=3,
    minutes=20,
    statement="""
    A method and a reference have a score for each seed, in the same order, four seeds or more. {pair} Return two numbers. The
    first is {centre}. The second is {spread}
    """,
    answer='''
    def difference(method, reference):
        """two lists of as many numbers → (centre, spread)"""
        d = sorted($pair for m, r in zip(method, reference))
        n = len(d)
        mean = sum(d) / n
        deviation = math.sqrt(sum((x - mean) ** 2 for x in d) / (n - 1))
        centre = $centre
        return centre, $spread
    ''',
    conventions={
        "pair": {
            "difference": ("For each seed take the method's score less the reference's.", "m - r"),
            "other way": ("For each seed take the reference's score less the method's.", "r - m"),
            "percent": ("For each seed take the method's score less the reference's, in percent of the reference's.", "100 * (m - r) / r"),
            "ratio": ("For each seed take the logarithm of the method's score divided by the reference's.", "math.log(m / r)"),
        },
        "centre": {
            "mean": ("the mean of these", "mean"),
            "median": ("the median of these (of an even number, the mean of the middle two)", "(d[(n - 1) // 2] + d[n // 2]) / 2"),
            "trimmed": ("the mean of these without the smallest and the largest", "sum(d[1:-1]) / (n - 2)"),
        },
        "spread": {
            "error": ("the standard error of their plain mean (deviation with $n - 1$, divided by $\\sqrt n$).", "deviation / math.sqrt(n)"),
            "range": ("half the distance from the smallest to the largest.", "(d[-1] - d[0]) / 2"),
            "leave out": (
                "the largest change, up or down, of their plain mean if one seed is left out.",
                "max(abs((mean * n - x) / (n - 1) - mean) for x in d)",
            ),
        },
    },
    book={"pair": "difference", "centre": "mean", "spread": "error"},
    cases=_difference_cases,
)  # fmt: skip


def _front_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [({"lora": (2.0, 3.0), "dora": (1.0, 4.0), "gates": (2.0, 4.0)}, 0.5)]
    made.append(({"lora": (1.0, 1.0), "dora": (1.0, 1.0), "gates": (3.0, 0.5)}, 0.25))
    for _ in range(40):
        names = [f"method{i}" for i in range(draw.integer(5, 8))]
        points = {name: (draw.integer(1, 8) / 4, draw.integer(1, 8) / 4) for name in names}
        points[names[-1]] = points[names[draw.integer(0, 2)]]
        made.append((points, draw.choice([0.25, 0.5])))
    return made


front = Family(
    id="5.1-front",
    title="Find the bug: the front",
    points=4,
    minutes=25,
    statement="""
    The function below was meant to list the methods that no other beats, and it lists others. It has two mistakes. Mend it; keep its name and
    arguments. It shall do this. {second} {beats} {equal} {order}
    """,
    answer='''
    def front(points, margin):
        """{name: (first, second)}, a number → list of names"""
        def beats(q, p):
            gains = (p[0] - q[0], $second)
            return min(gains) >= 0 and $beats

        found = []
        for name, p in points.items():
            beaten = any(beats(q, p) for q in points.values())
            if $equal:
                found.append(name)
        return $order
    ''',
    conventions={
        "second": {
            "less": ("Less is better in both numbers.", "p[1] - q[1]"),
            "more": ("In the first number less is better, in the second more.", "q[1] - p[1]"),
        },
        "beats": {
            "any": ("A point beats another if it is nowhere worse and somewhere better; `margin` plays no part.", "max(gains) > 0"),
            "margin": ("A point beats another if it is nowhere worse and somewhere better by `margin` or more.", "max(gains) >= margin"),
            "sum": ("A point beats another if it is nowhere worse, and its two gains together are more than `margin`.", "sum(gains) > margin"),
        },
        "equal": {
            "all": ("Of equal points all are listed that no other beats.", "not beaten"),
            "first": ("Of equal points only the first in `points` may be listed.", "not beaten and p not in [points[other] for other in found]"),
        },
        "order": {
            "given": ("The list keeps the order of `points`.", "found"),
            "sorted": ("The list is sorted by the first number, from less to more; of equals by the name.", "sorted(found, key=lambda name: (points[name][0], name))"),
            "reverse": ("The list has the reverse order of `points`.", "found[::-1]"),
        },
    },
    book={"second": "less", "beats": "any", "equal": "all", "order": "given"},
    cases=_front_cases,
    bugs=(
        ("min(gains) >= 0", "min(gains) > 0"),
        ("(p[0] - q[0], ", "(q[0] - p[0], "),
        ("if not beaten", "if beaten"),
        ("any(beats(q, p)", "all(beats(q, p)"),
        ("min(gains) >= 0 and", "min(gains) >= -margin and"),
    ),
)  # fmt: skip

FAMILIES = [difference, front]
