"""The exercises of chapter 3.1: plausible wrong answers are rejected, each with its own message; right ones pass."""

import copy
import math

import torch

from lora_course.classroom.chapter_3_1 import (
    check_growth,
    check_introduce,
    check_plan,
    check_sensitivity,
)
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def grow(
    A,
    B,
    lora_alpha,
    k,
    *,
    new_A=torch.randn,
    new_B=torch.zeros,
    alpha=lambda a, r, k: a * (r + k) / r,
):
    grown = torch.cat([A, new_A(k, A.shape[1])]), torch.cat([B, new_B(B.shape[0], k)], 1)
    return *grown, alpha(lora_alpha, A.shape[0], k)


def grow_in_front_of_nothing(A, B, lora_alpha, k):
    """Preallocates and fills in; an answer by another way."""
    r = A.shape[0]
    larger_A, larger_B = torch.rand(r + k, A.shape[1]), torch.zeros(B.shape[0], r + k)
    larger_A[:r], larger_B[:, :r] = A, B
    return larger_A, larger_B, (r + k) * (lora_alpha / r)


def plan(
    scores,
    ranks,
    budget,
    top,
    add,
    max_r,
    *,
    reverse=True,
    room=True,
    exact=True,
    on=True,
    new=False,
):
    left = min(top * add, budget - sum(ranks.values())) if exact else top * add
    gains, order = {}, sorted(scores, key=scores.get, reverse=reverse)
    for name in order if on else order[:top]:
        gain = min(add, left, max_r - ranks[name] if room else add)
        if gain > 0:
            gains[name] = gain + (ranks[name] if new else 0)
            left -= gain
    return gains


def stops_early(scores, ranks, budget, top, add, max_r):
    """Hands out whole rounds only."""
    return (
        plan(scores, ranks, budget, top, add, max_r)
        if budget - sum(ranks.values()) >= top * add
        else {}
    )


def plan_one_by_one(scores, ranks, budget, top, add, max_r):
    ranks, gains = dict(ranks), dict.fromkeys(scores, 0)
    for _ in range(min(top * add, budget - sum(ranks.values()))):
        name = max((n for n in scores if gains[n] < add and ranks[n] < max_r), key=scores.get)
        ranks[name] += 1
        gains[name] += 1
    return {name: gain for name, gain in gains.items() if gain}


def introduce(optimizer, old, new):
    for group in optimizer.param_groups:
        if any(p is old for p in group["params"]):
            group["params"] = [*group["params"], new]


def with_the_state_of_old(optimizer, old, new):
    introduce(optimizer, old, new)
    optimizer.state[new] = copy.deepcopy(optimizer.state[old])


def by_replacing(optimizer, old, new):
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]


def with_state_cleared(optimizer, old, new):
    introduce(optimizer, old, new)
    optimizer.state.clear()


WRONG = {
    check_growth: [
        lambda A, B, a, k: grow(A, B, a, k, alpha=lambda a, r, k: a),
        lambda A, B, a, k: grow(A, B, a, k, alpha=lambda a, r, k: a / r),
        lambda A, B, a, k: grow(A, B, a, k, new_A=torch.zeros),
        lambda A, B, a, k: grow(A, B, a, k, new_B=torch.randn),
        lambda A, B, a, k: grow(A, B, a, k, new_A=torch.zeros, new_B=torch.randn),
        lambda A, B, a, k: grow(A, B, a, k, new_A=torch.ones),
        lambda A, B, a, k: (torch.randn(5, 11), torch.zeros(5, 5), 10.0),
        lambda A, B, a, k: (torch.cat([A, A], 1), B, a),
    ],
    check_sensitivity: [
        lambda A, B, gA, gB: (B * gB).sum(0).abs().sum(),
        lambda A, B, gA, gB: (B * gB).sum(0).abs().sum() / (A.shape[1] * B.shape[0]),
        lambda A, B, gA, gB: gA.norm() + gB.norm(),
        lambda A, B, gA, gB: (B * gB).sum().abs() / math.sqrt(A.shape[1] * B.shape[0]),
        lambda A, B, gA, gB: (B * gB).abs().sum() / math.sqrt(A.shape[1] * B.shape[0]),
        lambda A, B, gA, gB: (
            ((A * gA).sum(1).abs().sum() + (B * gB).sum(0).abs().sum())
            / math.sqrt(A.shape[1] * B.shape[0])
        ),
        lambda A, B, gA, gB: (B * gB).sum(0).abs().mean() / math.sqrt(A.shape[1] * B.shape[0]),
    ],
    check_plan: [
        lambda *given: plan(*given, reverse=False),
        lambda *given: plan(*given, new=True),
        lambda *given: plan(*given, exact=False),
        lambda *given: plan(*given, room=False),
        lambda *given: plan(*given, on=False),
        stops_early,
    ],
    check_introduce: [
        lambda optimizer, old, new: optimizer.add_param_group({"params": [new], "lr": 0.01}),
        lambda optimizer, old, new: optimizer.param_groups[0]["params"].append(new),
        lambda optimizer, old, new: (
            [group["params"].append(new) for group in optimizer.param_groups] and None
        ),
        with_the_state_of_old,
        with_state_cleared,
        by_replacing,
        lambda optimizer, old, new: None,
    ],
}
RIGHT = {
    check_growth: [grow, grow_in_front_of_nothing],
    check_sensitivity: [
        lambda A, B, gA, gB: (B * gB).sum(0).abs().sum() / math.sqrt(A.shape[1] * B.shape[0]),
        lambda A, B, gA, gB: (
            torch.diagonal(A @ gA.T).abs().sum().item() / (A.shape[1] * B.shape[0]) ** 0.5
        ),
    ],
    check_plan: [plan, plan_one_by_one],
    check_introduce: [introduce],
}
