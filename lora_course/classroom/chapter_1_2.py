"""Checks of the exercises in chapter 1.2, AdaLoRA."""

import math

import torch
from torch import nn

from lora_course.adalora import AdaLoRALinear
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def value(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3):
    """b(t) before it is rounded."""
    last = total_step - tfinal
    left = (last - min(max(t, tinit), last)) / (last - tinit)
    return (init_r - target_r) * layers * left**power + target_r * layers


def budget(*schedule, **more):
    return math.ceil(value(*schedule, **more))


def right_budget(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3):
    return budget(t, layers, init_r, target_r, tinit, tfinal, total_step, power)


def _unclamped(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3):
    left = (total_step - tfinal - max(t, tinit)) / (total_step - tfinal - tinit)
    return math.ceil((init_r - target_r) * layers * left**power + target_r * layers)


BUDGET_MISTAKES = {
    "A whole number of triplets is expected, rounded up.": value,
    "You cut b(t) to a whole number; it is rounded up here.": lambda *a, **k: int(value(*a, **k)),
    "You round b(t) to the nearest whole number; it is rounded up here.": lambda *a, **k: round(value(*a, **k)),
    "You always add one: where b(t) is whole it stays.": lambda *a, **k: int(value(*a, **k)) + 1,
    "This is the mean rank of a matrix; the budget is for all layers together.":
        lambda t, layers, *rest, **k: budget(t, 1, *rest, **k),
    "The mean rank of a matrix is rounded, then multiplied: round the budget itself.":
        lambda t, layers, *rest, **k: layers * budget(t, 1, *rest, **k),
    "`power` is not used: the cubic is only one of them.":
        lambda t, layers, init_r, target_r, tinit, tfinal, total_step, power=3: budget(
            t, layers, init_r, target_r, tinit, tfinal, total_step),
    "Your budget falls in a straight line, whatever `power` is.":
        lambda t, layers, init_r, target_r, tinit, tfinal, total_step, power=3: budget(
            t, layers, init_r, target_r, tinit, tfinal, total_step, 1),
    "Your budget is met at the last step: it should be met at total_step - tfinal, so that tfinal steps are left to train.":
        lambda t, layers, init_r, target_r, tinit, tfinal, total_step, power=3: budget(
            t, layers, init_r, target_r, tinit, 0, total_step, power),
    "Your budget falls from the first step; it stays at its start for tinit steps.":
        lambda t, layers, init_r, target_r, tinit, tfinal, total_step, power=3: budget(
            t, layers, init_r, target_r, 0, tfinal, total_step, power),
    "After step total_step - tfinal your budget goes on changing: it stays at its end.": _unclamped,
    "The budget rises: init_r is its start, target_r its end.":
        lambda t, layers, init_r, target_r, *rest, **k: budget(t, layers, target_r, init_r, *rest, **k),
}  # fmt: skip


@exercise(
    "1.2-a",
    right=right_budget,
    mistakes=BUDGET_MISTAKES,
    whole=True,
    otherwise="Your budget is not b(t) with that power, rounded up.",
)
def check_budget_up(draw: Draw):
    """b(t) with any power, rounded up. No b(t) between the phases is nearly whole."""
    before = "During the first tinit steps the budget is init_r · layers."
    after = "From step total_step - tfinal on the budget is target_r · layers."
    for power, tinit, tfinal in ((3, 5, 8), (1, 3, 6), (2, 0, 4), (1.5, 9, 0), (5, 2, 11)):
        target_r, init_r = sorted(draw.sizes(2, 3, 16))
        layers, total = draw.integer(5, 40), draw.integer(40, 90)
        last = total - tfinal
        schedule = (layers, init_r, target_r, tinit, tfinal, total)
        middle = draw.random.sample(range(tinit + 1, last), 6)
        for t in sorted({1, max(tinit, 1), *middle, last, total}):
            exact = value(t, *schedule, power)
            if tinit < t < last and abs(exact - round(exact)) < 1e-6:
                continue
            hint = before if t <= tinit else after if t >= last else ""
            hint = hint or (f"With a power of {power:g} it goes wrong." if power != 3 else "")
            yield case(t, *schedule, **({} if power == 3 else {"power": power}), hint=hint)


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
            hint = "Where scores are equal it goes wrong: the first of the equal ones are kept, `budget` in all."
            yield case(equal, equal, draw.integer(4, 50), hint=hint)


