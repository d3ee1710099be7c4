"""The exercises of chapter 4.4: plausible wrong answers are rejected, each with its own message; right ones pass."""

import math

import torch

from lora_course.classroom.chapter_4_4 import (
    check_backward,
    check_batched,
    check_fold_scale,
    check_times_merged,
)
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def backward(g, x, W, A, B, s):
    h = s * (g @ B)
    return g @ W + h @ A, h.t() @ x, s * (g.t() @ (x @ A.t()))


def by_autograd(g, x, W, A, B, s):
    """Another way: let autograd do it."""
    x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
    y = torch.nn.functional.linear(x, W) + s * (x @ A.t()) @ B.t()
    return torch.autograd.grad(y, (x, A, B), g)


def thick(g, x, W, A, B, s):
    delta = s * B @ A
    return g @ (W + delta), *backward(g, x, W, A, B, s)[1:]


def spoilt(gx=None, gA=None, gB=None):
    def learner(g, x, W, A, B, s):
        right = backward(g, x, W, A, B, s)
        return tuple(
            change(g, x, W, A, B, s) if change else r for change, r in zip((gx, gA, gB), right)
        )

    return learner


def gathered(x, A, B, index):
    return x @ A[index].mT @ B[index].mT


def by_segments(x, A, B, index):
    """Another way: one adapter after the other."""
    y = x.new_zeros(*x.shape[:2], B.shape[1])
    for n in index.unique():
        y[index == n] = x[index == n] @ A[n].t() @ B[n].t()
    return y


def not_put_back(x, A, B, index):
    order = index.sort().values
    return x @ A[order].mT @ B[order].mT


def times(original, now, A, B, s):
    delta = s * B @ A
    return round((((now.float() - original.float()) * delta).sum() / delta.square().sum()).item())


def by_largest_entry(original, now, A, B, s):
    """Another way: how much of its largest entry is there."""
    delta = s * B @ A
    i = delta.abs().argmax()
    return torch.round((now.float() - original.float()).flatten()[i] / delta.flatten()[i])


def by_equality(original, now, A, B, s):
    for n in range(-3, 4):
        if torch.allclose(now.float(), original.float() + n * s * B @ A, atol=1e-5):
            return n
    return 99


def in_place(A, B, s):
    B.mul_(s)
    return A, B


WRONG = {
    check_backward: [
        spoilt(lambda g, x, W, A, B, s: g @ W),
        spoilt(lambda g, x, W, A, B, s: s * g @ B @ A),
        spoilt(lambda g, x, W, A, B, s: g @ W + g @ B @ A),
        spoilt(gA=lambda g, x, W, A, B, s: (g @ B).t() @ x),
        spoilt(gB=lambda g, x, W, A, B, s: s * s * g.t() @ (x @ A.t())),
        spoilt(gA=lambda g, x, W, A, B, s: s * x.t() @ (g @ B)),
        spoilt(gB=lambda g, x, W, A, B, s: -s * g.t() @ (x @ A.t())),
        thick,
        lambda *arguments: backward(*arguments)[:2],
    ],
    check_fold_scale: [
        lambda A, B, s: (s * A, s * B),
        lambda A, B, s: (A, B.clone()),
        lambda A, B, s: (A, B / s),
        lambda A, B, s: (s * A, B, 1.0),
        lambda A, B, s: (A + s, B),
        lambda A, B, s: (s * A.t(), B),
        in_place,
    ],
    check_batched: [
        lambda x, A, B, index: x @ A[: len(x)].mT @ B[: len(x)].mT,
        not_put_back,
        lambda x, A, B, index: sum(x @ a.t() @ b.t() for a, b in zip(A, B)),
        lambda x, A, B, index: x @ A[index[0]].t() @ B[index[0]].t(),
        lambda x, A, B, index: 2 * gathered(x, A, B, index),
        lambda x, A, B, index: x @ (B[index] @ A[index]).mT,
        lambda x, A, B, index: gathered(x, A, B, index).sum(1),
    ],
    check_times_merged: [
        lambda o, n, A, B, s: not torch.allclose(o.float(), n.float()),
        lambda o, n, A, B, s: int(not torch.allclose(o.float(), n.float())),
        lambda o, n, A, B, s: times(o, n, A, B, 1.0),
        lambda o, n, A, B, s: round(((n - o).float().norm() / (s * B @ A).norm()).item()),
        lambda o, n, A, B, s: round(((n - o).float().square().sum() / (s * B @ A).square().sum()).item()),
        by_equality,
        lambda o, n, A, B, s: (((n.float() - o.float()) * (s * B @ A)).sum() / (s * B @ A).square().sum()).item() + 0.01 * (o.dtype != torch.float32),
        lambda o, n, A, B, s: "twice",
        lambda o, n, A, B, s: times(o, n, A, B, s) + 1,
    ],
}  # fmt: skip
RIGHT = {
    check_backward: [backward, by_autograd],
    check_fold_scale: [
        lambda A, B, s: (A, s * B),
        lambda A, B, s: (s * A, B),
        lambda A, B, s: (math.sqrt(s) * A, math.sqrt(s) * B),
    ],
    check_batched: [gathered, by_segments],
    check_times_merged: [times, by_largest_entry],
}
