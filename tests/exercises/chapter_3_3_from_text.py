"""Answers to chapter 3.3's exercises by somebody who has read no more than the text and the stub."""

import collections
import heapq
import math

import numpy as np
import torch
from torch.nn import functional as F

from tests.exercises.chapter_3_3 import best, memory, run, span


def losses(R, alone, *, best=None, over=None, gap=None, tasks=None):
    n = R.shape[1]
    find = best or (lambda R, j: R[j + 1 :, j].min())
    forgotten = sum(R[-1, j] - find(R, j) for j in range(n if tasks else n - 1)) / (
        over(n) if over else max(1, n - 1)
    )
    missed = gap(R, alone) if gap else (R[1:].diagonal() - alone).mean()
    return forgotten + 0.0, missed


def lost(**parts):
    return lambda R, alone: losses(R, alone, **parts)


run.wrong("against what was just learnt", lost(best=lambda R, j: R[j + 1, j]))
run.wrong("the best of all rows", lost(best=lambda R, j: R[:, j].min()))
run.wrong("the worst", lost(best=lambda R, j: R[j + 1 :, j].max()))
run.wrong(
    "the best after it was learnt, without that row", lost(best=lambda R, j: R[j + 2 :, j].min())
)
run.wrong("the row before too", lost(best=lambda R, j: R[j:, j].min()))
run.wrong("the mean since", lost(best=lambda R, j: R[j + 1 :, j].mean()))
run.wrong(
    "the best row by its mean",
    lost(best=lambda R, j: R[j + 1 + int(R[j + 1 :].mean(1).argmin()), j]),
)
run.wrong("over all tasks", lost(over=lambda n: n))
run.wrong("a sum", lost(over=lambda n: 1))
run.wrong(
    "NaN for one task",
    lambda R, a: losses(R, a) if len(a) > 1 else (torch.tensor(float("nan")), losses(R, a)[1]),
)
run.wrong("alone first", lost(gap=lambda R, a: (a - R[1:].diagonal()).mean()))
run.wrong(
    "without the last task",
    lost(
        gap=lambda R, a: (
            (R[1:].diagonal() - a)[:-1].mean() if len(a) > 1 else (R[1:].diagonal() - a).mean()
        )
    ),
)
run.wrong("over one less", lost(gap=lambda R, a: (R[1:].diagonal() - a).sum() / max(1, len(a) - 1)))
run.wrong("the row before", lost(gap=lambda R, a: (R.diagonal() - a).mean()))
run.wrong("the last row", lost(gap=lambda R, a: (R[-1] - a).mean()))
run.wrong("the absolute gap", lost(gap=lambda R, a: (R[1:].diagonal() - a).abs().mean()))
run.wrong("never below 0", lost(gap=lambda R, a: (R[1:].diagonal() - a).clamp(min=0).mean()))
run.wrong("relative", lost(gap=lambda R, a: ((R[1:].diagonal() - a) / a).mean()))
run.wrong("the sum of gaps", lost(gap=lambda R, a: (R[1:].diagonal() - a).sum()))
run.wrong("the two exchanged", lambda R, a: losses(R, a)[::-1])
run.wrong("the sign of forgetting", lambda R, a: (-losses(R, a)[0], losses(R, a)[1]))


@run.wrong("drops row 0 for everybody")
def _(R, alone):
    kept = R.clone()
    R[0] = float("inf")
    return losses(kept, alone)


run.right(
    "a dictionary's values",
    lambda R, a: tuple({"f": float(losses(R, a)[0]), "i": float(losses(R, a)[1])}.values()),
)
run.right("float64", lambda R, a: losses(R.double(), a.double()))
run.right(
    "a tensor of two",
    lambda R, a: torch.stack([torch.as_tensor(v, dtype=R.dtype) for v in losses(R, a)]),
)


