"""Wrong and right answers to the exercises of chapter 4.4."""

import statistics

import numpy as np
import torch
from torch.nn import functional as F

from lora_course.classroom.chapter_4_4 import (
    check_flat_updates,
    check_gated_backward,
    check_merge_rounded,
    check_times_merged,
)
from lora_course.fused import FusedLoRA
from tests.exercises import Answers

back = Answers(check_gated_backward)


def gradients(g, x, W, A, B, c, s):
    h = s * (g @ B)
    return g @ W + (h * c) @ A, (h * c).T @ x, s * g.T @ ((x @ A.T) * c), (h * (x @ A.T)).sum(0)


def by_autograd(g, x, W, A, B, c, s):
    x, A, B, c = (t.detach().clone().requires_grad_() for t in (x, A, B, c))
    y = F.linear(x, W) + s * ((x @ A.T) * c) @ B.T
    return torch.autograd.grad(y, (x, A, B, c), g)


def spoilt(i, make):
    def answer(*arguments):
        found = list(gradients(*arguments))
        found[i] = make(*arguments)
        return tuple(found)

    return answer


back.wrong("x: the base's part", spoilt(0, lambda g, x, W, A, B, c, s: g @ W))
back.wrong("x: the update's part", spoilt(0, lambda g, x, W, A, B, c, s: s * (g @ B * c) @ A))
back.wrong("x: no scale", spoilt(0, lambda g, x, W, A, B, c, s: g @ W + (g @ B * c) @ A))
back.wrong("x: no gates", spoilt(0, lambda g, x, W, A, B, c, s: g @ W + s * (g @ B) @ A))
back.wrong("x: gates twice", spoilt(0, lambda g, x, W, A, B, c, s: g @ W + s * (g @ B * c * c) @ A))
back.wrong("x: all scaled", spoilt(0, lambda g, x, W, A, B, c, s: s * (g @ W + (g @ B * c) @ A)))
back.wrong("x: |gates|", spoilt(0, lambda g, x, W, A, B, c, s: g @ W + s * (g @ B * c.abs()) @ A))
back.wrong("A: no scale", spoilt(1, lambda g, x, W, A, B, c, s: (g @ B * c).T @ x))
back.wrong("A: scale twice", spoilt(1, lambda g, x, W, A, B, c, s: s * s * (g @ B * c).T @ x))
back.wrong("A: no gates", spoilt(1, lambda g, x, W, A, B, c, s: s * (g @ B).T @ x))
back.wrong("A: transposed", spoilt(1, lambda g, x, W, A, B, c, s: s * x.T @ (g @ B * c)))
back.wrong(
    "A: the mean", spoilt(1, lambda g, x, W, A, B, c, s: s * (g @ B * c).T @ x / (len(x) + 1))
)
back.wrong("B: no scale", spoilt(2, lambda g, x, W, A, B, c, s: g.T @ (x @ A.T * c)))
back.wrong("B: no gates", spoilt(2, lambda g, x, W, A, B, c, s: s * g.T @ (x @ A.T)))
back.wrong("B: minus", spoilt(2, lambda g, x, W, A, B, c, s: -s * g.T @ (x @ A.T * c)))
back.wrong("B: transposed", spoilt(2, lambda g, x, W, A, B, c, s: s * (x @ A.T * c).T @ g))
back.wrong("gates: no scale", spoilt(3, lambda g, x, W, A, B, c, s: (g @ B * (x @ A.T)).sum(0)))
back.wrong(
    "gates: with gates", spoilt(3, lambda g, x, W, A, B, c, s: s * (g @ B * c * (x @ A.T)).sum(0))
)
back.wrong("gates: by row", spoilt(3, lambda g, x, W, A, B, c, s: s * (g @ B) * (x @ A.T)))
back.wrong(
    "gates: the mean", spoilt(3, lambda g, x, W, A, B, c, s: s * (g @ B * (x @ A.T)).mean(0))
)
back.wrong(
    "gates: one number", spoilt(3, lambda g, x, W, A, B, c, s: s * (g @ B * (x @ A.T)).sum())
)
back.wrong(
    "gates: through the gradient of A, divided by the gate",
    spoilt(3, lambda g, x, W, A, B, c, s: ((s * (g @ B * c).T @ x) * A).sum(1) / c),
)
back.wrong(
    "plain LoRA's", lambda g, x, W, A, B, c, s: gradients(g, x, W, A, B, torch.ones_like(c), s)
)
back.wrong("three", lambda *a: gradients(*a)[:3])
back.wrong("another order", lambda *a: gradients(*a)[::-1])
back.wrong("W's too", lambda g, x, W, A, B, c, s: (*gradients(g, x, W, A, B, c, s), g.T @ x))
back.wrong("scale 1", lambda g, x, W, A, B, c, s: gradients(g, x, W, A, B, c, 1.0))
back.wrong(
    "a ΔW on the way",
    lambda g, x, W, A, B, c, s: (g @ (W + s * (B * c) @ A), *gradients(g, x, W, A, B, c, s)[1:]),
)
back.wrong(
    "W copied",
    lambda g, x, W, A, B, c, s: (
        F.linear(g, W.T.contiguous()) + s * (g @ B * c) @ A,
        *gradients(g, x, W, A, B, c, s)[1:],
    ),
)
back.wrong(
    "A through gᵀx", spoilt(1, lambda g, x, W, A, B, c, s: s * c[:, None] * (B.T @ (g.T @ x)))
)


