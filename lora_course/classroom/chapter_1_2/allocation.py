"""Exercise 1.2-b: masks that leave no layer empty."""

import torch

from lora_course.classroom.exercises import Draw, case, exercise


def scores(sensitivity, uncertainty, combine=torch.mul, reduce=torch.mean, parts="AEB"):
    found = {}
    for name in sensitivity:
        s = {key: combine(sensitivity[name][key], uncertainty[name][key]) for key in "AEB"}
        s = {"E": s["E"].flatten(), "A": reduce(s["A"], 1), "B": reduce(s["B"], 0)}
        found[name] = sum(s[key] for key in parts)
    return found


def keep_best(score, budget, each=1, last=False):
    """Masks of the `each` best of every layer and, up to `budget`, of the best of all others; of equals the first, or last."""
    raised = {name: s.clone() for name, s in score.items()}
    for s in raised.values():
        s[s.argsort(descending=True, stable=True)[:each]] = torch.inf
    together = torch.cat(list(raised.values()))
    order = together.flip(0).argsort(descending=True, stable=True)
    order = len(together) - 1 - order if last else together.argsort(descending=True, stable=True)
    mask = torch.zeros(len(together), dtype=torch.bool).index_fill(0, order[:budget], True)
    return dict(zip(score, mask.split([len(s) for s in score.values()]), strict=True))


def allocate(sensitivity, uncertainty, budget):
    return keep_best(scores(sensitivity, uncertainty), budget)


def _by(*arguments, **more):
    """The right allocation by other scores."""
    return lambda sensitivity, uncertainty, budget: keep_best(
        scores(sensitivity, uncertainty, *arguments, **more), budget
    )


def _per_layer(sensitivity, uncertainty, budget):
    found = scores(sensitivity, uncertainty)
    return {name: keep_best({name: s}, budget // len(found))[name] for name, s in found.items()}


ALLOCATION_MISTAKES = {
    "A layer keeps nothing: each keeps its best triplet, whatever the others' scores are.":
        lambda i, u, b: keep_best(scores(i, u), b, each=0),
    "The layers' best come on top of the budget; they are part of it.":
        lambda i, u, b: keep_best(scores(i, u), b + len(i)),
    "You keep the triplets of lowest score.":
        lambda i, u, b: keep_best({name: -s for name, s in scores(i, u).items()}, b),
    "Every layer keeps equally many: beyond the best of each, the budget is for all layers together.": _per_layer,
    "The uncertainty is not used: the score of a weight is sensitivity · uncertainty.": _by(lambda i, u: i),
    "The sensitivity is not used: the score of a weight is sensitivity · uncertainty.": _by(lambda i, u: u),
    "Sensitivity and uncertainty are added; the score of a weight is their product.": _by(torch.add),
    "Rows of A and columns of B are summed; their mean is asked for, or wide matrices win by their width.":
        _by(reduce=torch.sum),
    "The largest score of a row or column is taken; their mean is asked for.": _by(reduce=torch.amax),
    "Only λ is scored; the rows of A and the columns of B count too.": _by(parts="E"),
    "The rows of A are missing in the score.": _by(parts="EB"),
    "The columns of B are missing in the score.": _by(parts="EA"),
    "λ is missing in the score.": _by(parts="AB"),
    "Means are multiplied; the score is the mean of the products.":
        lambda i, u, b: keep_best({name: sum(
            (i[name][k].mean(d) * u[name][k].mean(d)).flatten() for k, d in (("A", 1), ("E", 1), ("B", 0))
        ) for name in i}, b),
    "Of equal scores the last win; the first should: sort with stable=True.":
        lambda i, u, b: keep_best(scores(i, u), b, last=True),
}  # fmt: skip


@exercise(
    "1.2-b",
    points=2,
    right=allocate,
    mistakes=ALLOCATION_MISTAKES,
    otherwise="Other triplets have the highest scores: see where the score of a triplet is defined, and what each layer keeps.",
)
def check_allocation_floor(draw: Draw):
    """Masks by score, at least one triplet a layer."""

    def averages(shapes, scales):
        # triplets differ in λ as much as in their rows and columns, and entries of a row among each other
        def heavy(*shape):
            return draw.normal(*shape).exp()

        return {
            name: {
                "A": scales[name] * heavy(r, 1) * heavy(r, columns),
                "E": scales[name] * heavy(r, 1),
                "B": scales[name] * heavy(1, r) * heavy(out, r),
            }
            for name, (r, columns, out) in shapes.items()
        }

    for place in range(8):
        names = draw.random.sample(["q", "k", "v", "o", "up", "down"], 3)
        widths = draw.sizes(6, 3, 40)
        shapes = {name: (draw.integer(4, 9), widths.pop(), widths.pop()) for name in names}
        total = sum(r for r, _, _ in shapes.values())
        budget = {0: 4, 1: 3, 2: total}.get(place, draw.integer(5, total - 4))
        # one layer has no triplet among the best of all
        scales = {name: draw.number(0.6, 1.5) for name in names} | {draw.choice(names): 0.05}
        hint = [
            "",
            "With a budget of one a layer it goes wrong.",
            "With a budget for all it goes wrong.",
        ]
        yield case(
            averages(shapes, scales),
            averages(shapes, scales),
            budget,
            hint="".join(hint[place : place + 1]),
        )
        if place == 3:
            again = "With other averages of the same shapes it goes wrong."
            yield case(averages(shapes, scales), averages(shapes, scales), budget, hint=again)
        if place < 2:
            shapes = {
                name: (draw.integer(17, 24), 4, 3) for name in names
            }  # where unstable sorting shows
            equal = {
                name: {
                    key: torch.full_like(t, draw.choice([1.0, 2.0])) for key, t in tensors.items()
                }
                for name, tensors in averages(shapes, scales).items()
            }
            ties = "Where scores are equal it goes wrong: the first of the equal ones are kept, `budget` in all."
            yield case(equal, equal, draw.integer(4, 50), hint=ties)
    # before the first gradient all averages are 0; and here names are in no order but the dictionary's
    for number in (0.0, 1.0):
        names = draw.choice([("k", "v", "down"), ("o", "q", "k")])
        alike = {
            name: {key: torch.full(shape, number) for key, shape in (("A", (r, 5)), ("E", (r, 1)), ("B", (4, r)))}
            for name, r in zip(names, draw.sizes(3, 5, 9), strict=True)
        }  # fmt: skip
        alike_said = "Where all scores are equal it goes wrong: layers and triplets that come first win, `budget` in all."
        yield case(alike, alike, draw.integer(7, 13), hint=alike_said)
