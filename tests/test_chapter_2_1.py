"""The exercises of chapter 2.1: plausible wrong answers are rejected, each with its own message; right ones pass."""

import torch
from torch.nn import functional as F

from lora_course.classroom.chapter_2_1 import check_balance, check_sequence_gates, check_top_k
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def choose(logits, k, renormalise=True, mask=float("-inf")):
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)
    if not renormalise:
        return logits.softmax(-1) * chosen
    return logits.masked_fill(~chosen, mask).softmax(-1)


def one_by_one(logits, k):
    gates = torch.zeros_like(logits)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in logits.shape[:-1])).tolist():
        p = logits[tuple(index)].softmax(0)
        kept = p.argsort(descending=True)[:k]
        gates[tuple(index)][kept] = p[kept] / p[kept].sum()
    return gates


def share(p, real):
    return (F.one_hot(p.argmax(-1), p.shape[-1]) * real[..., None]).sum((0, 1)) / real.sum()


def mean(p, real):
    return (p * real[..., None]).sum((0, 1)) / real.sum()


def gates(hidden, real, W, prefix, pool=None, own=True):
    inside = real.long().cumsum(1) <= prefix
    pool = (inside & real) if pool is None else pool
    pooled = F.normalize((F.normalize(hidden, dim=-1) * pool[..., None]).sum(1), dim=-1)
    p = (pooled @ W.T).softmax(-1)[:, None].expand(-1, hidden.shape[1], -1)
    return torch.where(inside[..., None], torch.full_like(p, 1 / len(W)), p) if own else p


def row_by_row(hidden, real, W, prefix):
    out = torch.full((*hidden.shape[:2], len(W)), 1 / len(W))
    for row, mask in enumerate(real):
        positions = mask.nonzero().flatten()
        unit = torch.stack([h / h.norm() for h in hidden[row, positions[:prefix]]]).mean(0)
        out[row, positions[prefix:]] = (W @ (unit / unit.norm())).softmax(0)
    return out


def first_columns(real, prefix):
    return (torch.arange(real.shape[1]) < prefix)[None].expand_as(real)


WRONG = {
    check_top_k: [
        lambda logits, k: logits.softmax(-1),
        lambda logits, k: choose(logits, k, renormalise=False),
        lambda logits, k: choose(logits, k, mask=0.0),
        lambda logits, k: choose(logits, k, renormalise=False).gt(0).float() / k,
        lambda logits, k: logits.softmax(-1).topk(k).values,
        lambda logits, k: choose(logits, 2),
    ],
    check_balance: [
        lambda p, real: (share(p, real) * mean(p, real)).sum(),
        lambda p, real: p.shape[-1] * mean(p, real).square().sum(),
        lambda p, real: p.shape[-1] * share(p, real).square().sum(),
        lambda p, real: p.shape[-1] * (share(p, torch.ones_like(real)) * p.mean((0, 1))).sum(),
        lambda p, real: p.shape[-1] * (share(p, real) * p.mean((0, 1))).sum(),
        lambda p, real: (p.shape[-1] * (share(p, real) * mean(p, real)).sum()).item(),
    ],
    check_sequence_gates: [
        lambda h, real, W, prefix: gates(h, real, W, prefix, pool=real),
        lambda h, real, W, prefix: gates(h, real, W, prefix, own=False),
        lambda h, real, W, prefix: gates(h, torch.ones_like(real), W, prefix),
        lambda h, real, W, prefix: gates(h, real, W, 3),
        lambda h, real, W, prefix: gates(h, real, W, prefix)[:, 0],
        lambda h, real, W, prefix: torch.where(
            (real.long().cumsum(1) <= prefix)[..., None], 0.25, (h @ W.T).softmax(-1)
        ),
    ],
}
RIGHT = {
    check_top_k: [choose, one_by_one],
    check_balance: [
        lambda p, real: p.shape[-1] * (share(p, real) * mean(p, real)).sum(),
        lambda p, real: p.shape[-1] * (share(p[real][None], real[real][None]) @ p[real].mean(0)),
    ],
    check_sequence_gates: [gates, row_by_row],
}