@back.wrong("scales the caller's g")
def _(g, x, W, A, B, c, s):
    answer = gradients(g, x, W, A, B, c, s)
    g *= s
    return answer


@back.wrong("the package's, plain")
def _(g, x, W, A, B, c, s):
    base = torch.nn.Linear(W.shape[1], W.shape[0], bias=False).requires_grad_(False)
    base.weight.data = W
    x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
    return (*torch.autograd.grad(FusedLoRA.apply(x, A, B, base, s, 0.0), (x, A, B), g), c * 0)


back.right("as the solution", gradients)
back.right("autograd", by_autograd)
back.right("a list", lambda *a: list(gradients(*a)))
back.right(
    "in 64 bits",
    lambda g, x, W, A, B, c, s: gradients(
        *(t.double() for t in (g, x)), _Lazy(W), *(t.double() for t in (A, B, c)), s
    ),
)
back.right(
    "gates in the factors",
    lambda g, x, W, A, B, c, s: (
        g @ W + s * (g @ (B * c)) @ A,
        s * (B * c).T @ g.T @ x if len(g) < 0 else s * (g @ (B * c)).T @ x,
        s * (g.T @ (x @ A.T)) * c,
        ((g.T @ (x @ A.T)) * B).sum(0) * s,
    ),
)
back.right(
    "einsum",
    lambda g, x, W, A, B, c, s: (
        g @ W + s * torch.einsum("nr,r,ri->ni", g @ B, c, A),
        s * torch.einsum("nr,r,ni->ri", g @ B, c, x),
        s * torch.einsum("no,nr,r->or", g, x @ A.T, c),
        s * torch.einsum("nr,nr->r", g @ B, x @ A.T),
    ),
)


class _Lazy:
    """A weight that is only multiplied: `g @ W` in W's own type."""

    def __init__(self, W):
        self.W = W

    def __rmatmul__(self, g):
        return (g.float() @ self.W).double()


@back.right("row by row")
def _(g, x, W, A, B, gates, scaling):
    gx, gA, gB, gc = (
        torch.zeros_like(x),
        torch.zeros_like(A),
        torch.zeros_like(B),
        torch.zeros_like(gates),
    )
    for i in range(len(x)):
        into, h = scaling * (g[i] @ B), A @ x[i]
        gx[i] = g[i] @ W + (into * gates) @ A
        gA += torch.outer(into * gates, x[i])
        gB += scaling * torch.outer(g[i], h * gates)
        gc += into * h
    return gx, gA, gB, gc


@back.right("numpy")
def _(g, x, W, A, B, gates, scaling):
    g, x, W, A, B, c = (t.numpy() for t in (g, x, W, A, B, gates))
    h = scaling * g @ B
    return g @ W + (h * c) @ A, (h * c).T @ x, scaling * g.T @ (x @ A.T * c), (h * (x @ A.T)).sum(0)


rounded = Answers(check_merge_rounded)


def merge(W, A, B, s, weight=None, share=None):
    delta = s * B @ A
    merged = (W.float() + delta).to(W.dtype) if weight is None else weight(W, delta)
    moved = delta != 0
    count = ((merged == W) & moved).sum() / max(1, int(moved.sum()))
    return merged, count.item() if share is None else share(W, merged, delta)


