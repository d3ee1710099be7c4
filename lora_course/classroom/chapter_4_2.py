"""Checks of the exercises in chapter 4.2, hierarchical LoRA."""

import torch
from torch import Tensor, nn

from lora_course.classroom.first_exercises import exercise, mistake


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).norm() <= 1e-4 * expected.norm()
    )


@exercise("4.2-a", points=1)
def check_weights(learner):
    """`learner(ranks)` → the r weights of the rows, r the largest of `ranks`, as a list or a tensor."""
    for ranks, right in (
        ([1, 2, 4, 8], [1, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]),
        ([2, 3, 5], [1, 1, 2 / 3, 1 / 3, 1 / 3]),
    ):
        answer = learner(list(ranks))
        try:
            found = torch.as_tensor(answer, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            found = torch.zeros(0)
        expected, r = torch.tensor(right), ranks[-1]
        mistake(found.ndim != 1, "One weight a row is expected, a list or tensor of {} numbers.", r)
        mistake(
            len(found) == len(ranks),
            "You return a weight for each of the {} ranks; one for each of the {} rows of A is asked for.",
            len(ranks),
            r,
        )
        mistake(
            len(found) != r,
            "You return {} weights; there are {} rows, as many as the largest rank.",
            len(found),
            r,
        )
        mistake(
            _close(found, expected * len(ranks)),
            "These are the numbers of cuts that hold each row: the weights of their sum. The mean divides by {}.",
            len(ranks),
        )
        mistake(
            _close(found, expected.flip(0)),
            "The order is reversed: the first row is in every cut, so its weight is 1.",
        )
        strictly = torch.tensor([sum(b > i for b in ranks) for i in range(1, r + 1)]) / len(ranks)
        mistake(
            _close(found, strictly),
            "A cut at b holds row b as well: compare with ≥. (Or count the rows from 1 on.)",
        )
        within = torch.tensor([sum(b <= i for b in ranks) for i in range(1, r + 1)]) / len(ranks)
        mistake(
            _close(found, within),
            "You count the ranks up to i. A cut at b holds row i where b is at least i.",
        )
        mistake(
            not _close(found, expected),
            "For the ranks {} the weights are {}; you return {}.",
            ranks,
            [round(x, 3) for x in right],
            [round(x, 3) for x in found.tolist()],
        )


@exercise("4.2-b", points=2)
def check_cut(learner):
    """`learner(A, B, lora_alpha, b)` → `A` [b, in], `B` [out, b], `lora_alpha` of a plain LoRA adapter of rank b."""
    generator = torch.Generator().manual_seed(0)
    A, B, alpha = (
        torch.randn(6, 9, generator=generator),
        torch.randn(7, 6, generator=generator),
        15.0,
    )
    before = A.clone(), B.clone()
    for b in (2, 5):
        answer = learner(A, B, alpha, b)
        mistake(
            not isinstance(answer, tuple) or len(answer) != 3,
            "Three things are expected: A, B, lora_alpha.",
        )
        a, c, new = answer
        mistake(not (torch.is_tensor(a) and torch.is_tensor(c)), "A and B are tensors.")
        mistake(
            c.shape == (b, 6),
            "You cut the rows of B. Its rows are outputs: the rank is its second axis, [out, r].",
        )
        mistake(
            a.shape != (b, 9) or c.shape != (7, b),
            "A is {} and B {}; [{}, 9] and [7, {}] are expected.",
            list(a.shape),
            list(c.shape),
            b,
            b,
        )
        made, right = float(new) / b * c @ a, 2.5 * B[:, :b] @ A[:b]
        mistake(
            _close(made, 6 / b * right),
            "The scale has grown. A plain adapter of rank {} divides lora_alpha by {}, the whole divided by 6: keep α/r the same.",
            b,
            b,
        )
        mistake(
            _close(made, right / b), "You return the scale; lora_alpha is the scale times the rank."
        )
        mistake(
            _close(made, 2.5 * B[:, -b:] @ A[-b:]),
            "These are the last {} rows; the nested ones are the first.",
            b,
        )
        mistake(
            _close(made, 2.5 * right) or _close(made, (6 / b) * 2.5 * right),
            "The scale is applied twice: once in a factor and once by lora_alpha.",
        )
        mistake(
            not _close(made, right),
            "The cut at {} computes something else; relative error of ΔW {:.2g}.",
            b,
            ((made - right).norm() / right.norm()).item(),
        )
    mistake(
        not (torch.equal(A, before[0]) and torch.equal(B, before[1])),
        "Your function changed the adapter that it was given: leave it whole, others are cut from it.",
    )


@exercise("4.2-c", points=2)
def check_branches(learner):
    """`learner(branches)` → `A` [Σr, in], `B` [out, Σr], `bias` [out] with `B A x + bias` = the sum of the branches."""
    torch.manual_seed(0)
    branches = nn.ModuleList(nn.Sequential(nn.Linear(9, r), nn.Linear(r, 7)) for r in (5, 3, 2))
    x = torch.randn(11, 9)
    with torch.no_grad():
        right = sum(branch(x) for branch in branches)
        answer = learner(branches)
        mistake(
            not isinstance(answer, tuple) or len(answer) != 3,
            "Three things are expected: A, B, bias.",
        )
        mistake(not all(torch.is_tensor(t) for t in answer), "A, B and bias are tensors.")
        A, B, bias = (t.detach() for t in answer)
        mistake(
            A.shape == (9, 10) or B.shape == (10, 7),
            "A is [Σr, in] and B [out, Σr], as in LoRALinear; one of yours is transposed.",
        )
        mistake(
            A.shape != (10, 9) or B.shape != (7, 10) or bias.shape != (7,),
            "A {}, B {}, bias {}; [10, 9], [7, 10] and [7] are expected: the ranks add up to 10.",
            list(A.shape),
            list(B.shape),
            list(bias.shape),
        )
        delta = sum(branch[1].weight @ branch[0].weight for branch in branches)
        mistake(
            not _close(B @ A, delta),
            "B A is not the sum of the branches' products: put the A's below one another and the B's side by side, in the same order.",
        )
        mistake(
            not bool(bias.any()),
            "The biases are missing: six of them are added up in the branches.",
        )
        outer = sum(branch[1].bias for branch in branches)
        mistake(
            _close(bias, outer),
            "The biases of the first layers are missing: each goes through its branch's second layer.",
        )
        inner = sum(branch[1].weight @ branch[0].bias for branch in branches)
        mistake(_close(bias, inner), "The biases of the second layers are missing.")
        mistake(
            not _close(x @ A.T @ B.T + bias, right),
            "B A is right, and the bias is not: it is the output of the branches for x = 0.",
        )
