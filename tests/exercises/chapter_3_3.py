"""Wrong and right answers to the exercises of chapter 3.3."""

import heapq
import math

import numpy as np
import torch
from torch.nn import functional as F

from lora_course.classroom.chapter_3_3 import (
    check_best_weights,
    check_losses_of_a_run,
    check_offer,
    check_out_of_span,
)
from lora_course.continual import metrics
from tests.exercises import Answers

run = Answers(check_losses_of_a_run)


def numbers(R, alone, best=lambda R, j: R[j + 1 :, j].min(), seen=lambda R, j: R[j + 1, j]):
    T = R.shape[1]
    lost = [R[T, j] - best(R, j) for j in range(T - 1)]
    return sum(lost) / max(1, T - 1), sum(seen(R, j) - alone[j] for j in range(T)) / T


def then(change):
    return lambda R, alone: change(*numbers(R, alone), R.shape[1])


def unlike(**other):
    return lambda R, alone: numbers(R, alone, **other)


run.wrong("forgetting turned", then(lambda f, i, T: (-f, i)))
run.wrong("intransigence turned", then(lambda f, i, T: (f, -i)))
run.wrong("exchanged", then(lambda f, i, T: (i, f)))
run.wrong("forgetting over T", then(lambda f, i, T: (f * (T - 1) / T, i)))
run.wrong("intransigence over T − 1", then(lambda f, i, T: (f, i * T / max(1, T - 1))))
run.wrong("sums", then(lambda f, i, T: (f * max(1, T - 1), i * T)))
run.wrong("sum of the first", then(lambda f, i, T: (f * max(1, T - 1), i)))
run.wrong("from the diagonal, as BWT", unlike(best=lambda R, j: R[j + 1, j]))
run.wrong(
    "the package's BWT",
    lambda R, alone: (-metrics(R)["BWT"] if R.shape[1] > 1 else 0.0, numbers(R, alone)[1]),
)
run.wrong("the best of all rows", unlike(best=lambda R, j: R[:, j].min()))
run.wrong("the best of trained rows", unlike(best=lambda R, j: R[1:, j].min()))
run.wrong("from row j", unlike(best=lambda R, j: R[j:, j].min()))
run.wrong("from row j + 2", unlike(best=lambda R, j: R[min(j + 2, len(R) - 1) :, j].min()))
run.wrong("the worst", unlike(best=lambda R, j: R[j + 1 :, j].max()))
run.wrong("the mean since", unlike(best=lambda R, j: R[j + 1 :, j].mean()))
run.wrong(
    "without the last row",
    unlike(best=lambda R, j: R[j + 1 : -1, j].min() if j + 2 < len(R) else R[j + 1, j]),
)
run.wrong("row 0", unlike(best=lambda R, j: R[0, j]))
run.wrong("intransigence of the last row", unlike(seen=lambda R, j: R[-1, j]))
run.wrong("intransigence one row up", unlike(seen=lambda R, j: R[j, j]))
run.wrong("intransigence of the best", unlike(seen=lambda R, j: R[j + 1 :, j].min()))
run.wrong("intransigence of row 0", unlike(seen=lambda R, j: R[0, j]))
run.wrong(
    "magnitudes", lambda R, alone: (numbers(R, alone)[0], (R[1:].diagonal() - alone).abs().mean())
)
run.wrong(
    "cut at zero",
    lambda R, alone: (numbers(R, alone)[0], (R[1:].diagonal() - alone).clamp(min=0).mean()),
)
run.wrong(
    "NaN for one task",
    lambda R, alone: (numbers(R, alone)[0] if len(alone) > 1 else math.nan, numbers(R, alone)[1]),
)
run.wrong("forgetting only", lambda R, alone: numbers(R, alone)[0])
run.wrong(
    "for each task",
    lambda R, alone: (
        [R[-1, j] - R[j + 1 :, j].min() for j in range(len(alone) - 1)],
        R[1:].diagonal() - alone,
    ),
)
run.wrong(
    "the last task counts",
    lambda R, alone: (
        sum(R[-1, j] - R[j + 1 :, j].min() for j in range(len(alone))) / len(alone),
        numbers(R, alone)[1],
    ),
)