def weight(make):
    return lambda W, A, B, s: merge(W, A, B, s, weight=make)


def share(make):
    return lambda W, A, B, s: merge(W, A, B, s, share=make)


rounded.wrong("rounds ΔW first", weight(lambda W, d: W + d.to(W.dtype)))
rounded.wrong(
    "the product in W's type",
    lambda W, A, B, s: merge(W, A, B, s, weight=lambda W, d: W + s * B.to(W.dtype) @ A.to(W.dtype)),
)
rounded.wrong("bf16 always", weight(lambda W, d: (W.float() + d).bfloat16().to(W.dtype)))
rounded.wrong("fp16 always", weight(lambda W, d: (W.float() + d).half().to(W.dtype)))
rounded.wrong(
    "through bf16 and W's type", weight(lambda W, d: (W.float() + d.bfloat16().float()).to(W.dtype))
)
rounded.wrong("in fp32", weight(lambda W, d: W.float() + d))
rounded.wrong("unchanged", weight(lambda W, d: W.clone()))
rounded.wrong("minus", weight(lambda W, d: (W.float() - d).to(W.dtype)))
rounded.wrong("twice", weight(lambda W, d: (W.float() + 2 * d).to(W.dtype)))
rounded.wrong("no scale", lambda W, A, B, s: merge(W, A, B, 1.0))
rounded.wrong("ΔW only", weight(lambda W, d: d.to(W.dtype)))
rounded.wrong("transposed", weight(lambda W, d: (W.float() + d).to(W.dtype).T))
rounded.wrong("of all entries", share(lambda W, m, d: (m == W).float().mean().item()))
rounded.wrong("lost of all", share(lambda W, m, d: ((m == W) & (d != 0)).float().mean().item()))
rounded.wrong(
    "changed", share(lambda W, m, d: ((m != W).sum() / (d != 0).sum().clamp(min=1)).item())
)
rounded.wrong("changed of all", share(lambda W, m, d: (m != W).float().mean().item()))
rounded.wrong("a number of entries", share(lambda W, m, d: int(((m == W) & (d != 0)).sum())))
rounded.wrong(
    "percent",
    share(lambda W, m, d: 100 * ((m == W) & (d != 0)).sum().item() / max(1, int((d != 0).sum()))),
)
rounded.wrong(
    "close",
    share(
        lambda W, m, d: (
            ((torch.isclose(m, W)) & (d != 0)).sum().item() / max(1, int((d != 0).sum()))
        )
    ),
)
rounded.wrong(
    "close by 1e-3",
    share(
        lambda W, m, d: (
            (((m - W).abs() < 1e-3) & (d != 0)).sum().item() / max(1, int((d != 0).sum()))
        )
    ),
)
rounded.wrong(
    "the lost norm",
    share(lambda W, m, d: (((m.float() - W.float() - d).norm() / d.norm()).nan_to_num()).item()),
)
rounded.wrong(
    "the kept part",
    share(
        lambda W, m, d: (((m.float() - W.float()) * d).sum() / d.square().sum()).nan_to_num().item()
    ),
)
rounded.wrong(
    "NaN with no update",
    share(lambda W, m, d: (((m == W) & (d != 0)).sum() / (d != 0).sum()).item()),
)
rounded.wrong(
    "1 with no update",
    share(
        lambda W, m, d: ((m == W) & (d != 0)).sum().item() / int((d != 0).sum()) if d.any() else 1.0
    ),
)
rounded.wrong(
    "ΔW in W's type is 0",
    share(
        lambda W, m, d: (
            ((m == W) & (d != 0)).sum() / (m.to(W.dtype) != 0).sum().clamp(min=1)
        ).item()
    ),
)
rounded.wrong("the weight only", lambda W, A, B, s: merge(W, A, B, s)[0])
rounded.wrong("the share only", lambda W, A, B, s: merge(W, A, B, s)[1])
rounded.wrong("exchanged", lambda W, A, B, s: merge(W, A, B, s)[::-1])
rounded.wrong("a mask", share(lambda W, m, d: (m == W) & (d != 0)))


@rounded.wrong("in place")
def _(W, A, B, s):
    merged, lost = merge(W, A, B, s)
    W.copy_(merged)
    return W, lost