@run.right("numpy")
def _(R, alone):
    R, alone = R.numpy()[1:], alone.numpy()
    T = len(alone)
    best = np.where(np.tri(T, dtype=bool), R, np.inf).min(0)
    return float(np.mean((R[-1] - best)[:-1])) if T > 1 else 0.0, (np.diag(R) - alone).mean()


@run.right("lists")
def _(R, alone):
    R, alone = R.tolist()[1:], alone.tolist()
    T = len(R)
    gaps = [R[-1][j] - min(row[j] for row in R[j:]) for j in range(T)][:-1]
    return [sum(gaps) / len(gaps) if gaps else 0, sum(R[j][j] - alone[j] for j in range(T)) / T]


@run.right("a running best, from below")
def _(R, alone):
    best = R[1:].flip(0).cummin(0).values.flip(0).diagonal()
    T = len(alone)
    return (R[-1] - best).sum() / max(T - 1, 1), torch.mean(torch.diagonal(R, -1) - alone)


@run.right("a named tuple")
def _(R, alone):
    return collections.namedtuple("Losses", "forgetting intransigence")(*losses(R, alone))


def keep(memory, key, row, capacity):
    if len(memory) < capacity:
        memory.append((key, row))
    else:
        i = min(range(len(memory)), key=lambda i: memory[i][0])
        if key > memory[i][0]:
            memory[i] = (key, row)


memory.wrong("u to the power of 1/w", lambda m, r, w, u, c: keep(m, u ** (1 / w), r.clone(), c))
memory.wrong(
    "log of the power",
    lambda m, r, w, u, c: keep(m, math.log(max(u ** (1 / w), 1e-300)), r.clone(), c),
)
memory.wrong("w log u", lambda m, r, w, u, c: keep(m, w * math.log(u), r.clone(), c))
memory.wrong("log2", lambda m, r, w, u, c: keep(m, math.log2(u) / w, r.clone(), c))
memory.wrong("log1p", lambda m, r, w, u, c: keep(m, math.log1p(u) / w, r.clone(), c))
memory.wrong("-log u / w", lambda m, r, w, u, c: keep(m, -math.log(u) / w, r.clone(), c))
memory.wrong(
    "log u - log w", lambda m, r, w, u, c: keep(m, math.log(u) - math.log(w), r.clone(), c)
)
memory.wrong("the row itself", lambda m, r, w, u, c: keep(m, math.log(u) / w, r, c))
memory.wrong("detached only", lambda m, r, w, u, c: keep(m, math.log(u) / w, r.detach(), c))
memory.wrong("a view", lambda m, r, w, u, c: keep(m, math.log(u) / w, r[:], c))
memory.wrong("contiguous", lambda m, r, w, u, c: keep(m, math.log(u) / w, r.contiguous(), c))
memory.wrong("room for one more", lambda m, r, w, u, c: keep(m, math.log(u) / w, r.clone(), c + 1))
memory.wrong("room for one less", lambda m, r, w, u, c: keep(m, math.log(u) / w, r.clone(), c - 1))
memory.wrong("the row first", lambda m, r, w, u, c: m.append((r.clone(), math.log(u) / w)))
memory.wrong("floats", lambda m, r, w, u, c: keep(m, math.log(u) / w, r.clone().float() + 0.5, c))
memory.right(
    "the row as a list of numbers", lambda m, r, w, u, c: keep(m, math.log(u) / w, r.tolist(), c)
)


@memory.wrong("as if it were a heap")
def _(memory, row, weight, number, capacity):
    key = math.log(number) / weight
    if len(memory) < capacity:
        heapq.heappush(memory, (key, row.clone()))
    elif key > memory[0][0]:
        heapq.heapreplace(memory, (key, row.clone()))


@memory.wrong("always takes it")
def _(memory, row, weight, number, capacity):
    memory.sort(key=lambda pair: pair[0])
    if len(memory) >= capacity:
        memory.pop(0)
    memory.append((math.log(number) / weight, row.clone()))


@memory.wrong("keeps the smallest")
def _(memory, row, weight, number, capacity):
    memory.append((math.log(number) / weight, row.clone()))
    memory.sort(key=lambda pair: pair[0])
    del memory[capacity:]