@run.wrong("overwrites the matrix")
def _(R, alone):
    answer = numbers(R, alone)
    R[0] = 0
    return answer


run.right("as the solution", numbers)
run.right("Python's numbers", lambda R, alone: tuple(float(n) for n in numbers(R, alone)))
run.right("a list", lambda R, alone: list(numbers(R, alone)))
run.right("in 64 bits", lambda R, alone: numbers(R.double(), alone.double()))
run.right("one tensor", lambda R, alone: torch.tensor([float(n) for n in numbers(R, alone)]))
run.right("by name only", lambda *, R, alone: numbers(R, alone))


@run.right("with a mask")
def _(R, alone):
    T = R.shape[1]
    later = torch.ones(T, T).tril().bool()
    best = R[1:].masked_fill(~later, math.inf).amin(0)
    forgotten = (R[-1] - best)[:-1]
    return (forgotten.mean() if T > 1 else 0.0), (R[1:].diagonal() - alone).mean()


@run.right("numpy")
def _(R, alone):
    r = R.numpy()[::-1]
    best = np.minimum.accumulate(r, 0)[::-1]
    T = r.shape[1]
    f = np.mean([r[0, j] - best[j + 1, j] for j in range(T - 1)]) if T > 1 else np.float32(0)
    return f, np.mean(np.diagonal(r[::-1][1:]) - alone.numpy())


memory = Answers(check_offer)


def offered(
    m,
    row,
    w,
    u,
    c,
    key=lambda u, w: math.log(u) / w,
    copy=torch.clone,
    keep=lambda pairs, c: sorted(pairs, key=lambda pair: -pair[0])[:c],
):
    m[:] = keep([*m, (key(u, w), copy(row))], c)


def kept(keep):
    return lambda *given: offered(*given, keep=keep)


def keyed(key):
    return lambda *given: offered(*given, key=key)


memory.wrong("nothing", lambda *given: None)
memory.wrong("always appended", lambda m, row, w, u, c: m.append((math.log(u) / w, row.clone())))
memory.wrong(
    "never once full", lambda m, row, w, u, c: offered(m, row, w, u, c) if len(m) < c else None
)
memory.wrong("weights ignored", keyed(lambda u, w: math.log(u)))
memory.wrong("times the weight", keyed(lambda u, w: math.log(u) * w))
memory.wrong("log u + log w", keyed(lambda u, w: math.log(u) + math.log(w)))
memory.wrong("the key itself", keyed(lambda u, w: u ** (1 / w)))
memory.wrong("log of the key", keyed(lambda u, w: math.log(max(u ** (1 / w), 1e-300))))
memory.wrong("log₂", keyed(lambda u, w: math.log2(u) / w))
memory.wrong("u / w", keyed(lambda u, w: u / w))
memory.wrong("positive", keyed(lambda u, w: -math.log(u) / w))
memory.wrong("1 − u", keyed(lambda u, w: math.log(1 - u) / w))
memory.wrong(
    "the smallest stay", kept(lambda pairs, c: sorted(pairs, key=lambda pair: pair[0])[:c])
)
memory.wrong("the newest stay", kept(lambda pairs, c: pairs[-c:]))
memory.wrong("the oldest stay", kept(lambda pairs, c: pairs[:c]))
memory.wrong(
    "one too few", kept(lambda pairs, c: sorted(pairs, key=lambda pair: -pair[0])[: max(1, c - 1)])
)
memory.wrong(
    "one too many", kept(lambda pairs, c: sorted(pairs, key=lambda pair: -pair[0])[: c + 1])
)
memory.wrong(
    "the smallest always goes",
    kept(lambda pairs, c: [*sorted(pairs[:-1], key=lambda pair: -pair[0])[: c - 1], pairs[-1]]),
)
memory.wrong(
    "the oldest goes",
    kept(
        lambda pairs, c: (
            pairs
            if len(pairs) <= c
            else pairs[1:]
            if pairs[-1][0] > min(key for key, _ in pairs[:-1])
            else pairs[:-1]
        )
    ),
)
memory.wrong(
    "the largest goes",
    kept(
        lambda pairs, c: pairs if len(pairs) <= c else sorted(pairs, key=lambda pair: pair[0])[:c]
    ),
)
memory.wrong("not a copy", lambda *given: offered(*given, copy=lambda row: row))
memory.wrong("a view", lambda *given: offered(*given, copy=lambda row: row[:]))
memory.wrong("numpy's view", lambda *given: offered(*given, copy=lambda row: row.numpy()))
memory.wrong(
    "rows only",
    lambda m, row, w, u, c: m.__setitem__(slice(None), [r for _, r in m][: c - 1] + [row.clone()]),
)
memory.wrong(
    "(row, key)",
    lambda m, row, w, u, c: (
        m.append((row.clone(), math.log(u) / w)) if len(m) < c else offered(m, row, w, u, c)
    ),
)
memory.wrong("capacity 4", lambda m, row, w, u, c: offered(m, row, w, u, 4))
memory.wrong("a new list", lambda m, row, w, u, c: [*m, (math.log(u) / w, row.clone())])
memory.wrong(
    "the first smaller goes",
    kept(
        lambda pairs, c: (
            pairs
            if len(pairs) <= c
            else (
                lambda i: (
                    [*pairs[:i], pairs[-1], *pairs[i + 1 : -1]] if i is not None else pairs[:-1]
                )
            )(next((i for i, pair in enumerate(pairs[:-1]) if pair[0] < pairs[-1][0]), None))
        )
    ),
)