rounded.right("as the solution", merge)
rounded.right(
    "a tensor for the share",
    lambda W, A, B, s: tuple(torch.as_tensor(t) for t in merge(W, A, B, s)),
)
rounded.right(
    "in 64 bits",
    lambda W, A, B, s: merge(
        W, A.double(), B.double(), s, weight=lambda W, d: (W.double() + d).to(W.dtype)
    ),
)
rounded.right(
    "addmm",
    lambda W, A, B, s: merge(
        W, A, B, s, weight=lambda W, d: torch.addmm(W.float(), B, A, alpha=s).to(W.dtype)
    ),
)
rounded.right("a list", lambda *, W, A, B, scaling: list(merge(W, A, B, scaling)))


@rounded.right("entry by entry")
def _(W, A, B, scaling):
    delta = scaling * (B @ A)
    merged = W.clone()
    for i in range(len(W)):
        merged[i] = (W[i].float() + delta[i]).to(W.dtype)
    pairs = list(
        zip(merged.flatten().tolist(), W.flatten().tolist(), delta.flatten().tolist(), strict=True)
    )
    moved = [(new, old) for new, old, d in pairs if d != 0]
    return merged, sum(new == old for new, old in moved) / len(moved) if moved else 0


@rounded.right("in place on a copy")
def _(W, A, B, scaling):
    merged = W.float().clone()
    merged += scaling * B @ A
    merged = merged.to(W.dtype)
    entries = (scaling * B @ A).bool()
    return merged, (merged[entries] == W[entries]).double().mean().nan_to_num().item()


rounded.equivalent("lost.sum().item() → lost.sum()", "a tensor of one number")
rounded.equivalent("updated.sum().item() → updated.sum()", "a tensor of one number")
rounded.equivalent("W.float() → W", "16 and 32 bits are added in 32")


flat = Answers(check_flat_updates)


def own_update(x, adapter):
    A, B, s = adapter
    return s * (x @ A.T) @ B.T


def loop(
    x, lengths, names, adapters, update=own_update, no=lambda x, out: x.new_zeros(len(x), out)
):
    out, found, start = len(next(iter(adapters.values()))[1]), [], 0
    for length, name in zip(lengths, names, strict=True):
        part = x[start : start + length]
        found.append(no(part, out) if name is None else update(part, adapters[name]))
        start += length
    return torch.cat(found)


def named(rename):
    return lambda x, lengths, names, adapters: loop(x, lengths, rename(names, adapters), adapters)


def some(names):
    return next((n for n in names if n), None)