@memory.wrong("a new list")
def _(memory, row, weight, number, capacity):
    memory = sorted([*memory, (math.log(number) / weight, row.clone())], key=lambda p: -p[0])
    return memory[:capacity]


@memory.wrong("drops one of a sorted list")
def _(memory, row, weight, number, capacity):
    key = math.log(number) / weight
    if len(memory) < capacity:
        memory.append((key, row.clone()))
    elif key > memory[-1][0]:
        memory[-1] = (key, row.clone())


@memory.wrong("draws its own number")
def _(memory, row, weight, number, capacity):
    keep(memory, math.log(torch.rand(()).item()) / weight, row.clone(), capacity)


@memory.right("a heap made first")
def _(memory, row, weight, number, capacity):
    pair = (math.log(number) / weight, row.clone())
    heapq.heapify(memory)
    heapq.heappush(memory, pair) if len(memory) < capacity else heapq.heappushpop(memory, pair)


@memory.right("nlargest into the same list")
def _(memory, row, weight, number, capacity):
    memory[:] = heapq.nlargest(
        capacity, memory + [(np.log(number) / weight, row.detach().clone())], key=lambda p: p[0]
    )


@memory.right("takes out the least")
def _(memory, row, weight, number, capacity):
    memory.insert(0, (-(1 / weight) * math.log(1 / number), torch.clone(row)))
    while len(memory) > capacity:
        del memory[np.argmin([float(key) for key, _ in memory])]


@memory.right("asks before it copies, and returns the list")
def _(memory, row, weight, number, capacity):
    keep(memory, math.log(number) / weight, row.new_tensor(row.tolist()), capacity)
    return memory


@memory.right("a tensor as key")
def _(memory, row, weight, number, capacity):
    keep(memory, torch.tensor(number, dtype=torch.float64).log() / weight, row.clone(), capacity)


@memory.right("by recursion")
def _(memory, row, weight, number, capacity):
    def put(pair, rest):
        if not rest:
            return [pair]
        high, low = (pair, rest[0]) if pair[0] > rest[0][0] else (rest[0], pair)
        return [high, *put(low, rest[1:])]

    kept = put((math.log(number) / weight, row.clone()), sorted(memory, key=lambda p: -p[0]))
    memory.clear()
    memory.extend(kept[:capacity])


@memory.right("lists as pairs")
def _(memory, row, weight, number, capacity):
    keep(memory, math.log(number) / weight, row.clone(), capacity)
    memory[:] = [list(pair) for pair in memory]


def product(a, b, s=lambda s: s):
    return s(a[2]) * s(b[2]) * ((a[1].T @ b[1]) * (a[0] @ b[0].T)).sum()


def solved(adapters, target, *, s=lambda s: s, inner=None, gram=None, to=None, end=None):
    inner = inner or (lambda a, b: product(a, b, s))
    G = torch.tensor(
        [[float(inner(a, b)) for b in adapters] for a in adapters], dtype=torch.float64
    )
    t = torch.tensor([float((to or inner)(a, target)) for a in adapters], dtype=torch.float64)
    w = torch.linalg.solve(gram(G) if gram else G, t)
    return end(w, adapters, target) if end else w


def fitted(**parts):
    return lambda adapters, target: solved(adapters, target, **parts)


