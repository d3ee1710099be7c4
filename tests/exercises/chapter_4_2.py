"""Wrong and right answers to the exercises of chapter 4.2."""

import copy
import math
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from lora_course.classroom.chapter_4_2 import (
    check_cut_errors,
    check_merge_branches,
    check_own_scales,
)
from lora_course.hierarchical import matryoshka_weights
from tests.exercises import Answers

scales = Answers(check_own_scales)


def own(ranks, a, rs=False, inside=lambda b, i: b >= i):
    cost = lambda b: b**0.5 if rs else b  # noqa: E731
    return [sum(a / cost(b) for b in ranks if inside(b, i)) for i in range(1, max(ranks) + 1)]


def differently(change):
    return lambda ranks, a, rs=False: change(own(ranks, a, rs), ranks, a, rs)


scales.wrong("the package's", lambda ranks, a, rs=False: matryoshka_weights(ranks))
scales.wrong("the package's times α", lambda ranks, a, rs=False: a * matryoshka_weights(ranks))
scales.wrong(
    "the package's at the whole's scale",
    lambda ranks, a, rs=False: a / max(ranks) * matryoshka_weights(ranks),
)
scales.wrong("the mean", differently(lambda P, ranks, a, rs: [p / len(ranks) for p in P]))
scales.wrong("counts", lambda ranks, a, rs=False: matryoshka_weights(ranks) * len(ranks))
scales.wrong(
    "one scale",
    lambda ranks, a, rs=False: (
        a / (max(ranks) ** (0.5 if rs else 1)) * matryoshka_weights(ranks) * len(ranks)
    ),
)
scales.wrong("no α", lambda ranks, a, rs=False: own(ranks, 1, rs))
scales.wrong("no rsLoRA", lambda ranks, a, rs=False: own(ranks, a))
scales.wrong("always rsLoRA", lambda ranks, a, rs=False: own(ranks, a, True))
scales.wrong("rsLoRA turned round", lambda ranks, a, rs=False: own(ranks, a, not rs))
scales.wrong("reversed", differently(lambda P, ranks, a, rs: P[::-1]))
scales.wrong("b > i", lambda ranks, a, rs=False: own(ranks, a, rs, lambda b, i: b > i))
scales.wrong("b ≤ i", lambda ranks, a, rs=False: own(ranks, a, rs, lambda b, i: b <= i))
scales.wrong("from 0", lambda ranks, a, rs=False: own(ranks, a, rs, lambda b, i: b >= i - 1))
scales.wrong("one a rank", differently(lambda P, ranks, a, rs: [P[b - 1] for b in ranks]))
scales.wrong("one too many", differently(lambda P, ranks, a, rs: [P[0], *P]))
scales.wrong("one too few", differently(lambda P, ranks, a, rs: P[:-1] or [0.0]))
scales.wrong(
    "the smallest cut's scale",
    lambda ranks, a, rs=False: [
        a / min(b for b in ranks if b >= i) ** (0.5 if rs else 1) for i in range(1, max(ranks) + 1)
    ],
)
scales.wrong(
    "the row's scale",
    lambda ranks, a, rs=False: [
        sum(a / i ** (0.5 if rs else 1) for b in ranks if b >= i) for i in range(1, max(ranks) + 1)
    ],
)
scales.wrong("√α too", lambda ranks, a, rs=False: own(ranks, math.sqrt(a) if rs else a, rs))
scales.wrong("whole numbers", lambda ranks, a, rs=False: [round(p) for p in own(ranks, a, rs)])
scales.wrong(
    "ranks as if they rose",
    lambda ranks, a, rs=False: own([b for b in ranks if b <= ranks[-1]], a, rs),
)
scales.wrong(
    "by blocks that rise",
    lambda ranks, a, rs=False: [
        p
        for k, b in enumerate(ranks)
        for p in [sum(a / (c**0.5 if rs else c) for c in ranks[k:])]
        * max(0, b - (ranks[k - 1] if k else 0))
    ],
)
scales.wrong("normalised", differently(lambda P, ranks, a, rs: [p / sum(P) for p in P]))
scales.wrong("a matrix", differently(lambda P, ranks, a, rs: torch.diag(torch.tensor(P))))


@scales.wrong("sorts the caller's list")
def _(ranks, a, rs=False):
    ranks.sort()
    return own(ranks, a, rs)