flat.wrong(
    "no scale",
    lambda x, lengths, names, adapters: loop(
        x, lengths, names, adapters, lambda x, a: x @ a[0].T @ a[1].T
    ),
)
flat.wrong(
    "scale twice",
    lambda x, lengths, names, adapters: loop(
        x, lengths, names, adapters, lambda x, a: a[2] * own_update(x, a)
    ),
)
flat.wrong(
    "scale / r",
    lambda x, lengths, names, adapters: loop(
        x, lengths, names, adapters, lambda x, a: own_update(x, a) / len(a[0])
    ),
)
flat.wrong(
    "the i-th adapter",
    named(lambda names, adapters: [list(adapters)[i % 3] for i in range(len(names))]),
)
flat.wrong("the first request's", named(lambda names, adapters: [some(names)] * len(names)))
flat.wrong("the last request's", named(lambda names, adapters: [some(names[::-1])] * len(names)))
flat.wrong("a for None", named(lambda names, adapters: [n or "a" for n in names]))
flat.wrong("reversed", named(lambda names, adapters: names[::-1]))
flat.wrong("sorted names", named(lambda names, adapters: sorted(names, key=lambda n: n or "")))
flat.wrong(
    "all adapters",
    lambda x, lengths, names, adapters: sum(own_update(x, a) for a in adapters.values()),
)
flat.wrong(
    "the mean",
    lambda x, lengths, names, adapters: sum(own_update(x, a) for a in adapters.values()) / 3,
)
flat.wrong("none", lambda x, lengths, names, adapters: 0 * own_update(x, adapters["a"]))
flat.wrong(
    "x for None",
    lambda x, lengths, names, adapters: loop(x, lengths, names, adapters, no=lambda x, out: x),
)
flat.wrong(
    "NaN for None",
    lambda x, lengths, names, adapters: loop(
        x, lengths, names, adapters, no=lambda x, out: torch.full((len(x), out), torch.nan)
    ),
)
flat.wrong(
    "rows of None left out",
    lambda x, lengths, names, adapters: loop(
        x, lengths, names, adapters, no=lambda x, out: x.new_zeros(0, out)
    ),
)
flat.wrong(
    "one row for None",
    lambda x, lengths, names, adapters: loop(
        x, lengths, names, adapters, no=lambda x, out: x.new_zeros(1, out)
    ),
)
flat.wrong(
    "equally long",
    lambda x, lengths, names, adapters: loop(
        x, [len(p) for p in x.tensor_split(len(lengths))], names, adapters
    ),
)
flat.wrong(
    "off by one", lambda x, lengths, names, adapters: loop(x.roll(1, 0), lengths, names, adapters)
)
flat.wrong(
    "rows put back wrong",
    lambda x, lengths, names, adapters: loop(x, lengths, names, adapters).flip(0),
)
flat.wrong(
    "the last tokens only",
    lambda x, lengths, names, adapters: torch.stack(
        [loop(x, lengths, names, adapters)[sum(lengths[: i + 1]) - 1] for i in range(len(lengths))]
    ),
)
flat.wrong(
    "a list",
    lambda x, lengths, names, adapters: list(loop(x, lengths, names, adapters).split(lengths)),
)
flat.wrong("transposed", lambda x, lengths, names, adapters: loop(x, lengths, names, adapters).T)
flat.wrong(
    "through ΔW",
    lambda x, lengths, names, adapters: loop(
        x, lengths, names, adapters, lambda x, a: x @ (a[2] * a[1] @ a[0]).T
    ),
)
flat.wrong(
    "rank 1 of each",
    lambda x, lengths, names, adapters: loop(
        x, lengths, names, adapters, lambda x, a: own_update(x, (a[0][:1], a[1][:, :1], a[2]))
    ),
)
flat.wrong(
    "stops at None",
    lambda x, lengths, names, adapters: torch.cat(
        [own_update(p, adapters[n]) for p, n in zip(x.split(lengths), names, strict=True)]
    ),
)
flat.wrong(
    "a batch of equal lengths",
    lambda x, lengths, names, adapters: own_update(
        x.reshape(len(lengths), -1, x.shape[1]), adapters["a"]
    ).flatten(0, 1),
)
flat.wrong(
    "empty requests shift the names",
    lambda x, lengths, names, adapters: loop(
        x, [n for n in lengths if n], names[: sum(n > 0 for n in lengths)], adapters
    ),
)


@flat.wrong("takes names off the caller's list")
def _(x, lengths, names, adapters):
    answer = loop(x, lengths, names, adapters)
    names.pop()
    return answer


@flat.wrong("folds the scales into the caller's adapters")
def _(x, lengths, names, adapters):
    answer = loop(x, lengths, names, adapters)
    for _, B, s in adapters.values():
        B.mul_(s)
    return answer


@flat.wrong("ranks filled up, scales of the largest")
def _(x, lengths, names, adapters):
    s = max(adapters.values(), key=lambda a: len(a[0]))[2]
    return loop(x, lengths, names, adapters, lambda x, a: own_update(x, (*a[:2], s)))


flat.right("as the solution", loop)
flat.right(
    "in 64 bits",
    lambda x, lengths, names, adapters: loop(
        x.double(),
        lengths,
        names,
        {n: (A.double(), B.double(), s) for n, (A, B, s) in adapters.items()},
    ),
)
flat.right("by name only", lambda *, x, lengths, names, adapters: loop(x, lengths, names, adapters))


@flat.right("adapter by adapter")
def _(x, lengths, names, adapters):
    y = torch.zeros(len(x), len(next(iter(adapters.values()))[1]))
    whose = [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]
    for name, adapter in adapters.items():
        rows = torch.tensor([n == name for n in whose], dtype=torch.bool)
        y[rows] = own_update(x[rows], adapter)
    return y


@flat.right("all adapters, then a mask of components")
def _(x, lengths, names, adapters):
    h = x @ torch.cat([A for A, _, _ in adapters.values()]).T
    B = torch.cat([s * B for _, B, s in adapters.values()], 1)
    owner = [name for name, (A, _, _) in adapters.items() for _ in A]
    whose = [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]
    mask = torch.tensor([[o == w for o in owner] for w in whose])
    return (h * mask) @ B.T