best.wrong("no scale", fitted(s=lambda s: 1.0))
best.wrong("the scale's size", fitted(s=abs))
best.wrong("the target's scale left out", fitted(to=lambda a, b: product(a, (b[0], b[1], 1.0))))
best.wrong(
    "weights that hold the scale", fitted(end=lambda w, a, t: w * torch.tensor([x[2] for x in a]))
)
best.wrong("each alone", fitted(gram=lambda G: torch.diag(G.diagonal())))
best.wrong(
    "a little ridge", fitted(gram=lambda G: G + 1e-2 * G.diagonal().mean() * torch.eye(len(G)))
)
best.wrong("ridge by 1", fitted(gram=lambda G: G + torch.eye(len(G))))
best.wrong("sum to one", fitted(end=lambda w, a, t: w / w.sum()))
best.wrong("a softmax", fitted(end=lambda w, a, t: w.softmax(0)))
best.wrong("none below 0", fitted(end=lambda w, a, t: w.clamp(min=0)))
best.wrong("the reverse order", fitted(end=lambda w, a, t: w.flip(0)))
best.wrong("all alike", lambda a, t: torch.full((len(a),), 1 / len(a)))
best.wrong(
    "products of the first factors", fitted(inner=lambda a, b: a[2] * b[2] * (a[0] @ b[0].T).sum())
)
best.wrong(
    "sums of products of sums",
    fitted(inner=lambda a, b: a[2] * b[2] * (a[1].T @ b[1]).sum() * (a[0] @ b[0].T).sum()),
)
best.wrong(
    "traces of B only", fitted(inner=lambda a, b: a[2] * b[2] * (a[1].T @ b[1]).square().sum())
)
best.wrong(
    "cosines",
    fitted(
        end=lambda w, a, t: torch.tensor(
            [float(product(x, t) / (product(x, x) * product(t, t)) ** 0.5) for x in a]
        )
    ),
)
best.wrong(
    "projections without the Gram matrix", lambda a, t: torch.stack([product(x, t) for x in a])
)


@best.wrong("one matching pursuit")
def _(adapters, target):
    weights, done = [], []
    for a in adapters:
        left = float(product(a, target)) - sum(w * float(product(a, b)) for w, b in done)
        weights.append(left / float(product(a, a)))
        done.append((weights[-1], a))
    return weights


@best.wrong("the whole matrices")
def _(adapters, target):
    def full(a):
        return (a[2] * a[1] @ a[0]).flatten()

    return torch.linalg.lstsq(
        torch.stack([full(a) for a in adapters], 1), full(target)[:, None]
    ).solution[:, 0]


@best.wrong("a few steps of descent")
def _(adapters, target):
    w = torch.zeros(len(adapters))
    G = torch.stack([torch.stack([product(a, b) for b in adapters]) for a in adapters])
    t = torch.stack([product(a, target) for a in adapters])
    for _ in range(10):
        w = w - (G @ w - t) / G.trace()
    return w


@best.right("thin bases of both sides")
def _(adapters, target):
    every = [*adapters, target]
    Q = torch.linalg.qr(torch.cat([b.double() for _, b, _ in every], 1)).Q
    P = torch.linalg.qr(torch.cat([a.double() for a, _, _ in every]).T).Q
    small = [s * (Q.T @ b.double()) @ (a.double() @ P) for a, b, s in every]
    M = torch.stack([m.flatten() for m in small[:-1]], 1)
    return torch.linalg.lstsq(M, small[-1].flatten()[:, None]).solution.flatten()


@best.right("numpy, scale inside A")
def _(adapters, target):
    *rest, goal = [(s * a.double().numpy(), b.double().numpy()) for a, b, s in [*adapters, target]]

    def inner(x, y):
        return np.einsum("or,os,ri,si->", x[1], y[1], x[0], y[0], optimize=True)

    return np.linalg.solve(
        [[inner(x, y) for y in rest] for x in rest], [inner(x, goal) for x in rest]
    )


@best.right("conjugate gradients")
def _(adapters, target):
    G = torch.tensor([[float(product(a, b)) for b in adapters] for a in adapters]).double()
    w = torch.zeros(len(G)).double()
    rest = torch.tensor([float(product(a, target)) for a in adapters]).double()
    way = rest.clone()
    for _ in range(10 * len(G)):
        if rest @ rest < 1e-30:
            break
        step = (rest @ rest) / (way @ G @ way)
        w, new = w + step * way, rest - step * (G @ way)
        way, rest = new + (new @ new) / (rest @ rest) * way, new
    return w.tolist()