scales.right("as the solution", own)
scales.right("a tensor", lambda ranks, a, rs=False: torch.tensor(own(ranks, a, rs)))
scales.right("64 bits", lambda ranks, a, rs=False: np.array(own(ranks, a, rs)))
scales.right(
    "fractions",
    lambda ranks, a, rs=False: (
        own(ranks, a, rs)
        if rs
        else [float(p) for p in own(ranks, Fraction(a).limit_denominator(10**9))]
    ),
)
scales.right(
    "by name only",
    lambda *, ranks, lora_alpha, use_rslora=False: tuple(own(ranks, lora_alpha, use_rslora)),
)
scales.right("in bf16", lambda ranks, a, rs=False: torch.tensor(own(ranks, a, rs)).bfloat16())


@scales.right("cut by cut")
def _(ranks, lora_alpha, use_rslora=False):
    P = torch.zeros(max(ranks))
    for b in ranks:
        P[:b] += lora_alpha / (math.sqrt(b) if use_rslora else b)
    return P


@scales.right("numpy's cumulative sum from the end")
def _(ranks, lora_alpha, use_rslora=False):
    ends = np.zeros(max(ranks))
    for b in ranks:
        ends[b - 1] += lora_alpha / b ** (0.5 if use_rslora else 1)
    return ends[::-1].cumsum()[::-1].copy()


errors = Answers(check_cut_errors)


def norm2(A, B):
    return ((B.T @ B) * (A @ A.T)).sum()


def sigma(A, B):
    return torch.linalg.svdvals(torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T)


def lost(s, b, p=2):
    return ((s[b:] ** p).sum() / (s**p).sum()) ** (1 / p)


def sliced(A, B, b):
    return (norm2(A[b:], B[:, b:]) / norm2(A, B)).sqrt()


def both(A, B, b):
    return sliced(A, B, b), lost(sigma(A, B), b)


def dense(A, B, b):
    whole = B @ A
    s = torch.linalg.svdvals(whole)
    return (whole - B[:, :b] @ A[:b]).norm() / whole.norm(), lost(s, b)


errors.wrong("squares", lambda A, B, b: tuple(e**2 for e in both(A, B, b)))
errors.wrong(
    "kept",
    lambda A, B, b: (
        (norm2(A[:b], B[:, :b]) / norm2(A, B)).sqrt(),
        (1 - both(A, B, b)[1] ** 2).sqrt(),
    ),
)
errors.wrong("1 − error", lambda A, B, b: tuple(1 - e for e in both(A, B, b)))
errors.wrong("not relative", lambda A, B, b: tuple(e * norm2(A, B).sqrt() for e in both(A, B, b)))
errors.wrong("exchanged", lambda A, B, b: both(A, B, b)[::-1])
errors.wrong("the slice only", lambda A, B, b: sliced(A, B, b))
errors.wrong("the slice twice", lambda A, B, b: (sliced(A, B, b),) * 2)
errors.wrong("the SVD twice", lambda A, B, b: (both(A, B, b)[1],) * 2)
errors.wrong(
    "no cross terms",
    lambda A, B, b: (
        (
            (A[b:].norm(dim=1) * B[:, b:].norm(dim=0)).norm()
            / (A.norm(dim=1) * B.norm(dim=0)).norm()
        ),
        both(A, B, b)[1],
    ),
)
errors.wrong(
    "no cross terms in the lost part",
    lambda A, B, b: (
        (A[b:].norm(dim=1) * B[:, b:].norm(dim=0)).norm() / norm2(A, B).sqrt(),
        both(A, B, b)[1],
    ),
)
errors.wrong(
    "1 − ‖slice‖/‖BA‖",
    lambda A, B, b: (1 - (norm2(A[:b], B[:, :b]) / norm2(A, B)).sqrt(), both(A, B, b)[1]),
)
errors.wrong(
    "√(1 − ‖slice‖²/‖BA‖²)",
    lambda A, B, b: (
        (1 - norm2(A[:b], B[:, :b]) / norm2(A, B)).abs().sqrt(),
        both(A, B, b)[1],
    ),
)
errors.wrong(
    "norms of the factors",
    lambda A, B, b: (B[:, b:].norm() * A[b:].norm() / (B.norm() * A.norm()), both(A, B, b)[1]),
)
errors.wrong("the last rows", lambda A, B, b: (sliced(A.flip(0), B.flip(1), b), both(A, B, b)[1]))
errors.wrong("A's values", lambda A, B, b: (sliced(A, B, b), lost(torch.linalg.svdvals(A), b)))
errors.wrong("B's values", lambda A, B, b: (sliced(A, B, b), lost(torch.linalg.svdvals(B), b)))
errors.wrong(
    "products of values",
    lambda A, B, b: (sliced(A, B, b), lost(torch.linalg.svdvals(A) * torch.linalg.svdvals(B), b)),
)
errors.wrong("sums of values", lambda A, B, b: (sliced(A, B, b), lost(sigma(A, B), b, 1)))
errors.wrong(
    "the spectral norm", lambda A, B, b: (sliced(A, B, b), sigma(A, B)[b] / sigma(A, B)[0])
)
errors.wrong("the nuclear norm for both", lambda A, B, b: (lost(sigma(A, B), b, 1),) * 2)
errors.wrong("one component too many", lambda A, B, b: (sliced(A, B, b), lost(sigma(A, B), b - 1)))
errors.wrong("one component too few", lambda A, B, b: (sliced(A, B, b), lost(sigma(A, B), b + 1)))
errors.wrong("b is 2", lambda A, B, b: both(A, B, 2))
errors.wrong("through ΔW", dense)
errors.wrong("ΔW row by row, stacked", lambda A, B, b: dense(A, torch.stack(list(B)), b))
errors.wrong(
    "QR without its second factor",
    lambda A, B, b: (sliced(A, B, b), lost(torch.linalg.svdvals(torch.linalg.qr(B)[1] @ A), b - 1)),
)
errors.wrong("percent", lambda A, B, b: tuple(100 * e for e in both(A, B, b)))


