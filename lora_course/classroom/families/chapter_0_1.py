"""Graded problems of chapter 0.1, LoRA: a training step by hand, and a merge with its own rules."""

import torch

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _step_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = []
    for number in range(7):
        inputs, outputs, r, rows = (3, 2, 1, 2) if number < 2 else draw.sizes(4, 3, 9)
        x, target, W = (
            draw.normal(rows, inputs),
            draw.normal(rows, outputs),
            draw.normal(outputs, inputs),
        )
        A, B = draw.normal(r, inputs), draw.normal(outputs, r)
        made.append(
            (x, target, W, A, B, draw.choice([0.5, 2.0, 3.0]), draw.choice([0.05, 0.1, 0.2]))
        )
    return made  # fmt: skip


step = Family(
    id="0.1-step",
    title="Find the bug: a training step by hand",
    points=4,
    minutes=25,
    statement="""
    The function below was meant to make one step of gradient descent on `A` and `B`, for the layer
    $y = xW^\\top + s\\,(xA^\\top)B^\\top$, and the loss rises. It has two mistakes. Mend it; keep its name and arguments,
    and return new tensors. It shall do this. {loss} {order} {rate} {decay}
    """,
    answer='''
    def step(x, target, W, A, B, scaling, lr):
        """x [n, in], target [n, out], W [out, in], A [r, in], B [out, r], two numbers → the new A and B"""
        def error(factor):
            return (x @ W.T + scaling * (x @ factor.T) @ B.T - target) * $loss

        grad_A = scaling * (error(A) @ B).T @ x
        new_A = A * $decay - lr * grad_A
        used = $order
        grad_B = scaling * error(used).T @ (x @ used.T)
        new_B = B * $decay - lr * $rate * grad_B
        return new_A, new_B
    ''',
    conventions={
        "loss": {
            "mean": ("The loss is the mean of the squared errors over all entries.", "2 / target.numel()"),
            "rows": ("The loss is the sum of squared errors of a row, averaged over rows.", "2 / len(target)"),
            "half": ("The loss is half the sum of all squared errors.", "1.0"),
        },
        "order": {
            "together": ("Both gradients are taken at the old factors.", "A"),
            "A first": ("`A` moves first; the gradient of `B` is taken with the new `A` and the old `B`.", "new_A"),
        },
        "rate": {
            "same": ("Both factors have the rate `lr`.", "1"),
            "4": ("`B` has four times the rate of `A`, which is `lr`.", "4"),
            "half": ("`B` has half the rate of `A`, which is `lr`.", "0.5"),
        },
        "decay": {
            "none": ("There is no weight decay.", "1"),
            "decoupled": ("The old value of each factor is multiplied by `1 - lr / 10` in its step.", "(1 - lr / 10)"),
        },
    },
    book={"loss": "mean", "order": "together", "rate": "same", "decay": "none"},
    cases=_step_cases,
    bugs=(
        ("grad_A = scaling * ", "grad_A = "),
        ("grad_B = scaling * ", "grad_B = "),
        ("+ scaling * (x @ factor.T)", "+ (x @ factor.T)"),
        ("(x @ used.T)", "(x @ used.T).abs()"),
    ),
)  # fmt: skip


def _merge_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [(draw.normal(2, 3), draw.normal(1, 3), draw.normal(2, 1), 2.0)]
    made.append(
        (
            draw.normal(3, 2),
            torch.cat([draw.normal(1, 2), torch.zeros(1, 2)]),
            draw.normal(3, 2),
            3.0,
        )
    )
    for number in range(4):
        if number % 2 == 0:  # each shape twice: what is kept from an earlier call shows
            outputs, inputs, r = draw.sizes(3, 3, 10)
        A = draw.normal(r, inputs)
        A[draw.integer(0, r - 1)] = 0
        made.append(
            (
                draw.normal(outputs, inputs),
                A,
                draw.normal(outputs, r),
                float(draw.integer(r + 1, 20)),
            )
        )
    return made  # fmt: skip


merge = Family(
    id="0.1-merge",
    title="A merge with its own rules",
    points=3,
    minutes=20,
    statement="""
    Return a new weight, into which the update $s\\,BA$ is merged. {scaling} {rank} {norm}
    """,
    answer='''
    def merged(weight, A, B, lora_alpha):
        """weight [out, in], A [r, in], B [out, r], a number → the new weight [out, in]"""
        r = $rank
        new = weight + $scaling * (B @ A)
        return $norm
    ''',
    conventions={
        "scaling": {
            "r": ("The scale is $s = \\alpha / r$.", "lora_alpha / r"),
            "root": ("The scale is $s = \\alpha / \\sqrt r$.", "lora_alpha / math.sqrt(r)"),
            "r+1": ("The scale is $s = 2\\alpha / (r + 1)$.", "2 * lora_alpha / (r + 1)"),
        },
        "rank": {
            "all": ("Here $r$ is the number of rows of `A`.", "A.shape[0]"),
            "alive": ("Here $r$ counts only the rows of `A` that are not all zero.", "int((A != 0).any(1).sum())"),
        },
        "norm": {
            "free": ("Nothing else is done to the sum.", "new"),
            "rows": (
                "Then each row of the sum is scaled to the norm that this row of the old weight had.",
                "new * weight.norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True)",
            ),
            "columns": (
                "Then each column of the sum is scaled to the norm that this column of the old weight had.",
                "new * weight.norm(dim=0, keepdim=True) / new.norm(dim=0, keepdim=True)",
            ),
            "whole": (
                "Then the sum is scaled to the Frobenius norm of the old weight.",
                "new * weight.norm() / new.norm()",
            ),
        },
    },
    book={"scaling": "r", "rank": "all", "norm": "free"},
    cases=_merge_cases,
)  # fmt: skip

FAMILIES = [step, merge]