@memory.wrong("old rows are damaged")
def _(m, row, w, u, c):
    offered(m, row, w, u, c)
    for _, kept in m[1:]:
        kept.zero_()


@memory.wrong("keys are forgotten")
def _(m, row, w, u, c):
    offered(m, row, w, u, c)
    m[:] = [(0.0, kept) for _, kept in m]


memory.right("as the solution", offered)
memory.right(
    "a list for a pair",
    lambda *given: offered(
        *given,
        keep=lambda pairs, c: [
            [float(key), row] for key, row in sorted(pairs, key=lambda pair: -pair[0])[:c]
        ],
    ),
)
memory.right("numpy's logarithm", keyed(lambda u, w: np.log(u) / w))
memory.right(
    "torch's logarithm", keyed(lambda u, w: torch.tensor(u, dtype=torch.float64).log() / w)
)
memory.right(
    "by name only",
    lambda *, memory, row, weight, number, capacity: offered(memory, row, weight, number, capacity),
)
memory.right(
    "a row as a copied array", lambda *given: offered(*given, copy=lambda row: row.numpy().copy())
)


@memory.right("in the place of the smallest")
def _(m, row, w, u, c):
    key = math.log(u) / w
    if len(m) < c:
        m.append((key, row.clone()))
        return
    place = min(range(len(m)), key=lambda i: m[i][0])
    if key > m[place][0]:
        m[place] = (key, row.detach().clone())


@memory.right("a heap")
def _(m, row, w, u, c):
    heap = [(key, i, r) for i, (key, r) in enumerate(m)]
    heapq.heapify(heap)
    heapq.heappush(heap, (math.log(u) / w, len(m), row.clone()))
    while len(heap) > c:
        heapq.heappop(heap)
    m[:] = [(key, r) for key, _, r in heap]


best = Answers(check_best_weights)


def dot(one, other):
    (A, B, s), (C, D, t) = one, other
    return s * t * ((B.T.double() @ D.double()) * (A.double() @ C.double().T)).sum()


def solved(adapters, target, dot=dot, solve=torch.linalg.solve):
    gram = torch.stack([torch.stack([dot(a, b) for b in adapters]) for a in adapters])
    return solve(gram, torch.stack([dot(a, target) for a in adapters]))


