"""Wrong and right answers to the exercises of chapter 3.3."""

import heapq
import math

import numpy as np
import torch
from torch.nn import functional as F

from lora_course.classroom.chapter_3_3 import (
    check_cosines,
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


alike = Answers(check_cosines)


def dot(one, other):
    (A, B, s), (C, D, t) = one, other
    return s * t * ((B.T.double() @ D.double()) * (A.double() @ C.double().T)).sum()


def table(adapters, dot=dot, norm=None):
    norm = (lambda one: dot(one, one).clamp(min=0).sqrt()) if norm is None else norm
    rows = []
    for one in adapters:
        rows.append([])
        for other in adapters:
            both = dot(one, other)
            rows[-1].append(float(both / (norm(one) * norm(other))) if both != 0 else 0.0)
    return torch.tensor(rows)


def by(dot):
    return lambda adapters: table(adapters, dot)


def flat(one):
    A, B, s = one
    return (s * B @ A).flatten()


alike.wrong(
    "through the updates",
    lambda adapters: (
        F.normalize(torch.stack([flat(one) for one in adapters]))
        @ F.normalize(torch.stack([flat(one) for one in adapters])).T
    ),
)
alike.wrong(
    "through each pair of updates",
    lambda adapters: table(adapters, lambda one, other: flat(one) @ flat(other)),
)
alike.wrong("no scalings", lambda adapters: table([(A, B, 1.0) for A, B, _ in adapters]))
alike.wrong("scalings' magnitude", lambda adapters: table([(A, B, abs(s)) for A, B, s in adapters]))
alike.wrong("products", lambda adapters: table(adapters, norm=lambda one: 1))
alike.wrong("over squared norms", lambda adapters: table(adapters, norm=lambda one: dot(one, one)))
alike.wrong(
    "norms of the factors",
    lambda adapters: table(adapters, norm=lambda one: abs(one[2]) * one[0].norm() * one[1].norm()),
)
alike.wrong(
    "1e-8 in the norm",
    lambda adapters: table(adapters, norm=lambda one: dot(one, one).sqrt() + 1e-3),
)
alike.wrong(
    "1e-8 in the denominator",
    lambda adapters: torch.stack(
        [
            torch.stack(
                [dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt() + 1e-6) for b in adapters]
            )
            for a in adapters
        ]
    ),
)
alike.wrong("A alone", by(lambda one, other: (one[0] @ other[0].T).square().sum().double()))
alike.wrong("B alone", by(lambda one, other: (one[1].T @ other[1]).square().sum().double()))
alike.wrong(
    "part by part",
    by(
        lambda one, other: (
            one[2]
            * other[2]
            * ((one[1].T @ other[1]) * (one[0] @ other[0].T)).diagonal().sum().double()
        )
    ),
)
alike.wrong(
    "products of sums",
    by(
        lambda one, other: (
            one[2] * other[2] * (one[1].T @ other[1]).sum().double() * (one[0] @ other[0].T).sum()
        )
    ),
)
alike.wrong(
    "a matrix product for the entrywise one",
    by(
        lambda one, other: (
            one[2] * other[2] * ((one[1].T @ other[1]) @ (one[0] @ other[0].T).T).sum().double()
        )
    ),
)
alike.wrong("magnitudes", lambda adapters: table(adapters).abs())
alike.wrong("squares", lambda adapters: table(adapters).square())
alike.wrong("angles", lambda adapters: table(adapters).clamp(-1, 1).acos())
alike.wrong("distances", lambda adapters: 1 - table(adapters))
alike.wrong("off the diagonal", lambda adapters: table(adapters).fill_diagonal_(0))
alike.wrong("ones on the diagonal", lambda adapters: table(adapters).fill_diagonal_(1))
alike.wrong("upper half", lambda adapters: table(adapters).triu())
alike.wrong("the first with all", lambda adapters: table(adapters)[0])
alike.wrong(
    "NaN for a zero update",
    lambda adapters: torch.stack(
        [
            torch.stack([dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt()) for b in adapters])
            for a in adapters
        ]
    ),
)
alike.wrong("two adapters", lambda adapters: table(adapters[:2]))
alike.wrong(
    "the smaller rank",
    by(
        lambda one, other: (
            lambda r: dot(
                (one[0][:r], one[1][:, :r], one[2]), (other[0][:r], other[1][:, :r], other[2])
            )
        )(min(len(one[0]), len(other[0])))
    ),
)


@alike.wrong("scales the caller's B")
def _(adapters):
    for _, B, s in adapters:
        B.mul_(s)
    return table([(A, B, 1.0) for A, B, _ in adapters])


alike.right("as the solution", table)
alike.right("a list of lists", lambda adapters: table(adapters).tolist())
alike.right("numpy out", lambda adapters: table(adapters).numpy())
alike.right("in 64 bits", lambda adapters: table(adapters).double())
alike.right(
    "in 32 bits",
    by(
        lambda one, other: one[2] * other[2] * ((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum()
    ),
)
alike.right(
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


@alike.right("all factors stacked")
def _(adapters):
    A = torch.cat([A.double() for A, _, _ in adapters])
    B = torch.cat([s * B.double() for _, B, s in adapters], 1)
    entries = (A @ A.T) * (B.T @ B)
    ranks = [len(A) for A, _, _ in adapters]
    gram = torch.stack(
        [
            torch.stack([block.sum() for block in rows.split(ranks, 1)])
            for rows in entries.split(ranks)
        ]
    )
    norms = gram.diagonal().sqrt()
    return torch.nan_to_num(gram / torch.outer(norms, norms), nan=0.0)


@alike.right("part by part with all parts")
def _(adapters):
    n = len(adapters)
    found = torch.zeros(n, n, dtype=torch.float64)
    for i, (A, B, s) in enumerate(adapters):
        for j, (C, D, t) in enumerate(adapters):
            for a, b in zip(A, B.T, strict=True):
                found[i, j] += s * t * ((C @ a).double() * (D.T @ b)).sum()
    norms = found.diagonal().clamp(min=0).sqrt()
    return torch.where(torch.outer(norms, norms) > 0, found / torch.outer(norms, norms), 0.0)


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


for mutant in ("torch.zeros(n, n)", "torch.zeros(n, n, dtype=torch.float64)"):
    alike.equivalent(f"torch.zeros(n, n, dtype=torch.float64) → {mutant}", "precise enough")
alike.equivalent("torch.zeros → torch.ones", "every entry is written")
alike.equivalent(
    "(norms[:, None] * norms).where(products != 0, 1.0) → (norms[:, None] * norms).where(products != 0, 2.0)",
    "zero divided by it is zero",
)
alike.equivalent(
    "(B.T @ D * (A @ C.T)).sum → (B.T @ D * (A @ C.T)).mean", "the ranks cancel in the cosine"
)
span.equivalent(
    "sizes > 1e-05 * sizes.max() → sizes >= 1e-05 * sizes.max()", "no singular value is that number"
)

memory.equivalent(
    "memory.sort(key=lambda pair: pair[0], reverse=True) → memory.sort(reverse=True)",
    "no two keys are equal",
)
memory.equivalent("pair[0] → pair", "no two keys are equal")