def fold(layer):
    kept = layer.mask
    return (layer.E * layer.A)[kept], layer.B[:, kept], layer.scaling * int(kept.sum())


def _use_fold(found, layer):
    """ΔW of the plain layer with the factors and the α that were returned."""
    mistake(
        not isinstance(found, (tuple, list)) or len(found) != 3,
        "Three things are expected: A, B and lora_alpha.",
    )
    A, B = (torch.as_tensor(t).detach().double() for t in found[:2])
    kept, shape = int(layer.mask.sum()), (layer.out_features, layer.in_features)
    mistake(
        A.shape == layer.A.shape and kept != len(layer.mask),
        "A still has the masked rows: keep those where mask is True.",
    )
    mistake(
        A.shape != (kept, shape[1]) or B.shape != (shape[0], kept),
        "A is {} and B {}; [kept, in] = {} and [out, kept] = {} are expected.",
        list(A.shape), list(B.shape), [kept, shape[1]], [shape[0], kept],
    )  # fmt: skip
    return float(found[2]) / kept * B @ A


def _fold(
    A=lambda layer: layer.E * layer.A, alpha=lambda layer: layer.scaling * int(layer.mask.sum())
):
    return lambda layer: (A(layer)[layer.mask], layer.B[:, layer.mask], alpha(layer))


FOLD_MISTAKES = {
    "λ is missing: fold it into A or into B.": _fold(A=lambda layer: layer.A),
    "λ is there twice, in A and in B: fold it into one of them.": _fold(A=lambda layer: layer.E**2 * layer.A),
    "λ counts by its size only; its sign belongs to it.": _fold(A=lambda layer: layer.E.abs() * layer.A),
    "The scale has changed: a plain layer divides lora_alpha by the rank that is left, this one by its first rank.":
        _fold(alpha=lambda layer: layer.lora_alpha),
    "You return the scale; lora_alpha is the scale times the rank that is left.":
        _fold(alpha=lambda layer: layer.scaling),
    "The scale is missing: lora_alpha is the scale times the rank that is left.":
        _fold(alpha=lambda layer: int(layer.mask.sum())),
    "The scale is applied twice: it stands in lora_alpha, or in a factor.":
        _fold(A=lambda layer: layer.scaling * layer.E * layer.A),
}  # fmt: skip


@exercise(
    "1.2-c",
    points=2,
    right=fold,
    look=_use_fold,
    mistakes=FOLD_MISTAKES,
    otherwise="The plain layer with your A, B and lora_alpha computes something else than the given one.",
)
def check_fold(draw: Draw):
    """A plain LoRA layer of an AdaLoRA layer with a mask."""
    for count, hint in [
        (None, ""),
        (None, ""),
        (1, "With one triplet left it goes wrong."),
        (0, "With no triplet masked it goes wrong."),
        (-1, "With a kept triplet whose λ is 0 it goes wrong: it stays, the mask decides."),
    ]:
        r, inputs, outputs = draw.integer(5, 9), draw.integer(10, 20), draw.integer(21, 30)
        alpha = draw.choice([a for a in range(2, 40) if a % r])
        layer = AdaLoRALinear(nn.Linear(inputs, outputs), r=r, lora_alpha=alpha)
        for parameter in (layer.A, layer.B, layer.E):
            parameter.data.copy_(draw.normal(*parameter.shape))
        kept = {None: draw.integer(2, r - 2), -1: 3, 0: r}.get(count, count)
        chosen = draw.order(r)[:kept]
        layer.mask.zero_()[chosen] = True
        layer.E.data.masked_fill_(~layer.mask[:, None], 0.0)
        if count == -1:
            layer.E.data[chosen[0]] = 0.0
        yield case(layer.train(draw.choice([True, False])), hint=hint)
