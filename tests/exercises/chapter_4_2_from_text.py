"""Answers to chapter 4.2's exercises by somebody who has read no more than the text and the stub."""

import copy
import math

import numpy as np
import torch
from torch import nn

from tests.exercises.chapter_4_2 import errors, merged, scales


def weighed(ranks, alpha, rs=False, *, scale=None, rows=None, end=None):
    n = max(ranks)
    P = [0.0] * n
    for b in ranks:
        for i in rows(b, n) if rows else range(b):
            P[i] += scale(alpha, b, rs, ranks) if scale else alpha / (math.sqrt(b) if rs else b)
    return end(P, ranks) if end else P


def scaled(**parts):
    return lambda *arguments, **named: weighed(*arguments, **parts, **named)


scales.wrong("the mean", scaled(end=lambda P, r: [p / len(r) for p in P]))
scales.wrong("no rsLoRA", scaled(scale=lambda a, b, rs, r: a / b))
scales.wrong("always rsLoRA", scaled(scale=lambda a, b, rs, r: a / b**0.5))
scales.wrong(
    "one scale for all", scaled(scale=lambda a, b, rs, r: a / (max(r) ** 0.5 if rs else max(r)))
)
scales.wrong(
    "one scale after the sum",
    scaled(scale=lambda a, b, rs, r: 1.0, end=lambda P, r: [p * 8 / max(r) for p in P]),
)
scales.wrong("root of the scale", scaled(scale=lambda a, b, rs, r: (a / b) ** (0.5 if rs else 1)))
scales.wrong("whole numbers", scaled(scale=lambda a, b, rs, r: a / b**0.5 if rs else a // b))
scales.wrong("from the other end", scaled(rows=lambda b, n: range(n - b, n)))
scales.wrong("the last row only", scaled(rows=lambda b, n: [b - 1]))
scales.wrong("one row more", scaled(rows=lambda b, n: range(min(n, b + 1))))
scales.wrong("one row less", scaled(rows=lambda b, n: range(b - 1)))
scales.wrong("from b on", scaled(rows=lambda b, n: range(b - 1, n)))
scales.wrong("reversed", scaled(end=lambda P, r: P[::-1]))
scales.wrong("one for each rank", scaled(end=lambda P, r: [P[b - 1] for b in r]))
scales.wrong(
    "alpha divided by the row", scaled(end=lambda P, r: [p * (i + 1) for i, p in enumerate(P)])
)
scales.wrong(
    "the roots, so that both factors carry it", scaled(end=lambda P, r: [p**0.5 for p in P])
)
scales.wrong(
    "the last is taken as the largest",
    lambda ranks, a, rs=False: weighed(ranks, a, rs)[: ranks[-1]],
)


@scales.wrong("sorts the list")
def _(ranks, lora_alpha, use_rslora=False):
    ranks.sort()
    return weighed(ranks, lora_alpha, use_rslora)


@scales.wrong("groups between sorted neighbours, unsorted")
def _(ranks, lora_alpha, use_rslora=False):
    P, start = [], 0
    for i, b in enumerate(ranks):
        P += [sum(lora_alpha / (c**0.5 if use_rslora else c) for c in ranks[i:])] * (b - start)
        start = b
    return P


scales.right(
    "numpy, from the end",
    lambda ranks, a, rs=False: np.bincount(
        np.array(ranks) - 1, weights=a / np.array(ranks, float) ** (0.5 if rs else 1)
    )[::-1].cumsum()[::-1],
)
scales.right(
    "row by row",
    lambda ranks, a, rs=False: [
        sum(a / (b**0.5 if rs else b) for b in ranks if b > i) for i in range(max(ranks))
    ],
)
scales.right(
    "a mask and a product",
    lambda ranks, a, rs=False: (
        (torch.arange(max(ranks))[:, None] < torch.tensor(ranks)).double()
        @ (a * torch.tensor(ranks).double() ** (-0.5 if rs else -1.0))
    ),
)
scales.right("a tuple", lambda ranks, a, rs=False: tuple(weighed(ranks, a, rs)))
scales.right(
    "recursion",
    lambda ranks, a, rs=False: (lambda f: f(f, sorted(ranks), 0))(
        lambda f, left, done: (
            []
            if not left
            else [sum(a / (b**0.5 if rs else b) for b in left)] * (left[0] - done)
            + f(f, left[1:], left[0])
        )
    ),
)
scales.right(
    "rows of P as columns of cuts",
    lambda ranks, a, rs=False: sum(
        torch.nn.functional.pad(torch.full((b,), a / (b**0.5 if rs else b)), (0, max(ranks) - b))
        for b in ranks
    ),
)
scales.right(
    "fractions where there are",
    lambda ranks, a, rs=False: [float(v) for v in weighed(ranks, a, rs)],
)


def lost(A, B, b, *, slice_=None, svd=None):
    A, B = A.double(), B.double()

    def norm(A, B):
        return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()

    S = torch.linalg.svdvals(torch.linalg.qr(B).R @ A)
    first = slice_(A, B, b, norm) if slice_ else norm(A[b:], B[:, b:]) / norm(A, B)
    second = svd(S, b) if svd else (S[b:].square().sum() / S.square().sum()).sqrt()
    return first, second


def cutting(**parts):
    return lambda A, B, b: lost(A, B, b, **parts)


errors.wrong(
    "squares",
    cutting(
        slice_=lambda A, B, b, n: (n(A[b:], B[:, b:]) / n(A, B)) ** 2,
        svd=lambda S, b: S[b:].square().sum() / S.square().sum(),
    ),
)
errors.wrong(
    "what is kept",
    cutting(
        slice_=lambda A, B, b, n: n(A[:b], B[:, :b]) / n(A, B),
        svd=lambda S, b: (S[:b].square().sum() / S.square().sum()).sqrt(),
    ),
)
errors.wrong(
    "Pythagoras for the slice",
    cutting(
        slice_=lambda A, B, b, n: (1 - (n(A[:b], B[:, :b]) / n(A, B)) ** 2).clamp(min=0).sqrt()
    ),
)
errors.wrong(
    "norms' difference", cutting(slice_=lambda A, B, b, n: 1 - n(A[:b], B[:, :b]) / n(A, B))
)
errors.wrong(
    "relative to the cut",
    cutting(slice_=lambda A, B, b, n: n(A[b:], B[:, b:]) / n(A[:b], B[:, :b])),
)
errors.wrong(
    "one rank more is kept",
    cutting(svd=lambda S, b: (S[b + 1 :].square().sum() / S.square().sum()).sqrt()),
)
errors.wrong(
    "one rank less is kept",
    cutting(svd=lambda S, b: (S[b - 1 :].square().sum() / S.square().sum()).sqrt()),
)
errors.wrong("the next singular value", cutting(svd=lambda S, b: S[b] / S.square().sum().sqrt()))
errors.wrong("the spectral norm", cutting(svd=lambda S, b: S[b] / S[0]))
errors.wrong("sums of singular values", cutting(svd=lambda S, b: S[b:].sum() / S.sum()))
errors.wrong(
    "ascending", cutting(svd=lambda S, b: (S.flip(0)[b:].square().sum() / S.square().sum()).sqrt())
)
errors.wrong("not relative", lambda A, B, b: tuple(e * (B @ A).norm() for e in lost(A, B, b)))
errors.wrong("the SVD's first", lambda A, B, b: lost(A, B, b)[::-1])
errors.wrong(
    "the sum of both factors' errors",
    cutting(slice_=lambda A, B, b, n: A[b:].norm() / A.norm() * B[:, b:].norm() / B.norm()),
)
errors.wrong(
    "products of norms",
    cutting(slice_=lambda A, B, b, n: A[b:].norm() * B[:, b:].norm() / (A.norm() * B.norm())),
)
errors.wrong(
    "singular values of A alone",
    lambda A, B, b: (
        lost(A, B, b)[0],
        (torch.linalg.svdvals(A)[b:].square().sum() / A.square().sum()).sqrt(),
    ),
)
errors.wrong(
    "singular values of the product of values",
    lambda A, B, b: (
        lost(A, B, b)[0],
        (
            (s := torch.linalg.svdvals(A) * torch.linalg.svdvals(B))[b:].square().sum()
            / s.square().sum()
        ).sqrt(),
    ),
)
errors.wrong(
    "whole matrices",
    lambda A, B, b: (
        ((B @ A - B[:, :b] @ A[:b]).norm() / (B @ A).norm()),
        ((s := torch.linalg.svdvals(B @ A))[b:].norm() / s.norm()),
    ),
)
errors.wrong(
    "the whole matrix for the slice alone",
    cutting(slice_=lambda A, B, b, n: (B[:, b:] @ A[b:]).norm() / n(A, B)),
)
errors.wrong(
    "the slice of the sorted",
    lambda A, B, b: lost(
        A[(o := (A.norm(dim=1) * B.norm(dim=0)).argsort(descending=True))], B[:, o], b
    ),
)


@errors.wrong("cuts A in place")
def _(A, B, b):
    result = lost(A, B, b)
    A[b:] = 0
    return result


errors.right(
    "QR of both sides",
    lambda A, B, b: (
        ((M := torch.linalg.qr(B).R)[:, b:] @ A[b:]).norm() / (M @ A).norm(),
        (s := torch.linalg.svdvals(M @ torch.linalg.qr(A.T).R.T))[b:].norm() / s.norm(),
    ),
)
errors.right(
    "singular values of A, and B's columns", lambda A, B, b: tuple(float(e) for e in lost(A, B, b))
)
errors.right(
    "numpy, float64",
    lambda A, B, b: (
        np.linalg.norm((R := np.linalg.qr(B.double().numpy())[1])[:, b:] @ A.double().numpy()[b:])
        / np.linalg.norm(R @ A.double().numpy()),
        np.linalg.norm((s := np.linalg.svd(R @ A.double().numpy(), compute_uv=False))[b:])
        / np.linalg.norm(s),
    ),
)
errors.right(
    "eigenvalues of the Gram matrices",
    cutting(svd=lambda S, b: (S**2).sort().values[: len(S) - b].sum().sqrt() / (S**2).sum().sqrt()),
)
errors.right(
    "einsum",
    lambda A, B, b: [
        (
            torch.einsum("rs,rs->", B[:, b:].T @ B[:, b:], A[b:] @ A[b:].T)
            / torch.einsum("rs,rs->", B.T @ B, A @ A.T)
        )
        ** 0.5,
        lost(A, B, b)[1],
    ],
)


@errors.right("eigenvalues, double")
def _(A, B, b):
    A, B = A.double(), B.double()
    L, V = torch.linalg.eigh(A @ A.T)
    root = V @ torch.diag(L.clamp(min=0).sqrt()) @ V.T
    squares = torch.linalg.eigvalsh(root @ B.T @ B @ root).flip(0).clamp(min=0)
    inner = (B.T @ B) * (A @ A.T)
    return (inner[b:, b:].sum() / inner.sum()).sqrt(), (squares[b:].sum() / squares.sum()).sqrt()


@errors.right("the slice by three terms")
def _(A, B, b):
    inner = (B.double().T @ B.double()) * (A.double() @ A.double().T)
    whole, cut, cross = inner.sum(), inner[:b, :b].sum(), inner[:, :b].sum()
    return ((whole - 2 * cross + cut) / whole) ** 0.5, lost(A, B, b)[1]


def joined(base, branches, scaling, *, w=None, through=None, second=None, own=None, like=None):
    weight = base.weight.detach().clone()
    bias = torch.zeros(base.out_features) if base.bias is None else base.bias.detach().clone()
    bias = own(bias) if own else bias
    for p, q in branches:
        weight += (scaling if w is None else w) * q.weight.detach() @ p.weight.detach()
        if q.bias is not None:
            bias += (scaling if second is None else second) * q.bias.detach()
        if p.bias is not None:
            bias += (scaling if through is None else through) * q.weight.detach() @ p.bias.detach()
    out = nn.Linear(base.in_features, base.out_features)
    out.weight, out.bias = nn.Parameter(weight), nn.Parameter(bias)
    return out


def joining(**parts):
    return lambda *arguments: joined(*arguments, **parts)


merged.wrong("no scale on the weight", joining(w=1.0))
merged.wrong("no scale on the second bias", joining(second=1.0))
merged.wrong("no scale on the first bias", joining(through=1.0))
merged.wrong("the first bias is lost", joining(through=0.0))
merged.wrong("the second bias is lost", joining(second=0.0))
merged.wrong(
    "the scale on the base's bias", lambda base, bs, s: joined(base, bs, s, own=lambda v: v * s)
)
merged.wrong("the scale twice", lambda base, bs, s: joined(base, bs, s, w=s * s))
merged.wrong("no base bias", joining(own=torch.zeros_like))
merged.wrong("the mean of branches", lambda base, bs, s: joined(base, bs, s / len(bs)))
merged.wrong("the first branch", lambda base, bs, s: joined(base, bs[:1], s))
merged.wrong("the last branch", lambda base, bs, s: joined(base, bs[-1:], s))


@merged.wrong("into the base")
def _(base, branches, scaling):
    out = joined(base, branches, scaling)
    with torch.no_grad():
        base.weight.copy_(out.weight)
        if base.bias is not None:
            base.bias.copy_(out.bias)
    return base


@merged.wrong("biases only where the base has one")
def _(base, branches, scaling):
    out = joined(base, branches, scaling)
    if base.bias is None:
        out.bias = None
    return out


@merged.wrong("needs a bias everywhere")
def _(base, branches, scaling):
    out = nn.Linear(base.in_features, base.out_features)
    out.weight.data = base.weight + sum(scaling * q.weight @ p.weight for p, q in branches)
    out.bias.data = base.bias + sum(scaling * (q.weight @ p.bias + q.bias) for p, q in branches)
    return out


@merged.wrong("the base's bias, shared")
def _(base, branches, scaling):
    out = joined(base, branches, scaling)
    if base.bias is not None and all(p.bias is None and q.bias is None for p, q in branches):
        out.bias = base.bias
    return out


@merged.wrong("a shallow copy")
def _(base, branches, scaling):
    out, new = copy.copy(base), joined(base, branches, scaling)
    out.weight.data, out.bias = new.weight.data, new.bias
    return out


@merged.wrong("in and out exchanged")
def _(base, branches, scaling):
    out, made = nn.Linear(base.out_features, base.in_features), joined(base, branches, scaling)
    out.weight.data, out.bias.data = made.weight.data.T.contiguous(), made.bias.data
    return out


@merged.wrong("only the weight")
def _(base, branches, scaling):
    return joined(base, branches, scaling).weight


@merged.wrong("freezes the branches")
def _(base, branches, scaling):
    branches.requires_grad_(False)
    return joined(base, branches, scaling)


@merged.wrong("a function")
def _(base, branches, scaling):
    return lambda x: base(x) + scaling * sum(branch(x) for branch in branches)


@merged.wrong("a module around the old")
def _(base, branches, scaling):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.branches = copy.deepcopy(base), copy.deepcopy(branches)

        def forward(self, x):
            return self.base(x) + scaling * sum(branch(x) for branch in self.branches)

    return Both()


@merged.right("the unit vectors' outputs")
def _(base, branches, scaling):
    with torch.no_grad():

        def model(x):
            return base(x) + scaling * sum(branch(x) for branch in branches)

        zero = model(torch.zeros(1, base.in_features))
        out = nn.Linear(base.in_features, base.out_features)
        out.weight.copy_((model(torch.eye(base.in_features)) - zero).T)
        out.bias.copy_(zero[0])
    return out


@merged.right("a deep copy, filled")
def _(base, branches, scaling):
    out = copy.deepcopy(base)
    new = joined(base, branches, scaling)
    out.weight.data.copy_(new.weight.data)
    out.bias = nn.Parameter(new.bias.data.clone())
    return out


@merged.right("without a bias where nobody has one")
def _(base, branches, scaling):
    out = joined(base, branches, scaling)
    if all(layer.bias is None for layer in [base, *(layer for pair in branches for layer in pair)]):
        out.bias = None
    return out


@merged.right("load_state_dict")
def _(base, branches, scaling):
    out = nn.Linear(base.in_features, base.out_features, dtype=base.weight.dtype)
    out.load_state_dict(
        {k: v.detach() for k, v in joined(base, branches, scaling).state_dict().items()}
    )
    return out


@merged.right("numpy in float64")
def _(base, branches, scaling):
    def get(t, n):
        return np.zeros(n) if t is None else t.detach().double().numpy()

    W, c = get(base.weight, 0).copy(), get(base.bias, base.out_features).copy()
    for p, q in branches:
        W += scaling * get(q.weight, 0) @ get(p.weight, 0)
        c += scaling * (
            get(q.weight, 0) @ get(p.bias, p.out_features) + get(q.bias, q.out_features)
        )
    out = nn.Linear(base.in_features, base.out_features)
    out.weight.data, out.bias.data = torch.tensor(W).float(), torch.tensor(c).float()
    return out


@merged.right("frozen, as an inference layer")
def _(base, branches, scaling):
    return joined(base, branches, scaling).requires_grad_(False).eval()


@merged.right("branches side by side")
def _(base, branches, scaling):
    def cat(bs):
        return torch.cat([b for b in bs], 1)

    with torch.no_grad():
        A = torch.cat([p.weight for p, _ in branches])
        B = cat(q.weight for _, q in branches)
        a = torch.cat(
            [torch.zeros(p.out_features) if p.bias is None else p.bias for p, _ in branches]
        )
        out = nn.Linear(base.in_features, base.out_features)
        out.weight[:] = base.weight + scaling * B @ A
        out.bias[:] = scaling * B @ a
        for bias in [base.bias]:
            out.bias += 0 if bias is None else bias
        for _, q in branches:
            out.bias += 0 if q.bias is None else scaling * q.bias
    return out