def by(dot):
    return lambda adapters, target: solved(adapters, target, dot)


def solving(solve):
    return lambda adapters, target: solved(adapters, target, solve=solve)


def flat(one):
    A, B, s = one
    return (s * B @ A).flatten()


def scaled(change):
    return lambda adapters, target: solved([change(one) for one in adapters], change(target))


best.wrong("each by itself", solving(lambda G, g: g / G.diagonal()))
best.wrong("the right side", solving(lambda G, g: g))
best.wrong(
    "cosines",
    lambda adapters, target: solved(
        adapters, target, solve=lambda G, g: g / (G.diagonal() * dot(target, target)).sqrt()
    ),
)
best.wrong(
    "sum of one", solving(lambda G, g: torch.linalg.solve(G, g) / torch.linalg.solve(G, g).sum())
)
best.wrong("softmax", solving(lambda G, g: torch.linalg.solve(G, g).softmax(0)))
best.wrong("not negative", solving(lambda G, g: torch.linalg.solve(G, g).clamp(min=0)))
best.wrong("magnitudes", solving(lambda G, g: torch.linalg.solve(G, g).abs()))
best.wrong("turned", solving(lambda G, g: -torch.linalg.solve(G, g)))
best.wrong(
    "a ridge",
    solving(lambda G, g: torch.linalg.solve(G + G.diagonal().mean() * torch.eye(len(G)), g)),
)
best.wrong("the Gram matrix squared", solving(lambda G, g: torch.linalg.solve(G @ G, g)))
best.wrong("multiplied by the Gram matrix", solving(lambda G, g: G @ g))
best.wrong("upper half", solving(lambda G, g: torch.linalg.solve(G.triu(), g)))
best.wrong("no scalings", scaled(lambda one: (*one[:2], 1.0)))
best.wrong("scalings' magnitude", scaled(lambda one: (*one[:2], abs(one[2]))))
best.wrong(
    "the target's scaling missing", lambda adapters, target: solved(adapters, (*target[:2], 1.0))
)
best.wrong(
    "the adapters' scalings missing",
    lambda adapters, target: solved([(A, B, 1.0) for A, B, _ in adapters], target),
)
best.wrong(
    "equal weights", lambda adapters, target: torch.full((len(adapters),), 1 / len(adapters))
)
best.wrong("ones", lambda adapters, target: torch.ones(len(adapters)))
best.wrong(
    "the nearest alone",
    solving(
        lambda G, g: (lambda w: torch.where(w.abs() == w.abs().max(), w, 0.0))(g / G.diagonal())
    ),
)
best.wrong(
    "through the updates",
    lambda adapters, target: torch.linalg.lstsq(
        torch.stack([flat(a) for a in adapters], 1), flat(target)[:, None]
    ).solution[:, 0],
)
best.wrong("through each pair of updates", by(lambda one, other: flat(one) @ flat(other)))
best.wrong("A alone", by(lambda one, other: (one[0] @ other[0].T).square().sum().double()))
best.wrong("B alone", by(lambda one, other: (one[1].T @ other[1]).square().sum().double()))
best.wrong(
    "sums multiplied",
    by(
        lambda one, other: (
            one[2] * other[2] * (one[1].T @ other[1]).sum().double() * (one[0] @ other[0].T).sum()
        )
    ),
)
best.wrong(
    "the trace of the wrong product",
    by(
        lambda one, other: (
            one[2] * other[2] * ((one[1].T @ other[1]) @ (one[0] @ other[0].T).T).sum().double()
        )
    ),
)
best.wrong("the first two", lambda adapters, target: solved(adapters[:2], target))
best.wrong(
    "without the last",
    lambda adapters, target: (
        torch.cat([solved(adapters[:-1], target), torch.zeros(1)])
        if len(adapters) > 1
        else solved(adapters, target)
    ),
)
best.wrong("a column", lambda adapters, target: solved(adapters, target)[:, None])
best.wrong("rounded", lambda adapters, target: solved(adapters, target).round(decimals=1))