@flat.right("factors gathered for each token")
def _(x, lengths, names, adapters):
    r = max(len(A) for A, _, _ in adapters.values())
    pad = torch.nn.functional.pad
    A = torch.stack([pad(s * A, (0, 0, 0, r - len(A))) for A, _, s in adapters.values()])
    B = torch.stack([pad(B, (0, r - B.shape[1])) for _, B, _ in adapters.values()])
    A, B = torch.cat([A, 0 * A[:1]]), torch.cat([B, B[:1]])
    places = {name: i for i, name in enumerate(adapters)} | {None: len(adapters)}
    index = torch.tensor([places[n] for n, k in zip(names, lengths, strict=True) for _ in range(k)])
    h = torch.einsum("tri,ti->tr", A[index], x)
    return torch.einsum("tor,tr->to", B[index], h)


@flat.right("token by token")
def _(x, lengths, names, adapters):
    rows, tokens = [], iter(x)
    for length, name in zip(lengths, names, strict=True):
        for _ in range(length):
            token = next(tokens)
            A, B, s = adapters[name or "a"]
            rows.append(s * (name is not None) * (B @ (A @ token)))
    return torch.stack(rows)


@flat.right("numpy")
def _(x, lengths, names, adapters):
    x, start = x.numpy(), 0
    y = np.zeros((len(x), len(adapters["a"][1])))
    for length, name in zip(lengths, names, strict=True):
        if name in adapters:
            A, B, s = adapters[name]
            y[start : start + length] = s * x[start : start + length] @ A.numpy().T @ B.numpy().T
        start += length
    return y


times = Answers(check_times_merged)


def delta(A, B, s):
    return s * B @ A


def change(o, n):
    return n.float() - o.float()


def count(o, n, A, B, s):
    d, c = delta(A, B, s), change(o, n)
    return round(((c * d).sum() / d.square().sum()).item())


def ratio(make):
    return lambda o, n, A, B, s: make(change(o, n), delta(A, B, s))


def tried(numbers, close):
    def answer(o, n, A, B, s):
        return next((k for k in numbers if close(o.float() + k * delta(A, B, s), n.float())), 0)

    return answer


def exact(x):
    return ((x[0] * x[1]).sum() / x[1].square().sum()).item()


