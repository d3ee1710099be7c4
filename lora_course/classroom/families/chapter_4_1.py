"""Graded problems of chapter 4.1, sparse LoRA: a threshold of another kind, and a mask to mend."""

import torch

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _threshold_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [
        (draw.normal(2, 2), draw.normal(2, 2), 0.1, 2.0),
        (draw.normal(1, 4), draw.normal(1, 4), 0.25, 2.0),
    ]
    for _ in range(5):
        layers, r = draw.sizes(2, 2, 7)
        rate, penalty = draw.choice([0.1, 0.2, 0.3]), draw.choice([1.0, 2.0, 3.0])
        made.append((draw.normal(layers, r), draw.normal(layers, r), rate, penalty))
    small = draw.normal(3, 4) * torch.tensor(
        [[0.01], [1.0], [0.02]]
    )  # whole layers below the threshold
    return [*made, (small, draw.normal(3, 4), 0.2, 2.0)]  # fmt: skip


threshold = Family(
    id="4.1-threshold",
    title="Gates that close another way",
    points=3,
    minutes=20,
    statement="""
    Gates are `[layers, r]`. Make one step of gradient descent on them and one threshold step, and return new gates. {order}
    {size} {kind}
    """,
    answer='''
    def close(gates, gradient, lr, penalty):
        """gates, gradient [layers, r], two numbers → new gates [layers, r]"""
        limit = $size
        before, after = $order
        x = gates - before
        return $kind - after
    ''',
    conventions={
        "order": {
            "gradient": ("The gradient step comes first.", "lr * gradient, 0"),
            "threshold": ("The threshold comes first; then `lr` times the gradient is taken off.", "0, lr * gradient"),
        },
        "size": {
            "rate": ("The threshold $\\tau$ is `lr * penalty`.", "lr * penalty"),
            "penalty": ("The threshold $\\tau$ is `penalty / 4`, whatever the rate.", "penalty / 4"),
            "root": ("The threshold $\\tau$ is `lr * penalty * sqrt(r)`.", "lr * penalty * math.sqrt(gates.shape[1])"),
        },
        "kind": {
            "soft": ("Each gate moves towards zero by $\\tau$, and stops there.", "x.sign() * (x.abs() - limit).clamp(min=0)"),
            "hard": ("A gate of magnitude up to $\\tau$ becomes zero; a larger one stays as it is.", "torch.where(x.abs() > limit, x, 0)"),
            "layer": (
                "A layer's gates are one vector: its norm shrinks by $\\tau$, and stops at zero; its direction stays.",
                "x * (1 - limit / x.norm(dim=1, keepdim=True)).clamp(min=0)",
            ),
            "positive": ("Each gate falls by $\\tau$, and a gate below zero becomes zero.", "(x - limit).clamp(min=0)"),
        },
    },
    book={"order": "gradient", "size": "rate", "kind": "soft"},
    cases=_threshold_cases,
)  # fmt: skip


def _mask_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made: list[tuple] = [
        (draw.normal(2, 4), draw.normal(2, 4), 0.5),
        (draw.normal(3, 3), draw.normal(3, 3), 0.5),
    ]
    for sparsity in (0.25, 0.5, 0.625, 0.875):
        outputs, inputs = draw.sizes(2, 3, 9)
        made.append((draw.normal(outputs, inputs), draw.normal(outputs, inputs), sparsity))
        # few values: equal scores, of which some are kept
        values = [
            torch.randint(-2, 3, (outputs, inputs), generator=draw.generator) / 2 for _ in "wg"
        ]
        made.append((*values, sparsity))
    for sparsity in (
        0.25,
        0.75,
    ):  # a count that is nearest to the one above, and to the one below, in each scope
        made.append((draw.normal(5, 9), draw.normal(5, 9), sparsity))
    return made  # fmt: skip


mask = Family(
    id="4.1-mask",
    title="Find the bug: what stays",
    points=4,
    minutes=25,
    statement="""
    The function below was meant to choose the entries of a weight that a sparse update may change. It chooses others. It has two mistakes.
    Mend it; keep its name and arguments. It shall do this. {score} {scope} Of $n$ entries {count} are
    chosen, where $s$ is `sparsity`: those of the highest scores. {ties}
    """,
    answer='''
    def mask(weight, gradient, sparsity):
        """weight, gradient [out, in], 0 ≤ sparsity < 1 → [out, in], true where an entry is chosen"""
        score = $score
        chosen = torch.zeros_like(weight, dtype=torch.bool)
        for scores, marks in $scope:
            n = scores.numel()
            count = $count
            order = $ties
            marks[order[:count]] = True
        return chosen
    ''',
    conventions={
        "score": {
            "weight": ("An entry's score is its magnitude.", "weight.abs()"),
            "product": ("An entry's score is the magnitude of weight times gradient.", "(weight * gradient).abs()"),
            "small": ("An entry's score is the magnitude of its gradient, less the magnitude of its weight.", "gradient.abs() - weight.abs()"),
        },
        "scope": {
            "whole": ("The choice is made over the whole weight, read row after row.", "[(score.flatten(), chosen.view(-1))]"),
            "rows": ("The choice is made in each row by itself.", "zip(score, chosen)"),
            "columns": ("The choice is made in each column by itself.", "zip(score.T, chosen.T)"),
        },
        "count": {
            "down": ("$\\lfloor (1-s) n \\rfloor$", "math.floor((1 - sparsity) * n)"),
            "up": ("$\\lceil (1-s) n \\rceil$", "math.ceil((1 - sparsity) * n)"),
        },
        "ties": {
            "first": ("Of equal scores the entry that comes first wins.", "scores.argsort(descending=True, stable=True)"),
            "last": ("Of equal scores the entry that comes last wins.", "n - 1 - scores.flip(0).argsort(descending=True, stable=True)"),
        },
    },
    book={"score": "weight", "scope": "whole", "count": "down", "ties": "first"},
    cases=_mask_cases,
    bugs=(
        ("(1 - sparsity) * n", "sparsity * n"),
        ("order[:count]", "order[-count:]"),
        ("n = scores.numel()", "n = (scores.numel() + 1) // 2"),
        ("order[:count]", "order[1 : count + 1]"),
    ),
)  # fmt: skip

FAMILIES = [threshold, mask]
