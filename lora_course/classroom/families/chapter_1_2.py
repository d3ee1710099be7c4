"""Graded problems of chapter 1.2, AdaLoRA: a budget with another shape, and who gets it."""

import itertools

import torch

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _budget_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [(6, 3, 8, 4, 2, 2, 12), (9, 5, 6, 2, 4, 3, 15)]
    for length in (8, 16, 32):  # powers of two: every value is exact, and so are the halves
        layers, target_r, tinit, tfinal = draw.integer(3, 12), *draw.sizes(3, 2, 9)
        init_r = target_r + draw.integer(3, 9)
        total = tinit + length + tfinal
        made += [
            (t, layers, init_r, target_r, tinit, tfinal, total)
            for t in sorted(
                {*draw.sizes(10, 0, total), tinit + 1, tinit + 3, tinit + length // 2 + 1}
            )
        ]
    for layers, target_r, more in itertools.product(
        (1, 3), (2, 3), (1, 2, 8)
    ):  # halves, and even ones
        made.append((6, layers, target_r + more, target_r, 2, 2, 12))
    for layers, more in itertools.product((1, 3), (2, 3, 12)):  # a little above a whole number
        made.append((4, layers, 2 + more, 2, 2, 2, 12))
    return made


budget = Family(
    id="1.2-budget",
    title="A budget with another shape",
    points=3,
    minutes=15,
    statement="""
    Write the budget of AdaLoRA after step `t`, for `layers` matrices. Up to step `tinit` the mean rank is `init_r`, from
    step `total_step - tfinal` on it is `target_r`. Between the two, $u$ rises linearly from 0 to 1, and the share of
    `init_r - target_r` that is left is {curve} {steps} {count} {rounding}
    """,
    answer='''
    def budget(t, layers, init_r, target_r, tinit, tfinal, total_step):
        """step t and the plan → triplets kept, a whole number"""
        t = min(max(t, tinit), total_step - tfinal)
        t = $steps
        u = (t - tinit) / (total_step - tfinal - tinit)
        mean_rank = target_r + (init_r - target_r) * $curve
        exact = $count
        return $rounding
    ''',
    conventions={
        "curve": {
            "square": ("$(1-u)^2$.", "(1 - u) ** 2"),
            "fourth": ("$(1-u)^4$.", "(1 - u) ** 4"),
            "late": ("$1-u^2$, slow at first.", "(1 - u**2)"),
            "line": ("$1-u$.", "(1 - u)"),
        },
        "steps": {
            "each": ("The budget is computed anew at every step.", "t"),
            "second": (
                "Between `tinit` and the end of the fall it changes only at `tinit + 2`, `tinit + 4`, … and keeps its value in between.",
                "tinit + (t - tinit) // 2 * 2",
            ),
        },
        "count": {
            "all": ("Return the triplets of all matrices together.", "mean_rank * layers"),
            "one": ("Return the triplets of one matrix.", "mean_rank"),
        },
        "rounding": {
            "down": ("Round down at the end.", "math.floor(exact)"),
            "up": ("Round up at the end.", "math.ceil(exact)"),
            "half up": ("Round to the nearest whole number at the end, a half upwards.", "math.floor(exact + 0.5)"),
            "half even": ("Round to the nearest whole number at the end, a half to the even one.", "round(exact)"),
        },
    },
    book={"curve": ("cube", "square", "fourth", "line"), "steps": "each", "count": "all", "rounding": ("down", "up")},
    cases=_budget_cases,
)  # fmt: skip


def _allocation_cases(draw: Draw, choice: Choices) -> list[tuple]:
    def triplets(shapes: dict[str, tuple[int, int]], r: int) -> dict:
        # multiples of an eighth add up exactly in any order, and one value returns: there are ties
        return {
            name: {
                "A": torch.randint(1, 9, (r, columns), generator=draw.generator) / 8,
                "E": torch.randint(1, 9, (r, 1), generator=draw.generator) / 8,
                "B": torch.randint(1, 9, (rows, r), generator=draw.generator) / 8,
            }
            for name, (rows, columns) in shapes.items()
        }

    made = []
    for r, widths in (
        (2, (2, 2)),
        (2, (3, 2)),
        (4, (5, 8, 3)),
        (5, (4, 16, 6)),
        (3, (2, 9, 4, 7)),
        (4, (3, 3, 12)),
        (2, (6, 5, 9)),
        (6, (3, 8, 5, 2)),
        (5, (7, 2, 11)),
    ):
        shapes = {
            name: (draw.integer(2, 9), width)
            for name, width in zip(("q", "v", "up", "down"), widths, strict=False)
        }
        s, u = triplets(shapes, r), triplets(shapes, r)
        names = list(shapes)
        for key in "AEB":  # equal triplets: in one layer, and all of a weak layer
            for table in (s, u):
                index = (slice(None), -1) if key == "B" else (-1,)
                first = (slice(None), 0) if key == "B" else (0,)
                table[names[0]][key][index] = table[names[0]][key][first]
                table[names[-1]][key] = torch.full_like(table[names[-1]][key], 1 / 8)
        for budget in sorted({len(names), len(names) + 1, r * len(names) // 2, r * len(names) - 1}):
            made.append((s, u, budget))
    return made


allocation = Family(
    id="1.2-allocation",
    title="Who keeps a rank?",
    points=5,
    minutes=30,
    statement="""
    You get the sensitivity and the uncertainty of each entry, by layer, and a budget of triplets for all layers together,
    at least as many as there are layers. An entry's importance is {importance} A triplet's score is the importance of its
    $\\lambda$, plus a number for its row of `A`, plus a number for its column of `B`: each is {reduce} {floor} {ties} Return a mask for each layer.
    """,
    answer='''
    def keep(sensitivity, uncertainty, budget):
        """two dictionaries {layer: {"A": [r, in], "E": [r, 1], "B": [out, r]}}, a number → {layer: mask [r], bool}"""
        scores = []
        for place, name in enumerate(sensitivity):
            parts = {}
            for key in "AEB":
                s, u = sensitivity[name][key], uncertainty[name][key]
                parts[key] = $importance
            A, B = parts["A"], parts["B"].T
            score = parts["E"].flatten() + $reduce
            scores += [(-value, $ties * place, $ties * i, name) for i, value in enumerate(score.tolist())]
        order = sorted(scores)
        kept = []
        if $floor:
            for name in sensitivity:
                kept.append(next(row for row in order if row[3] == name))
        kept += [row for row in order if row not in kept][: budget - len(kept)]
        masks = {name: torch.zeros(len(parts["E"]), dtype=torch.bool) for name, parts in sensitivity.items()}
        for _, _, i, name in kept:
            masks[name][abs(i)] = True
        return masks
    ''',
    conventions={
        "importance": {
            "product": ("sensitivity times uncertainty.", "s * u"),
            "sum": ("sensitivity plus uncertainty.", "s + u"),
            "smaller": ("the smaller one of sensitivity and uncertainty.", "torch.minimum(s, u)"),
        },
        "reduce": {
            "mean": ("the mean importance of the entries in it.", "A.mean(1) + B.mean(1)"),
            "sum": ("the sum of the importances of the entries in it.", "A.sum(1) + B.sum(1)"),
            "max": ("the largest importance of an entry in it.", "A.amax(1) + B.amax(1)"),
        },
        "floor": {
            "none": ("The whole budget goes to the highest scores of all layers; a layer may get nothing.", "False"),
            "one": ("First, each layer keeps the triplet of its highest score; the rest of the budget goes to the highest scores among all others.", "True"),
        },
        "ties": {
            "first": ("Among equal scores those come first that are listed first: by layer, then within the layer.", "1"),
            "last": ("Among equal scores those come first that are listed last: by layer, then within the layer.", "-1"),
        },
    },
    book={"importance": "product", "reduce": "mean", "floor": ("none", "one"), "ties": "first"},
    cases=_allocation_cases,
)  # fmt: skip

FAMILIES = [budget, allocation]