best.right(
    "a pseudo-inverse",
    lambda a, t: (
        torch.linalg.pinv(torch.tensor([[float(product(x, y)) for y in a] for x in a]).double())
        @ torch.tensor([float(product(x, t)) for x in a]).double()
    ),
)
best.right(
    "by trace",
    fitted(inner=lambda a, b: a[2] * b[2] * torch.trace((a[1].T @ b[1]) @ (b[0] @ a[0].T))),
)
best.right(
    "Cholesky",
    lambda a, t: torch.cholesky_solve(
        torch.tensor([[float(product(x, t))] for x in a]).double(),
        torch.linalg.cholesky(
            torch.tensor([[float(product(x, y)) for y in a] for x in a]).double()
        ),
    )[:, 0],
)
best.right("floats", lambda a, t: [float(w) for w in solved(a, t)])


@best.right("orthogonalised one by one")
def _(adapters, target):
    n = len(adapters)
    every = [tuple(torch.as_tensor(v, dtype=torch.float64) for v in a) for a in [*adapters, target]]

    def inner(u, v):
        return sum(
            u[i] * v[j] * float(product(every[i], every[j]))
            for i in range(n + 1)
            for j in range(n + 1)
        )

    unit = torch.eye(n + 1, dtype=torch.float64)
    basis = []
    for i in range(n):
        v = unit[i]
        for _ in range(2):
            for q in basis:
                v = v - inner(q, v) * q
        basis.append(v / inner(v, v) ** 0.5)
    return sum(inner(q, unit[n]) * q for q in basis)[:n]


def left(past, gradient, *, basis=None, rows=None):
    stacked = torch.cat([*past, gradient[:0]]).double()
    if not stacked.any():
        return gradient.clone()
    U, S, V = torch.linalg.svd(stacked, full_matrices=False)
    Q = V[1e-6 * S.max() < S]
    return (gradient.double() - gradient.double() @ Q.T @ Q).float()


span.wrong("the part in the span", lambda past, g: g - left(past, g))
span.wrong(
    "one past task after another",
    lambda past, g: [g := left([A], g) for A in past][-1] if past else g.clone(),
)
span.wrong("the last alone", lambda past, g: left(past[-1:], g))
span.wrong("the first alone", lambda past, g: left(past[:1], g))
span.wrong(
    "the mean of the past",
    lambda past, g: left([torch.cat(past).mean(0, keepdim=True)], g) if past else g.clone(),
)
span.wrong(
    "row after row of the past",
    lambda past, g: (
        [g := g - (g @ a)[:, None] * a / (a @ a).clamp(min=1e-12) for A in past for a in A][-1]
        if past
        else g.clone()
    ),
)
span.wrong(
    "past rows as orthonormal",
    lambda past, g: g - g @ torch.cat(past).T @ torch.cat(past) if past else g.clone(),
)
span.wrong(
    "past rows normalised",
    lambda past, g: g - g @ (P := F.normalize(torch.cat(past), dim=1)).T @ P if past else g.clone(),
)
span.wrong(
    "an inverse",
    lambda past, g: (
        g - g @ (P := torch.cat(past)).T @ torch.linalg.inv(P @ P.T) @ P if past else g.clone()
    ),
)
span.wrong(
    "a ridge",
    lambda past, g: (
        g - g @ (P := torch.cat(past)).T @ torch.linalg.inv(P @ P.T + 0.1 * torch.eye(len(P))) @ P
        if past
        else g.clone()
    ),
)
span.wrong(
    "QR without a look at the rank",
    lambda past, g: (
        g - g @ (Q := torch.linalg.qr(torch.cat(past).T).Q) @ Q.T if past else g.clone()
    ),
)
span.wrong(
    "all singular vectors",
    lambda past, g: (
        g - g @ (V := torch.linalg.svd(torch.cat(past), full_matrices=False).Vh).T @ V
        if past
        else g.clone()
    ),
)
span.wrong(
    "keeps 90% of the energy",
    lambda past, g: (
        g
        - g
        @ (
            V := (s := torch.linalg.svd(torch.cat(past), full_matrices=False)).Vh[
                : int((s.S.square().cumsum(0) < 0.9 * s.S.square().sum()).sum()) + 1
            ]
        ).T
        @ V
        if past
        else g.clone()
    ),
)
span.wrong("needs a past", lambda past, g: left([torch.cat(past)], g) if len(past) else None)
span.wrong("no past, nothing left", lambda past, g: left(past, g) if past else torch.zeros_like(g))
span.wrong("half of it", lambda past, g: g - (g - left(past, g)) / 2)
span.wrong(
    "with its old length",
    lambda past, g: F.normalize(left(past, g), dim=1) * g.norm(dim=1, keepdim=True),
)
span.wrong(
    "an absolute threshold of 1",
    lambda past, g: (
        g
        - g @ (V := (s := torch.linalg.svd(torch.cat(past), full_matrices=False)).Vh[s.S > 1]).T @ V
        if past
        else g.clone()
    ),
)
span.wrong(
    "Gram-Schmidt that stops at zero rows",
    lambda past, g: left([A[: int(A.any(1).long().cumprod(0).sum())] for A in past], g),
)
span.wrong("in place", lambda past, g: g.copy_(left(past, g)))