@best.wrong("scales the caller's B")
def _(adapters, target):
    for _, B, s in adapters:
        B.mul_(s)
    return solved([(A, B, 1.0) for A, B, _ in adapters], target)


best.right("as the solution", solved)
best.right(
    "in 32 bits",
    by(
        lambda one, other: torch.as_tensor(
            one[2] * other[2] * ((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum()
        )
    ),
)
best.right("a list", lambda adapters, target: solved(adapters, target).tolist())
best.right("by name only", lambda *, adapters, target: solved(adapters, target))
best.right(
    "least squares of the equations",
    solving(lambda G, g: torch.linalg.lstsq(G, g[:, None]).solution[:, 0]),
)
best.right(
    "Cholesky",
    solving(lambda G, g: torch.cholesky_solve(g[:, None], torch.linalg.cholesky(G))[:, 0]),
)
best.right(
    "numpy",
    lambda adapters, target: solved(
        adapters, target, solve=lambda G, g: np.linalg.solve(G.numpy(), g.numpy())
    ),
)
best.right(
    "a trace",
    by(
        lambda one, other: (
            one[2]
            * other[2]
            * torch.trace(
                one[0].double() @ other[0].double().T @ other[1].double().T @ one[1].double()
            )
        )
    ),
)


@best.right("in the factors' own coordinates")
def _(adapters, target):
    everyone = [*adapters, target]
    QA = torch.linalg.qr(torch.cat([A.double() for A, _, _ in everyone]).T).Q
    QB = torch.linalg.qr(torch.cat([B.double() for _, B, _ in everyone], 1)).Q
    cores = torch.stack(
        [(s * (QB.T @ B.double()) @ (A.double() @ QA)).flatten() for A, B, s in everyone]
    )
    return torch.linalg.pinv(cores[:-1].T) @ cores[-1]


span = Answers(check_out_of_span)


def basis(P):
    _, S, V = torch.linalg.svd(P, full_matrices=False)
    return V[1e-4 * S.max() < S]


def rest(past, G):
    if not past:
        return G.clone()
    V = basis(torch.cat(past))
    return G - G @ V.T @ V


def stacked(make):
    return lambda past, G: make(torch.cat(past), G) if past else G.clone()


def gram_schmidt(rows, G, reorthogonal=True):
    found = []
    for v in rows.double():
        w = v - sum(((w @ v) * w for w in found), 0 * v)
        if w.norm() > 1e-5 * v.norm() and v.norm() > 0:
            found.append(w / w.norm())
    V = torch.stack(found)
    return (G.double() - G.double() @ V.T @ V).float()


span.wrong("nothing", lambda past, G: G.clone())
span.wrong("the part in the span", lambda past, G: G - rest(past, G))
span.wrong("zeros", lambda past, G: 0 * G)
span.wrong("no basis", stacked(lambda P, G: G - G @ P.T @ P))
span.wrong("rows of length one", stacked(lambda P, G: G - G @ F.normalize(P).T @ F.normalize(P)))
span.wrong("adapters of norm one", stacked(lambda P, G: G - G @ P.T @ P / P.square().sum()))
span.wrong(
    "one after the other",
    lambda past, G: (
        rest(past[1:2], rest(past[:1], G))
        if len(past) < 3
        else rest(past[2:], rest(past[1:2], rest(past[:1], G)))
    ),
)
span.wrong(
    "one row after the other",
    lambda past, G: stacked(lambda P, G: rest([P[-1:]], rest([P[:1]], G)))(past, G),
)
span.wrong("projections summed", lambda past, G: G - sum((G - rest([A], G) for A in past), 0 * G))
span.wrong("the last", lambda past, G: rest(past[-1:], G))
span.wrong("the first", lambda past, G: rest(past[:1], G))
span.wrong("the first two", lambda past, G: rest(past[:2], G))
span.wrong("QR", stacked(lambda P, G: (lambda Q: G - G @ Q @ Q.T)(torch.linalg.qr(P.T).Q)))
span.wrong(
    "SVD, all directions",
    stacked(lambda P, G: (lambda V: G - G @ V.T @ V)(torch.linalg.svd(P, full_matrices=False).Vh)),
)
span.wrong(
    "inverse of the Gram matrix", stacked(lambda P, G: G - G @ P.T @ torch.linalg.inv(P @ P.T) @ P)
)
span.wrong(
    "a ridge", stacked(lambda P, G: G - G @ P.T @ torch.linalg.inv(P @ P.T + torch.eye(len(P))) @ P)
)
span.wrong("the mean of past rows", stacked(lambda P, G: rest([P.mean(0, keepdim=True)], G)))
span.wrong(
    "the sum of the A's", lambda past, G: rest([sum(A[:2] for A in past)], G) if past else G.clone()
)
span.wrong(
    "the largest direction",
    stacked(
        lambda P, G: (lambda V: G - G @ V.T @ V)(torch.linalg.svd(P, full_matrices=False).Vh[:1])
    ),
)
span.wrong("turned", lambda past, G: -rest(past, G))
span.wrong("too much taken off", lambda past, G: 2 * rest(past, G) - G)
span.wrong("normalised", lambda past, G: F.normalize(rest(past, G)))
span.wrong("row space of the gradient", lambda past, G: rest([G[:1]], G) if past else G.clone())
span.wrong(
    "left span",
    stacked(lambda P, G: (lambda U: G - U @ U.T @ G)(torch.linalg.qr(P[:, : len(G)].T).Q)),
)
span.wrong("stops without a past", lambda past, G: rest([torch.cat(past)], G))


@span.wrong("in the caller's gradient")
def _(past, gradient):
    gradient.copy_(rest(past, gradient))
    return gradient


@span.wrong("normalises the caller's past")
def _(past, gradient):
    answer = rest(past, gradient)
    for A in past:
        A.div_(A.norm())
    return answer


span.right("as the solution", rest)
span.right("a pseudo-inverse", stacked(lambda P, G: G - G @ torch.linalg.pinv(P, rtol=1e-4) @ P))
span.right(
    "torch's default tolerance",
    stacked(lambda P, G: G - G @ torch.linalg.pinv(P.double(), rtol=1e-5).float() @ P),
)
span.right("Gram–Schmidt", stacked(gram_schmidt))
span.right("in 64 bits", lambda past, gradient: rest([A.double() for A in past], gradient.double()))
span.right(
    "least squares",
    stacked(
        lambda P, G: G - torch.linalg.lstsq(P.T, G.T, rcond=1e-4, driver="gelsd").solution.T @ P
    ),
)
span.right(
    "the null space",
    stacked(
        lambda P, G: (
            lambda svd: (lambda N: G @ N.T @ N)(svd.Vh[int((1e-4 * svd.S.max() < svd.S).sum()) :])
        )(torch.linalg.svd(P, full_matrices=True))
    ),
)
span.right(
    "eigenvectors",
    stacked(
        lambda P, G: (
            lambda L, V: (lambda N: G - (G.double() @ N @ N.T).float())(V[:, 1e-8 * L.max() < L])
        )(*torch.linalg.eigh(P.double().T @ P.double()))
    ),
)


@span.right("numpy")
def _(past, gradient):
    g = gradient.numpy()
    if not past:
        return g.copy()
    P = np.concatenate([A.numpy() for A in past])
    return g - g @ np.linalg.pinv(P, rcond=1e-4) @ P


span.equivalent(
    "sizes > 1e-05 * sizes.max() → sizes >= 1e-05 * sizes.max()", "no singular value is that number"
)

memory.equivalent(
    "memory.sort(key=lambda pair: pair[0], reverse=True) → memory.sort(reverse=True)",
    "no two keys are equal",
)
memory.equivalent("pair[0] → pair", "no two keys are equal")

best.equivalent("s * t → t", "each equation may be divided by its adapter's scaling")
best.equivalent("inner(a, b) → inner(b, a)", "the products are symmetric")
best.equivalent("inner(a, target) → inner(target, a)", "the products are symmetric")