@errors.wrong("cuts the caller's factors")
def _(A, B, b):
    answer = both(A, B, b)
    A[b:] = 0
    return answer


errors.right("as the solution", both)
errors.right("numbers", lambda A, B, b: [e.item() for e in both(A, B, b)])
errors.right("a tensor of two", lambda A, B, b: torch.stack(both(A, B, b)))
errors.right("in 64 bits", lambda A, B, b: both(A.double(), B.double(), b))
errors.right(
    "eigenvalues of the product of the Gram matrices",
    lambda A, B, b: (
        sliced(A, B, b),
        lost(
            torch.linalg.eigvals((B.double().T @ B.double()) @ (A.double() @ A.double().T))
            .real.clamp(min=0)
            .sort(descending=True)
            .values.sqrt(),
            b,
        ),
    ),
)
errors.right(
    "from what is kept, in 64 bits",
    lambda A, B, b: (
        sliced(A, B, b),
        (1 - (sigma(A.double(), B.double())[:b] ** 2).sum() / norm2(A.double(), B.double())).sqrt(),
    ),
)


@errors.right("numpy")
def _(A, B, b):
    A, B = A.numpy().astype(np.float64), B.numpy().astype(np.float64)
    square = lambda A, B: np.sum((B.T @ B) * (A @ A.T))  # noqa: E731
    values = np.linalg.svd(np.linalg.qr(B)[1] @ A, compute_uv=False)
    return np.sqrt(square(A[b:], B[:, b:]) / square(A, B)), np.sqrt(
        (values[b:] ** 2).sum() / (values**2).sum()
    )


@errors.right("row by row")
def _(A, B, b):
    gone, whole = 0.0, 0.0
    for row in B:
        whole += (row @ A).square().sum()
        gone += (row[b:] @ A[b:]).square().sum()
    return (gone / whole).sqrt(), lost(torch.linalg.svdvals(torch.linalg.qr(B)[1] @ A), b)


merged = Answers(check_merge_branches)


def bias_of(layer):
    return 0 if layer.bias is None else layer.bias


@torch.no_grad()
def merge(base, branches, s, ws=None, bs=None, inner=1, outer=1, keep=1, own=1):
    new = nn.Linear(base.in_features, base.out_features)
    ws, bs = (s if x is None else x for x in (ws, bs))
    new.weight.copy_(keep * base.weight + ws * sum(b.weight @ a.weight for a, b in branches))
    bias = own * bias_of(base)
    for a, b in branches:
        through = b.weight @ a.bias if a.bias is not None else 0
        bias = bias + bs * (inner * through + outer * bias_of(b))
    new.bias.copy_(bias + torch.zeros_like(new.bias))
    return new


def but(**parts):
    return lambda base, branches, scaling: merge(base, branches, scaling, **parts)


