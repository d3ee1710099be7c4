"""The exercises of chapter 3.3: plausible wrong answers are rejected, each with its own message; right ones pass."""

import torch

from lora_course.classroom.chapter_3_3 import (
    check_merge,
    check_metrics,
    check_overlap,
    check_reservoir,
)
from lora_course.continual import metrics
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def matrix_metrics(
    R, *, rows=slice(-1, None), sign=-1, last=-1, before=1, count=-1, start=0, ahead=1
):
    T = R.shape[1]
    acc = R[rows].mean()
    reference = R[before:].diagonal()[:T]
    bwt = sign * (R[last] - reference)[:count].sum() / (T - 1 if count == -1 else T)
    fwt = sign * (R[1:].diagonal(ahead)[: T - 1] - R[start, 1:]).mean()
    return acc.item(), bwt.item(), fwt.item()


def in_loops(R):
    T = R.shape[1]
    acc = sum(R[T, j].item() for j in range(T)) / T
    bwt = sum((R[j + 1, j] - R[T, j]).item() for j in range(T - 1)) / (T - 1)
    fwt = sum((R[0, j] - R[j, j]).item() for j in range(1, T)) / (T - 1)
    return acc, bwt, fwt


def fwt_of_row_j(R):
    acc, bwt, _ = in_loops(R)
    return acc, bwt, -(R[1:].diagonal() - R[0])[1:].mean().item()


def fwt_over_all(R):
    acc, bwt, fwt = in_loops(R)
    return acc, bwt, fwt * (R.shape[1] - 1) / R.shape[1]


def fwt_with_wrong_sign(R):
    acc, bwt, fwt = in_loops(R)
    return acc, bwt, -fwt


def reservoir(memory, row, seen, capacity, draw, *, copy=True, places=lambda seen: seen + 1):
    row = row.clone() if copy else row
    if len(memory) < capacity:
        memory.append(row)
    elif (place := draw(places(seen))) < capacity:
        memory[place] = row


def reservoir_by_coin(memory, row, seen, capacity, draw):
    """Decides first, then draws the place; an answer by another way."""
    if seen < capacity:
        memory.insert(0, row.clone())
    elif draw(seen + 1) >= seen + 1 - capacity:
        memory.pop(draw(capacity))
        memory.append(row.clone())


def queue(memory, row, seen, capacity, draw):
    memory.append(row.clone())
    del memory[:-capacity]


def first_come(memory, row, seen, capacity, draw):
    if len(memory) < capacity:
        memory.append(row.clone())


def always_in(memory, row, seen, capacity, draw):
    if len(memory) < capacity:
        memory.append(row.clone())
    else:
        memory[draw(capacity)] = row.clone()


def half(memory, row, seen, capacity, draw):
    if len(memory) < capacity:
        memory.append(row.clone())
    elif draw(2):
        memory[draw(capacity)] = row.clone()


def merge(
    adapters,
    weights,
    *,
    in_A=lambda w, s: 1.0,
    in_B=lambda w, s: w * s,
    alpha=lambda r: float(r),
    scale=lambda a, r: a / r,
):
    pairs = [(A, B, w, scale(a, A.shape[0])) for (A, B, a), w in zip(adapters, weights)]
    A = torch.cat([in_A(w, s) * A for A, _, w, s in pairs])
    B = torch.cat([in_B(w, s) * B for _, B, w, s in pairs], 1)
    return A, B, alpha(A.shape[0])


def merge_by_svd(adapters, weights):
    delta = sum(w * alpha / A.shape[0] * B @ A for (A, B, alpha), w in zip(adapters, weights))
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return S[:, None] * Vh, U, float(len(S))


def padded_mean(adapters, weights):
    """Averages the factors, with the smaller rank padded with zeros."""
    r = max(A.shape[0] for A, _, _ in adapters)
    pad = torch.nn.functional.pad
    A = sum(w * pad(A, (0, 0, 0, r - A.shape[0])) for (A, _, _), w in zip(adapters, weights))
    B = sum(w * pad(B, (0, r - B.shape[1])) for (_, B, _), w in zip(adapters, weights))
    return A, B, float(r)


def in_place(adapters, weights):
    for (A, B, alpha), w in zip(adapters, weights):
        B.mul_(w * alpha / A.shape[0])
    return (
        torch.cat([A for A, _, _ in adapters]),
        torch.cat([B for _, B, _ in adapters], 1),
        float(sum(len(A) for A, _, _ in adapters)),
    )


def overlap(past, A, *, entry=torch.abs, total=torch.sum):
    return sum((total(entry(P @ A.T)) for P in past), torch.zeros(()))


def overlap_by_rows(past, A):
    rows = [old @ new for P in past for old in P for new in A]
    return torch.stack([product.abs() for product in rows]).sum() if rows else torch.tensor(0.0)


WRONG = {
    check_metrics: [
        lambda R: in_loops(R)[:2],
        lambda R: matrix_metrics(R, rows=slice(1, None)),
        lambda R: matrix_metrics(R, rows=slice(-2, -1)),
        lambda R: matrix_metrics(R, sign=1),
        lambda R: matrix_metrics(R, count=None),
        lambda R: matrix_metrics(R, before=0),
        lambda R: (in_loops(R)[0], -(R[-1] - R[0])[:-1].mean().item(), 0),
        fwt_of_row_j,
        fwt_over_all,
        fwt_with_wrong_sign,
        lambda R: (*in_loops(R)[:2], 0.0),
    ],
    check_reservoir: [
        queue,
        first_come,
        always_in,
        half,
        lambda *given: reservoir(*given, copy=False),
        lambda *given: reservoir(*given, places=lambda seen: seen),
        lambda memory, row, seen, capacity, draw: memory.append(row.clone()),
        lambda memory, row, seen, capacity, draw: memory.append(row.clone()) if not seen else None,
    ],
    check_merge: [
        padded_mean,
        in_place,
        lambda a, w: merge(a, w, in_B=lambda w, s: s),
        lambda a, w: merge(a, w, in_B=lambda w, s: w),
        lambda a, w: merge(a, w, in_A=lambda w, s: w),
        lambda a, w: merge(a, w, in_A=lambda w, s: s),
        lambda a, w: merge(a, w, alpha=lambda r: 1.0),
        lambda a, w: merge(a, w, scale=lambda a, r: a),
        lambda a, w: merge(a, w)[:2],
        lambda a, w: (torch.zeros(5, 6), torch.zeros(9, 5), 5.0),
    ],
    check_overlap: [
        lambda past, A: overlap(past, A, entry=lambda x: x),
        lambda past, A: overlap(past, A, entry=torch.square),
        lambda past, A: overlap(past, A, total=torch.mean),
        lambda past, A: overlap(past[-1:], A),
        lambda past, A: (past[0] * A).abs().sum() if past else torch.tensor(0.0),
        lambda past, A: overlap(
            [P / P.norm(dim=1, keepdim=True) for P in past], A / A.norm(dim=1, keepdim=True)
        ),
        lambda past, A: overlap(past, A.detach()),
        lambda past, A: overlap(past, A).item(),
        lambda past, A: overlap(past, A) + A.square().sum(),
    ],
}
RIGHT = {
    check_metrics: [in_loops, matrix_metrics, lambda R: tuple(metrics(R).values())],
    check_reservoir: [reservoir, reservoir_by_coin],
    check_merge: [
        merge,
        merge_by_svd,
        lambda a, w: merge(a, w, in_A=lambda w, s: s, in_B=lambda w, s: w),
    ],
    check_overlap: [overlap, overlap_by_rows],
}
