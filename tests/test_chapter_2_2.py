"""The exercises of chapter 2.2: plausible wrong answers are rejected, each with its own message; right ones pass."""

import math

import torch
from torch import nn

from lora_course.classroom.chapter_2_2 import check_jagged, check_one_adapter, check_restart
from lora_course.progressive import Stage, multiplier
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def one_by_one(stages):
    """Column and row of each component in turn."""
    rows, columns = [], []
    for A, B, scaling in stages:
        for a, b in zip(A, B.T):
            rows.append(a * math.sqrt(scaling))
            columns.append(b * math.sqrt(scaling))
    return torch.stack(rows), torch.stack(columns, 1)


def cat(stages, a=lambda s: 1, b=lambda s: s):
    return torch.cat([a(s) * A for A, _, s in stages]), torch.cat(
        [b(s) * B for _, B, s in stages], 1
    )


def added_up(stages):
    """Pads to one rank and adds factor to factor."""
    A, B = torch.zeros(3, 11), torch.zeros(5, 3)
    for a, b, s in stages:
        A[: len(a)] += a
        B[:, : len(a)] += s * b
    return A, B


@torch.no_grad()
def restart(layer, optimizer, *, scale=True, merge=True, A=True, B=True, moments=True, flag=False):
    if merge:
        layer.base_layer.weight += (layer.scaling if scale else 1) * layer.B @ layer.A
    if A:
        nn.init.kaiming_uniform_(layer.A, a=math.sqrt(5))
    if B:
        layer.B.zero_()
    if moments:
        optimizer.state.clear()
    layer.merged = flag


@torch.no_grad()
def with_new_parameters(layer, optimizer):
    layer.base_layer.weight += layer.delta_weight()
    layer.A, layer.B = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.zeros(5, 3))


@torch.no_grad()
def with_new_parameters_told(layer, optimizer):
    with_new_parameters(layer, optimizer)
    optimizer.param_groups[0]["params"] = [layer.A, layer.B]


@torch.no_grad()
def both_zero(layer, optimizer):
    restart(layer, optimizer)
    layer.A.zero_()


@torch.no_grad()
def moments_set_to_zero(layer, optimizer):
    restart(layer, optimizer, moments=False)
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            state[key].zero_()


WRONG = {
    check_jagged: [
        lambda t, n, L, w: min(1, t / w) * min(1, (n * L - t) / (n * L - w)),
        lambda t, n, L, w: min(1, t % L / w),
        lambda t, n, L, w: min(1, t % L / w) * min(1, (L - t % L) / (L - w)),
        lambda t, n, L, w: min(1, t % L / w, (n * L - t) / (n * L - w)),
        lambda t, n, L, w: min(1, (t % L + 1) / w) * min(1, (n * L - t) / (n * L - w)),
        lambda t, n, L, w: min(1, t % L / w) * (n * L - t) / (n * L),
        lambda t, n, L, w: min(1, t % 10 / 4) * min(1, (30 - t) / 26),
    ],
    check_one_adapter: [
        lambda stages: cat(stages, b=lambda s: 1),
        lambda stages: cat(stages, a=lambda s: s),
        lambda stages: cat(stages, b=lambda s: s / len(stages)),
        lambda stages: (torch.eye(11), sum(s * B @ A for A, B, s in stages)),
        added_up,
        lambda stages: (cat(stages)[0], torch.cat([s * B.T for _, B, s in stages])),
        lambda stages: (cat(stages)[0].flip(0), cat(stages)[1]),
    ],
    check_restart: [
        lambda layer, optimizer: restart(layer, optimizer, merge=False),
        lambda layer, optimizer: restart(layer, optimizer, scale=False),
        lambda layer, optimizer: restart(layer, optimizer, B=False),
        lambda layer, optimizer: restart(layer, optimizer, A=False),
        lambda layer, optimizer: restart(layer, optimizer, moments=False),
        lambda layer, optimizer: restart(layer, optimizer, flag=True),
        both_zero,
        with_new_parameters,
        lambda layer, optimizer: None,
    ],
}
RIGHT = {
    check_jagged: [
        lambda t, n, L, w: multiplier([Stage(1, "all-linear", 1e-3, L, w)] * n, t // L, t % L),
        lambda t, n, L, w: (
            (t % L / w if t % L < w else 1) * (1 if t < w else (n * L - t) / (n * L - w))
        ),
    ],
    check_one_adapter: [cat, one_by_one],
    check_restart: [restart, with_new_parameters_told, moments_set_to_zero],
}