merged.wrong("no biases", but(bs=0))
merged.wrong("outer biases only", but(inner=0))
merged.wrong("inner biases only", but(outer=0))
merged.wrong("no base bias", but(own=0))
merged.wrong("no base weight", but(keep=0))
merged.wrong("no base at all", but(keep=0, own=0))
merged.wrong("no scale", but(ws=1, bs=1))
merged.wrong("scale on weights only", but(bs=1))
merged.wrong("scale on biases only", but(ws=1))
merged.wrong("base only", but(ws=0, bs=0))
merged.wrong("twice", lambda base, branches, s: merge(base, branches, 2 * s))
merged.wrong("the mean", lambda base, branches, s: merge(base, branches, s / len(branches)))
merged.wrong("the first branch", lambda base, branches, s: merge(base, branches[:1], s))
merged.wrong(
    "without the last",
    lambda base, branches, s: merge(
        base, branches[: max(1, len(branches) - 1)], s if len(branches) > 1 else 0
    ),
)
merged.wrong("taken away", lambda base, branches, s: merge(base, branches, -s))
merged.wrong("all scaled", but(keep=3, own=3))
merged.wrong("a deep copy of the base", lambda base, branches, s: copy.deepcopy(base))
merged.wrong(
    "the tensors",
    lambda base, branches, s: (lambda new: (new.weight, new.bias))(merge(base, branches, s)),
)
merged.wrong(
    "the output", lambda base, branches, s: merge(base, branches, s)(torch.ones(base.in_features))
)
merged.wrong("the state", lambda base, branches, s: merge(base, branches, s).state_dict())
merged.wrong(
    "inner biases unmapped where they fit",
    lambda base, branches, s: (lambda new: (new.bias.data.add_(s), new)[1])(
        merge(base, branches, s)
    ),
)


@merged.wrong("the snippet: the base itself, changed")
def _(base, branches, s):
    new = merge(base, branches, s)
    base.weight.data.copy_(new.weight)
    return base


@merged.wrong("the snippet's other mistakes")
def _(base, branches, s):
    layer = copy.deepcopy(base)
    with torch.no_grad():
        for first, second in branches:
            layer.weight += second.weight @ first.weight
            layer.bias += s * second.bias
    return layer


@merged.wrong("stops without a bias")
def _(base, branches, s):
    layer = copy.deepcopy(base)
    with torch.no_grad():
        for first, second in branches:
            layer.weight += s * second.weight @ first.weight
            layer.bias += s * (second.weight @ first.bias + second.bias)
    return layer


@merged.wrong("the bias is the base's own tensor")
def _(base, branches, s):
    new = merge(base, branches, s)
    new.weight = base.weight
    return new


@merged.wrong("a module that adds them up")
def _(base, branches, s):
    class Sum(nn.Module):
        def forward(self, x):
            return base(x) + s * sum(branch(x) for branch in branches)

    return Sum()


@merged.wrong("seeds torch")
def _(base, branches, s):
    torch.manual_seed(0)
    return merge(base, branches, s)


@merged.wrong("takes the branches' gradients away")
def _(base, branches, s):
    new = merge(base, branches, s)
    branches.requires_grad_(False)
    return new


merged.right("as the solution", merge)


@merged.right("from outputs")
@torch.no_grad()
def _(base, branches, s):
    def f(x):
        return base(x) + s * sum(branch(x) for branch in branches)

    new = nn.Linear(base.in_features, base.out_features)
    zero = f(torch.zeros(1, base.in_features))[0]
    new.weight.copy_((f(torch.eye(base.in_features)) - zero).T)
    new.bias.copy_(zero)
    return new


@merged.right("through a copy of the base")
def _(base, branches, scaling):
    new, right = copy.deepcopy(base), merge(base, branches, scaling)
    new.weight.data = right.weight.data
    new.bias = nn.Parameter(right.bias.detach(), requires_grad=False)
    return new


@merged.right("no bias where there is none")
def _(base, branches, scaling):
    new = merge(base, branches, scaling)
    if not new.bias.any():
        new.bias = None
    return new


@merged.right("by concatenation")
@torch.no_grad()
def _(base, branches, scaling):
    A = torch.cat([a.weight for a, _ in branches])
    B = torch.cat([b.weight for _, b in branches], 1)
    inner = torch.cat([torch.zeros(len(a.weight)) + bias_of(a) for a, _ in branches])
    outer = sum(bias_of(b) for _, b in branches)
    new = nn.Linear(base.in_features, base.out_features).requires_grad_(False)
    new.weight.copy_(base.weight + scaling * B @ A)
    new.bias.copy_(bias_of(base) + scaling * (B @ inner + outer))
    return new


@merged.right("on no device first")
def _(base, branches, scaling):
    right = merge(base, branches, scaling)
    new = nn.utils.skip_init(nn.Linear, base.in_features, base.out_features)
    new.load_state_dict(right.state_dict())
    return new.eval()


@merged.right("numpy")
def _(base, branches, scaling):
    W = base.weight.detach().numpy().copy()
    c = np.zeros(len(W), np.float32) + (0 if base.bias is None else base.bias.detach().numpy())
    for a, b in branches:
        W += scaling * b.weight.detach().numpy() @ a.weight.detach().numpy()
        c += scaling * b(a(torch.zeros(W.shape[1]))).detach().numpy()
    new = nn.Linear(*W.shape[::-1])
    new.weight.data, new.bias.data = torch.from_numpy(W), torch.from_numpy(c.astype(np.float32))
    return new
