"""Checks of the exercises in chapter 5.1, the comparison."""

import math
import statistics

from lora_course.classroom.first_exercises import exercise, mistake
from lora_course.lab.evidence import pareto


@exercise("5.1-a", points=1)
def check_paired(learner):
    """`learner(method, reference)` → mean of the paired differences and its standard error; one value a seed in each list."""
    method, reference = [2.61, 2.74, 2.55, 2.70, 2.68], [2.60, 2.71, 2.57, 2.66, 2.67]
    differences = [a - b for a, b in zip(method, reference)]
    n, mean, deviation = len(method), statistics.fmean(differences), statistics.stdev(differences)
    answer = learner(list(method), list(reference))
    mistake(
        not isinstance(answer, tuple) or len(answer) != 2,
        "Two numbers are expected: the mean difference and its standard error.",
    )
    found, error = map(float, answer)
    close = lambda a, b: math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-9)  # noqa: E731
    mistake(
        close(found, -mean),
        "The sign is turned: a method that needs more bits than the reference has a positive difference.",
    )
    mistake(
        not close(found, mean),
        "The mean of the differences is {:.4f}; yours is {:.4f}.",
        mean,
        found,
    )
    apart = math.sqrt(statistics.variance(method) / n + statistics.variance(reference) / n)
    mistake(
        close(error, apart),
        "This is the error of a difference of two independent means: the seeds are paired, so take the deviation of the differences.",
    )
    mistake(
        close(error, deviation),
        "This is how much single differences scatter; their mean scatters √n less.",
    )
    mistake(close(error, deviation / n), "Divide by √n, not by n: the variance of a mean is σ²/n.")
    mistake(
        close(error, statistics.pstdev(differences) / math.sqrt(n)),
        "The deviation divides by n; with five values it has to divide by n − 1, or it comes out too small.",
    )
    mistake(
        not close(error, deviation / math.sqrt(n)),
        "The standard error is {:.5f}; yours is {:.5f}.",
        deviation / math.sqrt(n),
        error,
    )


@exercise("5.1-b", points=2)
def check_front(learner):
    """`learner(points)`, `{name: (x, y)}`, less is better in both → the names that no other point beats."""
    points = {
        "a": (1.0, 5.0),
        "b": (2.0, 3.0),
        "twin": (2.0, 3.0),
        "c": (2.0, 4.0),
        "d": (3.0, 3.0),
        "e": (4.0, 1.0),
        "f": (4.5, 1.5),
        "g": (3.0, 2.5),
    }
    expected = set(pareto(points))
    answer = learner(dict(points))
    mistake(
        isinstance(answer, str) or not hasattr(answer, "__iter__"),
        "A list or set of names is expected.",
    )
    found = set(answer)
    mistake(
        bool(found - set(points)),
        "{} is no name of a point.",
        sorted(map(str, found - set(points)))[:1],
    )
    mistake(
        found == set(pareto({name: (-x, -y) for name, (x, y) in points.items()})),
        "This is the front where more is better: here bits, bytes and seconds are to be small.",
    )
    mistake(
        found == {"a", "e"},
        "You keep what is best in one of the two. A point in between belongs to the front too, unless another one beats it in both.",
    )
    mistake(
        "b" not in found and "twin" not in found and {"a", "e", "g"} <= found,
        "b and twin are equal, and neither beats the other: to beat, a point has to be strictly better in at least one.",
    )
    mistake(
        bool(found & {"c", "d"}) and expected < found,
        "{} is kept, though a point that is equal in one number is better in the other.",
        sorted(found & {"c", "d"}),
    )
    mistake(
        bool(found - expected),
        "{} is beaten by another point in both numbers.",
        sorted(found - expected),
    )
    mistake(
        found != expected,
        "{} is missing: no point is as good in both and better in one.",
        sorted(expected - found),
    )


@exercise("5.1-c", points=2)
def check_rank(learner):
    """`learner(shapes, parameters, dora)` → the largest rank whose adapter has at most so many parameters; shapes are [(out, in), …]."""
    shapes = [(256, 256), (128, 256), (704, 256), (256, 704)]

    def cost(r: int, dora: bool) -> int:
        return sum(r * (out + inner) + (out if dora else 0) for out, inner in shapes)

    def right(parameters: int, dora: bool) -> int:
        return max(r for r in range(200) if cost(r, dora) <= parameters)

    budgets = [cost(8, False), cost(8, False) + cost(1, False) - 1, cost(5, True) + 10]
    for dora in (False, True):
        for budget in budgets:
            found = learner(list(shapes), budget, dora)
            expected = right(budget, dora)
            name = "DoRA" if dora else "LoRA"
            mistake(
                not isinstance(found, int), "A whole number is expected; you return {!r}.", found
            )
            mistake(found == expected and cost(found, dora) > budget, "Over the budget.")
            mistake(
                not dora
                and found != expected
                and found == max(1, budget // sum(out * inner for out, inner in shapes)),
                "A full update has out · in numbers; a rank of LoRA has out + in.",
            )
            mistake(
                not dora and found == expected + 1,
                "Rank {} has {} parameters and the budget is {}: round down, or the method gets more than its share.",
                found,
                cost(found, dora),
                budget,
            )
            mistake(
                dora and found == right(budget, False) != expected,
                "DoRA has a magnitude for each output on top of the factors: take Σ out off the budget first.",
            )
            mistake(
                found != expected,
                "With {} parameters {} can have rank {}; you return {}.",
                budget,
                name,
                expected,
                found,
            )
