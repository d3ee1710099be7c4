"""The exercises of chapter 4.2: plausible wrong answers are rejected, each with its own message; right ones pass."""

import torch

from lora_course.classroom.chapter_4_2 import check_branches, check_cut, check_weights
from lora_course.hierarchical import matryoshka_weights
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def share(compare):
    return lambda ranks: [
        sum(compare(b, i) for b in ranks) / len(ranks) for i in range(1, max(ranks) + 1)
    ]


def by_blocks(ranks):
    """Another way: the block between two ranks is in all cuts from the larger on."""
    weights, start = [], 0
    for k, b in enumerate(ranks):
        weights += [(len(ranks) - k) / len(ranks)] * (b - start)
        start = b
    return torch.tensor(weights)


def in_place(A, B, alpha, b):
    answer = A[:b].clone(), B[:, :b].clone(), alpha * b / len(A)
    A[b:] = 0
    return answer


def joined(branches, bias):
    A = torch.cat([branch[0].weight for branch in branches])
    B = torch.cat([branch[1].weight for branch in branches], 1)
    return A, B, bias(branches)


def all_biases(branches):
    return sum(branch[1].weight @ branch[0].bias + branch[1].bias for branch in branches)


WRONG = {
    check_weights: [
        lambda ranks: matryoshka_weights(ranks) * len(ranks),
        lambda ranks: matryoshka_weights(ranks).flip(0),
        share(lambda b, i: b > i),
        share(lambda b, i: b <= i),
        lambda ranks: [1.0] * len(ranks),
        lambda ranks: [1 / i for i in range(1, max(ranks) + 1)],
        lambda ranks: torch.diag(matryoshka_weights(ranks)),
        lambda ranks: [1.0] * (max(ranks) + 1),
    ],
    check_cut: [
        lambda A, B, alpha, b: (A[:b], B[:, :b], alpha),
        lambda A, B, alpha, b: (A[:b], B[:, :b], alpha / len(A)),
        lambda A, B, alpha, b: (A[:b], B[:b], alpha * b / len(A)),
        lambda A, B, alpha, b: (A[-b:], B[:, -b:], alpha * b / len(A)),
        lambda A, B, alpha, b: (A[:b] * alpha / len(A), B[:, :b], alpha * b / len(A)),
        lambda A, B, alpha, b: (A, B, alpha),
        lambda A, B, alpha, b: (A[:b], B[:, :b]),
        in_place,
    ],
    check_branches: [
        lambda branches: joined(branches, lambda _: torch.zeros(7)),
        lambda branches: joined(branches, lambda bs: sum(branch[1].bias for branch in bs)),
        lambda branches: joined(branches, lambda bs: sum(branch[1].weight @ branch[0].bias for branch in bs)),
        lambda branches: joined(branches, lambda bs: 2 * all_biases(bs)),
        lambda branches: (lambda A, B, bias: (A.flip(0), B, bias))(*joined(branches, all_biases)),
        lambda branches: (lambda A, B, bias: (A.T, B.T, bias))(*joined(branches, all_biases)),
        lambda branches: (branches[0][0].weight, branches[0][1].weight, all_biases(branches)),
        lambda branches: joined(branches, all_biases)[:2],
    ],
}  # fmt: skip
RIGHT = {
    check_weights: [matryoshka_weights, by_blocks, share(lambda b, i: b >= i)],
    check_cut: [
        lambda A, B, alpha, b: (A[:b], B[:, :b], alpha * b / len(A)),
        # the scale folded into B, and one of 1 left
        lambda A, B, alpha, b: (A[:b], B[:, :b] * alpha / len(A), float(b)),
    ],
    check_branches: [
        lambda branches: joined(branches, all_biases),
        # the bias as the output for a zero input, and the branches in another order
        lambda branches: joined(
            list(branches)[::-1], lambda bs: sum(branch(torch.zeros(9)) for branch in bs)
        ),
    ],
}