times.wrong(
    "the largest entry",
    ratio(
        lambda c, d: round((c.flatten()[d.abs().argmax()] / d.flatten()[d.abs().argmax()]).item())
    ),
)
times.wrong("entry [0, 0]", ratio(lambda c, d: round((c[0, 0] / d[0, 0]).item())))
times.wrong("entry [-1, -1]", ratio(lambda c, d: round((c[-1, -1] / d[-1, -1]).item())))
times.wrong("the median of ratios", ratio(lambda c, d: round((c / d).nanmedian().item())))
times.wrong("the mean of ratios", ratio(lambda c, d: round((c / d).nanmean().item())))
times.wrong(
    "the most frequent ratio",
    ratio(lambda c, d: statistics.mode((c / d).nan_to_num().round().flatten().int().tolist())),
)
times.wrong("sums", ratio(lambda c, d: round((c.sum() / d.sum()).item())))
times.wrong("sums of sizes", ratio(lambda c, d: round((c.abs().sum() / d.abs().sum()).item())))
times.wrong("norms", ratio(lambda c, d: round((c.norm() / d.norm()).item())))
times.wrong(
    "squared norms", ratio(lambda c, d: round((c.square().sum() / d.square().sum()).item()))
)
times.wrong(
    "norms with the sign of the product",
    ratio(lambda c, d: round((c.norm() / d.norm() * (c * d).sum().sign()).item())),
)
times.wrong(
    "norms with the sign of an entry",
    ratio(lambda c, d: round((c.norm() / d.norm() * (c[0, 0] * d[0, 0]).sign()).item())),
)
times.wrong(
    "the cosine",
    ratio(lambda c, d: round(F.cosine_similarity(c.flatten(), d.flatten(), 0).nan_to_num().item())),
)
times.wrong("the product, not divided", ratio(lambda c, d: round((c * d).sum().item())))
times.wrong("divided by the norm", ratio(lambda c, d: round(((c * d).sum() / d.norm()).item())))
times.wrong(
    "one row",
    ratio(lambda c, d: round(((c[0] * d[0]).sum() / d[0].square().sum()).nan_to_num().item())),
)
times.wrong(
    "one column",
    ratio(
        lambda c, d: (
            round(((c[:, 0] * d[:, 0]).sum() / d[:, 0].square().sum()).nan_to_num().item())
            if d[0, 0] != 0
            else int(c.any())
        )
    ),
)
times.wrong(
    "−1, 0, 1, 2", tried((-1, 0, 1, 2), lambda a, b: (a - b).norm() < 0.5 * max(1e-9, b.norm()))
)
times.wrong("clamped", lambda *a: max(-1, min(2, count(*a))))
times.wrong("never negative", lambda *a: max(0, count(*a)))
times.wrong("the size", lambda *a: abs(count(*a)))
times.wrong("cut", lambda o, n, A, B, s: int(exact((change(o, n), delta(A, B, s)))))
times.wrong("floor", lambda o, n, A, B, s: int(exact((change(o, n), delta(A, B, s))) // 1))
times.wrong("int(x + ½)", lambda o, n, A, B, s: int(exact((change(o, n), delta(A, B, s))) + 0.5))
times.wrong("unrounded", lambda o, n, A, B, s: exact((change(o, n), delta(A, B, s))))
times.wrong("one digit", lambda o, n, A, B, s: round(exact((change(o, n), delta(A, B, s))), 1))
times.wrong("no scale", lambda o, n, A, B, s: count(o, n, A, B, 1.0))
times.wrong("scale squared", lambda o, n, A, B, s: count(o, n, A, B, s * s))
times.wrong("turned round", lambda o, n, A, B, s: count(n, o, A, B, s))
times.wrong("the weight now", lambda o, n, A, B, s: count(torch.zeros_like(o), n, A, B, s))
times.wrong("whether", lambda *a: count(*a) != 0)
times.wrong("whether, as a number", lambda o, n, A, B, s: int(not torch.equal(o, n)))
times.wrong("a word", lambda *a: "twice")
times.wrong("equality", tried(range(-9, 10), lambda a, b: torch.equal(a, b)))
times.wrong("close by 1e-4", tried(range(-9, 10), lambda a, b: torch.allclose(a, b, atol=1e-4)))
times.wrong("close by 0.05", tried(range(-9, 10), lambda a, b: torch.allclose(a, b, atol=0.05)))
times.wrong("constant 1", lambda *a: 1)
times.wrong("constant 0", lambda *a: 0)


@times.wrong("all in the weight's type")
def _(o, n, A, B, s):
    d, c = delta(A.to(o.dtype), B.to(o.dtype), s), n - o
    return round(((c * d).sum() / (d * d).sum()).item())


@times.wrong("subtracts in the caller's weight")
def _(o, n, A, B, s):
    answer = count(o, n, A, B, s)
    n -= o
    return answer


@times.wrong("counts up only")
def _(o, n, A, B, s):
    k, d, c = 0, delta(A, B, s), change(o, n)
    while (c - d).norm() < c.norm():
        c, k = c - d, k + 1
    return k


times.right("as the solution", count)
times.right("a float", lambda *a: float(count(*a)))
times.right("a tensor", lambda *a: torch.tensor(count(*a)))
times.right("numpy's", lambda *a: np.int64(count(*a)))
times.right(
    "least squares",
    lambda o, n, A, B, s: round(
        torch.linalg.lstsq(
            delta(A, B, s).reshape(-1, 1), change(o, n).reshape(-1, 1)
        ).solution.item()
    ),
)
times.right(
    "the nearest of many",
    lambda original, now, A, B, scaling: min(
        range(-20, 21),
        key=lambda k: (
            (original.double() + k * scaling * (B.double() @ A.double()) - now.double())
            .square()
            .sum()
            .item()
        ),
    ),
)


@times.right("thin")
def _(o, n, A, B, s):
    product = ((change(o, n) @ A.T) * B).sum()
    return round((product / (s * ((A @ A.T) * (B.T @ B)).sum())).item())


@times.right("numpy in 64 bits")
def _(o, n, A, B, s):
    d, c = s * B.double().numpy() @ A.double().numpy(), (n.double() - o.double()).numpy()
    return np.rint((c * d).sum() / (d * d).sum())


times.equivalent("now.float() → now", "16 and 32 bits are subtracted in 32")
times.equivalent("original.float() → original", "16 and 32 bits are subtracted in 32")