span.right(
    "a pseudo-inverse",
    lambda past, g: g - g @ torch.linalg.pinv(P := torch.cat(past), rtol=1e-4) @ P if past else g,
)
span.right(
    "least squares in numpy",
    lambda past, g: (
        g.numpy()
        - np.linalg.lstsq(
            P := np.concatenate([A.numpy() for A in past]).T, g.numpy().T, rcond=1e-5
        )[0].T
        @ P.T
        if past
        else g.numpy().copy()
    ),
)
span.right(
    "eigenvectors of the past's product",
    lambda past, g: (
        g.double()
        @ (e := torch.linalg.eigh((P := torch.cat(past).double()).T @ P)).eigenvectors[
            :, e.eigenvalues < 1e-10 * e.eigenvalues.max().clamp(min=1e-30)
        ]
        @ e.eigenvectors[:, e.eigenvalues < 1e-10 * e.eigenvalues.max().clamp(min=1e-30)].T
        if past and torch.cat(past).any()
        else g
    ),
)
span.right(
    "gelsd, with a threshold",
    lambda past, g: (
        g
        - (
            torch.linalg.lstsq(
                torch.cat(past).double().T, g.double().T, driver="gelsd", rcond=1e-9
            ).solution.T
            @ torch.cat(past).double()
        ).float()
        if past
        else g.clone()
    ),
)


@span.right("Gram-Schmidt twice, with a threshold")
def _(past, gradient):
    basis = []
    for a in (row for A in past for row in A.double()):
        size = a.norm()
        for _ in range(2):
            for q in basis:
                a = a - (a @ q) * q
        if a.norm() > 1e-5 * size and size > 0:
            basis.append(a / a.norm())
    result = gradient.double()
    for q in basis:
        result = result - (result @ q)[:, None] * q
    return result


@span.right("task after task, each out of the ones before")
def _(past, gradient):
    Q = torch.zeros(0, gradient.shape[1], dtype=torch.float64)
    for A in past:
        rest = A.double() - A.double() @ Q.T @ Q
        _, S, V = torch.linalg.svd(rest, full_matrices=False)
        Q = torch.cat([Q, V[1e-5 * max(float(A.norm()), 1e-30) < S]])
    return (gradient.double() - gradient.double() @ Q.T @ Q).to(gradient.dtype)


@span.right("scipy's orth")
def _(past, gradient):
    from scipy.linalg import orth

    if not past or not torch.cat(past).any():
        return gradient.clone()
    Q = orth(torch.cat(past).double().numpy().T, rcond=1e-6)
    return gradient.double().numpy() - gradient.double().numpy() @ Q @ Q.T
