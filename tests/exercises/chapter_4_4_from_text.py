"""Answers to chapter 4.4's exercises by somebody who has read no more than the text and the stub."""

import collections

import numpy as np
import torch
from torch.nn import functional as F

from tests.exercises.chapter_4_4 import back, flat, rounded, times


def four(*arguments, **other):
    """The four gradients, of which each can be replaced."""
    g, x, W, A, B, c, s = arguments
    right = {
        "x": lambda: g @ W + s * (g @ B * c) @ A,
        "A": lambda: s * (g @ B * c).T @ x,
        "B": lambda: s * g.T @ (x @ A.T * c),
        "gates": lambda: s * (g @ B * (x @ A.T)).sum(0),
    }
    return tuple(other[name](*arguments) if name in other else f() for name, f in right.items())


def but(**other):
    return lambda *arguments: four(*arguments, **other)


back.wrong("x: the base left out", but(x=lambda g, x, W, A, B, c, s: s * (g @ B * c) @ A))
back.wrong("x: the update left out", but(x=lambda g, x, W, A, B, c, s: g @ W))
back.wrong("x: no gates", but(x=lambda g, x, W, A, B, c, s: g @ W + s * (g @ B) @ A))
back.wrong(
    "x: the base scaled too", but(x=lambda g, x, W, A, B, c, s: s * (g @ W + (g @ B * c) @ A))
)
back.wrong(
    "x: the merged weight", but(x=lambda g, x, W, A, B, c, s: g @ (W + s * B @ torch.diag(c) @ A))
)
back.wrong("A: no scale", but(A=lambda g, x, W, A, B, c, s: (g @ B * c).T @ x))
back.wrong("A: no gates", but(A=lambda g, x, W, A, B, c, s: s * (g @ B).T @ x))
back.wrong("A: gates squared", but(A=lambda g, x, W, A, B, c, s: s * (g @ B * c * c).T @ x))
back.wrong(
    "A: through the gradient of the weight",
    but(A=lambda g, x, W, A, B, c, s: s * c[:, None] * (B.T @ (g.T @ x))),
)
back.wrong(
    "A: the mean over rows", but(A=lambda g, x, W, A, B, c, s: s * (g @ B * c).T @ x / len(x))
)
back.wrong("B: no gates", but(B=lambda g, x, W, A, B, c, s: s * g.T @ (x @ A.T)))
back.wrong("B: transposed", but(B=lambda g, x, W, A, B, c, s: s * (x @ A.T * c).T @ g))
back.wrong("B: no scale", but(B=lambda g, x, W, A, B, c, s: g.T @ (x @ A.T * c)))
back.wrong("gates: no scale", but(gates=lambda g, x, W, A, B, c, s: (g @ B * (x @ A.T)).sum(0)))
back.wrong(
    "gates: a row",
    but(gates=lambda g, x, W, A, B, c, s: s * (g @ B * (x @ A.T)).sum(0, keepdim=True)),
)
back.wrong(
    "gates: A's gradient over the gate",
    but(gates=lambda g, x, W, A, B, c, s: (s * (g @ B * c).T @ x * A).sum(1) / c),
)
back.wrong(
    "gates: where open only",
    but(gates=lambda g, x, W, A, B, c, s: s * (g @ B * (x @ A.T)).sum(0) * (c != 0)),
)
back.wrong(
    "gates: product of sums",
    but(gates=lambda g, x, W, A, B, c, s: s * (g @ B).sum(0) * (x @ A.T).sum(0)),
)
back.wrong("the order x, gates, A, B", lambda *a: (lambda x, A, B, c: (x, c, A, B))(*four(*a)))
back.wrong("W's too", lambda *a: (*four(*a), a[0].T @ a[1]))


@back.wrong("closes in place")
def _(g, x, W, A, B, gates, scaling):
    found = four(g, x, W, A, B, gates, scaling)
    B *= gates
    return found


@back.wrong("autograd through a merged weight")
def _(g, x, W, A, B, gates, scaling):
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B, gates)]
    X, P, Q, c = leaves
    return torch.autograd.grad(X @ (W + scaling * (Q * c) @ P).T, leaves, g)


@back.right("autograd of the thin way")
def _(g, x, W, A, B, gates, scaling):
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B, gates)]
    X, P, Q, c = leaves
    return torch.autograd.grad(X @ W.T + scaling * (X @ P.T * c) @ Q.T, leaves, g)


@back.right("torch.func.vjp")
def _(g, x, W, A, B, gates, scaling):
    def f(x, A, B, c):
        return x @ W.T + scaling * (x @ A.T * c) @ B.T

    return torch.func.vjp(f, x, A, B, gates)[1](g)


@back.right("rank by rank")
def _(g, x, W, A, B, gates, scaling):
    dx, dA, dB, dc = g @ W, torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(gates)
    for i in range(len(A)):
        h, up = x @ A[i], scaling * g @ B[:, i]
        dx = dx + gates[i] * torch.outer(up, A[i])
        dA[i], dB[:, i], dc[i] = gates[i] * up @ x, scaling * gates[i] * h @ g, up @ h
    return [dx, dA, dB, dc]


@back.right("einsum")
def _(g, x, W, A, B, gates, scaling):
    up = torch.einsum("no,or->nr", g, B) * scaling
    h = torch.einsum("ni,ri->nr", x, A)
    return (
        torch.einsum("no,oi->ni", g, W) + torch.einsum("nr,r,ri->ni", up, gates, A),
        torch.einsum("nr,ni->ri", up * gates, x),
        scaling * torch.einsum("no,nr->or", g, h * gates),
        torch.einsum("nr,nr->r", up, h),
    )


back.right("numpy", lambda *a: four(*[t.numpy() if isinstance(t, torch.Tensor) else t for t in a]))


@back.right("float64, but for the base")
def _(g, x, W, A, B, gates, scaling):
    base = (g @ W).double()
    g, x, A, B, gates = (t.double() for t in (g, x, A, B, gates))
    up, h = scaling * (g @ B), x @ A.T
    return base + (up * gates) @ A, (up * gates).T @ x, scaling * g.T @ (h * gates), (up * h).sum(0)


@back.right("a named tuple, factors that hold gates")
def _(g, x, W, A, B, gates, scaling):
    gated = gates[:, None] * A
    up = scaling * (g @ B)
    made = collections.namedtuple("Gradients", "x A B gates")
    return made(
        g @ W + up @ gated,
        gates[:, None] * (up.T @ x),
        scaling * g.T @ (x @ gated.T),
        torch.diagonal(up.T @ (x @ A.T)),
    )


def merge_by(W, A, B, s, *, new=None, moved=None, among=None, end=None):
    delta = s * B @ A
    out = new(W, delta) if new else (W.float() + delta).to(W.dtype)
    same = ~moved(W, out, delta) if moved else out == W
    counted = among(W, out, delta) if among else delta != 0
    share = (same & counted).sum().item() / max(1, counted.sum().item())
    return end(out, share, W, delta) if end else (out, share)


def adding(**parts):
    return lambda *arguments: merge_by(*arguments, **parts)


rounded.wrong("ΔW in the weight's type", adding(new=lambda W, d: W + d.to(W.dtype)))
rounded.wrong(
    "the sum in the weight's type",
    adding(new=lambda W, d: (W.to(torch.bfloat16) + d.to(torch.bfloat16)).to(W.dtype)),
)
rounded.wrong("stays in fp32", adding(new=lambda W, d: W.float() + d))
rounded.wrong("bf16 whatever", adding(new=lambda W, d: (W.float() + d).bfloat16()))
rounded.wrong(
    "rounded toward zero",
    adding(
        new=lambda W, d: torch.where(
            (n := (W.float() + d).to(W.dtype)).float().abs() > (W.float() + d).abs(), W, n
        )
    ),
)
rounded.wrong("no scale", lambda W, A, B, s: merge_by(W, A, B, 1.0))
rounded.wrong("takes off", lambda W, A, B, s: merge_by(W, A, B, -s))
rounded.wrong(
    "share of all entries",
    adding(end=lambda o, p, W, d: (o, ((o == W) & (d != 0)).float().mean().item())),
)
rounded.wrong(
    "unchanged, counted among all",
    adding(among=lambda W, o, d: torch.ones_like(d, dtype=torch.bool)),
)
rounded.wrong(
    "unchanged, over those with an update",
    adding(end=lambda o, p, W, d: (o, (o == W).sum().item() / max(1, (d != 0).sum().item()))),
)
rounded.wrong("the share that moved", adding(end=lambda o, p, W, d: (o, 1 - p)))
rounded.wrong("percent", adding(end=lambda o, p, W, d: (o, 100 * p)))
rounded.wrong("how many", adding(end=lambda o, p, W, d: (o, ((o == W) & (d != 0)).sum().item())))
rounded.wrong(
    "nearly as they were", adding(moved=lambda W, o, d: ~torch.isclose(o.float(), W.float()))
)
rounded.wrong("updates that round to 0", adding(among=lambda W, o, d: d.to(W.dtype).abs() > 1e-4))
rounded.wrong(
    "NaN without an update",
    adding(
        end=lambda o, p, W, d: (
            o,
            ((o == W) & (d != 0)).sum().item() / (d != 0).sum().item()
            if (d != 0).any()
            else float("nan"),
        )
    ),
)
rounded.wrong(
    "1 without an update", adding(end=lambda o, p, W, d: (o, p if (d != 0).any() else 1.0))
)
rounded.wrong("the share first", adding(end=lambda o, p, W, d: (p, o)))
rounded.wrong(
    "less than half a step",
    adding(
        end=lambda o, p, W, d: (
            o,
            (d.abs() < W.float().abs() * torch.finfo(W.dtype).eps / 2)[d != 0].float().mean().item()
            if (d != 0).any()
            else 0.0,
        )
    ),
)
rounded.wrong(
    "ΔW transposed where it fits",
    lambda W, A, B, s: merge_by(W, B.T, A.T, s) if len(W) == W.shape[1] else (W + s * B @ A, 0.0),
)


@rounded.wrong("in place")
def _(W, A, B, scaling):
    before = W.clone()
    W += scaling * B @ A
    return W, merge_by(before, A, B, scaling)[1]


@rounded.wrong("in place, the share after")
def _(W, A, B, scaling):
    delta = scaling * B @ A
    new = W.copy_((W.float() + delta).to(W.dtype))
    return new, (new == W)[delta != 0].float().mean().item() if (delta != 0).any() else 0.0


@rounded.right("a masked mean")
def _(W, A, B, scaling):
    delta = (B @ A).mul(scaling)
    out = torch.add(W.float(), delta).type_as(W)
    lost = (out == W)[delta != 0]
    return [out, float(lost.float().mean()) if lost.numel() else 0]


@rounded.right("the share as a tensor")
def _(W, A, B, scaling):
    delta = B @ (scaling * A)
    out = (W.to(torch.float32) + delta).to(W.dtype)
    return out, torch.nan_to_num((out.eq(W) & delta.ne(0)).sum() / delta.ne(0).sum())


@rounded.wrong("in place, where float() makes no copy")
def _(W, A, B, scaling):
    delta = scaling * (B @ A)
    out = W.float().add_(delta).to(W.dtype)
    unmoved = torch.isclose(out, W, rtol=0, atol=0)
    counted = delta.count_nonzero()
    return out, (unmoved & delta.bool()).sum().item() / counted.item() if counted else 0.0


@rounded.right("rank by rank")
def _(W, A, B, scaling):
    delta = sum(scaling * torch.outer(B[:, i], A[i]) for i in range(len(A)))
    return merge_by(W, torch.eye(len(A[0])), delta, 1.0)


@rounded.right("row by row")
def _(W, A, B, scaling):
    out, same, count = torch.empty_like(W), 0, 0
    for i in range(len(W)):
        delta = scaling * B[i] @ A
        out[i] = (W[i].float() + delta).to(W.dtype)
        same += int((out[i][delta != 0] == W[i][delta != 0]).sum())
        count += int((delta != 0).sum())
    return out, same / count if count else 0.0


@rounded.right("einsum, counted in numpy")
def _(W, A, B, scaling):
    delta = torch.einsum("or,ri->oi", B, A) * scaling
    out = (W.float() + delta).to(W.dtype)
    same, has = (out == W).numpy(), (delta != 0).numpy()
    return out, np.float64(same[has].mean()) if has.any() else np.float64(0)


rounded.right(
    "addmm",
    lambda W, A, B, s: (
        (o := torch.addmm(W.float(), B, A, alpha=s).to(W.dtype)),
        ((o == W) & (B @ A != 0)).sum().item() / max(1, (B @ A != 0).sum().item()),
    ),
)


def spread(x, lengths, names, adapters, *, each=None, at=None, none=None):
    out, parts = next(iter(adapters.values()))[1].shape[0], []
    start = 0
    for i, (n, name) in enumerate(zip(lengths, names, strict=True)):
        rows = x[at(start, n, i) : at(start, n, i) + n] if at else x[start : start + n]
        start += n
        if name is None:
            parts.append(none(rows, out) if none else rows.new_zeros(n, out))
        else:
            A, B, s = adapters[name]
            parts.append(each(rows, A, B, s) if each else s * rows @ A.T @ B.T)
    return torch.cat(parts)


def batch(**parts):
    return lambda *arguments: spread(*arguments, **parts)


flat.wrong("no scale", batch(each=lambda x, A, B, s: x @ A.T @ B.T))
flat.wrong("scale twice", batch(each=lambda x, A, B, s: s * (s * x @ A.T) @ B.T))
flat.wrong("through ΔW", batch(each=lambda x, A, B, s: x @ (s * B @ A).T))
flat.wrong("α/r of a scale", batch(each=lambda x, A, B, s: s / len(A) * x @ A.T @ B.T))
flat.wrong(
    "the mean of a request",
    batch(each=lambda x, A, B, s: (s * x.mean(0, keepdim=True) @ A.T @ B.T).expand(len(x), -1)),
)
flat.wrong("always the first rows", batch(at=lambda start, n, i: 0))
flat.wrong("one row late", batch(at=lambda start, n, i: max(0, start - 1)))
flat.wrong(
    "equal lengths",
    lambda x, lengths, names, adapters: spread(
        x,
        [len(x) // len(names)] * (len(names) - 1)
        + [len(x) - len(x) // len(names) * (len(names) - 1)],
        names,
        adapters,
    ),
)
flat.wrong(
    "drops requests without an adapter",
    lambda x, lengths, names, adapters: torch.cat(
        [
            s * x[a : a + n] @ A.T @ B.T
            for a, n, name in zip(np.cumsum([0, *lengths]), lengths, names, strict=False)
            if name is not None
            for A, B, s in [adapters[name]]
        ]
    ),
)
flat.wrong(
    "the rows themselves without an adapter",
    batch(none=lambda x, out: F.pad(x, (0, max(0, out - x.shape[1])))[:, :out]),
)
flat.wrong(
    "adapters in their order",
    lambda x, lengths, names, adapters: spread(
        x,
        lengths,
        [None if n is None else list(adapters)[i % len(adapters)] for i, n in enumerate(names)],
        adapters,
    ),
)
flat.wrong(
    "the first adapter for all",
    lambda x, lengths, names, adapters: spread(
        x, lengths, [None if n is None else next(iter(adapters)) for n in names], adapters
    ),
)
flat.wrong(
    "the first adapter without one",
    lambda x, lengths, names, adapters: spread(
        x, lengths, [next(iter(adapters)) if n is None else n for n in names], adapters
    ),
)
flat.wrong(
    "all adapters, summed",
    lambda x, lengths, names, adapters: sum(s * x @ A.T @ B.T for A, B, s in adapters.values()),
)
flat.wrong(
    "skips empty requests together with their names",
    lambda x, lengths, names, adapters: spread(
        x, [n for n in lengths if n], names[: sum(n > 0 for n in lengths)], adapters
    ),
)
flat.wrong(
    "ranks cut to the smallest",
    lambda x, lengths, names, adapters: spread(
        x,
        lengths,
        names,
        {
            k: (
                A[: min(len(v[0]) for v in adapters.values())],
                B[:, : min(len(v[0]) for v in adapters.values())],
                s,
            )
            for k, (A, B, s) in adapters.items()
        },
    ),
)
flat.wrong("a list", lambda *a: [spread(*a)[:0], spread(*a)])
flat.wrong(
    "x is added",
    lambda x, *a: (
        (u := spread(x, *a)) + F.pad(x, (0, max(0, u.shape[1] - x.shape[1])))[:, : u.shape[1]]
    ),
)
flat.wrong("transposed", lambda *a: spread(*a).T)
flat.wrong(
    "twice the same adapter gives it once",
    lambda x, lengths, names, adapters: spread(
        x, lengths, [n if n not in names[:i] else None for i, n in enumerate(names)], adapters
    ),
)
flat.wrong(
    "rows in the order of names",
    lambda x, lengths, names, adapters: torch.cat(
        [
            spread(x, lengths, names, adapters)[
                torch.tensor(
                    [i for i, n in enumerate(names) for _ in range(lengths[i]) if n == name],
                    dtype=torch.long,
                )
            ]
            for name in [*adapters, None]
        ]
    ),
)


@flat.wrong("scales the rows in place")
def _(x, lengths, names, adapters):
    out, start = [], 0
    for n, name in zip(lengths, names, strict=True):
        rows = x[start : start + n]
        start += n
        A, B, s = adapters[name] if name is not None else (*next(iter(adapters.values()))[:2], 0.0)
        rows *= s
        out.append(rows @ A.T @ B.T)
    return torch.cat(out)


@flat.right("a mask for each adapter")
def _(x, lengths, names, adapters):
    of = np.repeat(np.array([n if n is not None else "" for n in names], dtype=object), lengths)
    out = torch.zeros(len(x), next(iter(adapters.values()))[1].shape[0])
    for name, (A, B, s) in adapters.items():
        rows = torch.tensor([n == name and n is not None for n in of], dtype=torch.bool)
        out[rows] = s * (x[rows] @ A.T) @ B.T
    return out


@flat.right("token by token")
def _(x, lengths, names, adapters):
    owner = [name for n, name in zip(lengths, names, strict=True) for _ in range(n)]
    out = x.new_zeros(len(x), len(next(iter(adapters.values()))[1]))
    for i, name in enumerate(owner):
        if name is not None:
            A, B, s = adapters[name]
            out[i] = B @ (A @ x[i]) * s
    return out


@flat.right("all ranks side by side, masked")
def _(x, lengths, names, adapters):
    owner = [name for n, name in zip(lengths, names, strict=True) for _ in range(n)]
    A = torch.cat([a for a, _, _ in adapters.values()])
    B = torch.cat([s * b for _, b, s in adapters.values()], 1)
    of_rank = [name for name, (a, _, _) in adapters.items() for _ in range(len(a))]
    mask = torch.tensor([[o == r and o is not None for r in of_rank] for o in owner]).reshape(
        len(x), len(of_rank)
    )
    return (x @ A.T * mask) @ B.T


@flat.right("split")
def _(x, lengths, names, adapters):
    out = len(next(iter(adapters.values()))[1])
    parts = zip(torch.split(x, list(lengths)), names, strict=True)
    return torch.cat(
        [
            torch.zeros(len(rows), out)
            if name is None
            else F.linear(F.linear(rows, adapters[name][0]), adapters[name][1]) * adapters[name][2]
            for rows, name in parts
        ]
    )


@flat.right("by recursion, from the end")
def by_recursion(x, lengths, names, adapters):
    if not len(lengths):
        return torch.zeros(0, len(next(iter(adapters.values()))[1]))
    n = lengths[-1]
    cut = len(x) - n
    before = by_recursion(x[:cut], lengths[:-1], names[:-1], adapters)
    return torch.cat([before, spread(x[cut:], [n], [names[-1]], adapters)])


flat.right(
    "numpy",
    lambda x, lengths, names, adapters: np.concatenate(
        [
            np.zeros((n, len(next(iter(adapters.values()))[1])))
            if name is None
            else adapters[name][2]
            * (x[a : a + n].double().numpy() @ adapters[name][0].double().numpy().T)
            @ adapters[name][1].double().numpy().T
            for a, n, name in zip(np.cumsum([0, *lengths]), lengths, names, strict=False)
        ]
    ),
)
flat.right(
    "bf16",
    lambda x, l, n, a: spread(
        x.bfloat16(), l, n, {k: (A.bfloat16(), B.bfloat16(), s) for k, (A, B, s) in a.items()}
    ),
)
flat.right(
    "index_add",
    lambda x, lengths, names, adapters: (
        lambda out: (
            [
                out.index_add_(0, torch.arange(a, a + n), s * x[a : a + n] @ A.T @ B.T)
                for a, n, name in zip(
                    np.cumsum([0, *lengths]).tolist(), lengths, names, strict=False
                )
                if name is not None
                for A, B, s in [adapters[name]]
            ]
            and None
            or out
        )
    )(torch.zeros(len(x), len(next(iter(adapters.values()))[1]))),
)


def count_by(original, now, A, B, s, *, change=None, delta=None, number=None, end=round):
    d = delta(A, B, s) if delta else (s * B.float() @ A.float())
    c = change(original, now) if change else now.float() - original.float()
    n = number(c, d) if number else (c * d).sum() / d.square().sum()
    return end(float(n))


def counting(**parts):
    return lambda *arguments: count_by(*arguments, **parts)


times.wrong("the mean of ratios", counting(number=lambda c, d: (c / d).mean()))
times.wrong(
    "the mean of ratios where it is not 0",
    counting(number=lambda c, d: (c[d != 0] / d[d != 0]).mean()),
)
times.wrong("the median of ratios", counting(number=lambda c, d: (c[d != 0] / d[d != 0]).median()))
times.wrong("a ratio of sums", counting(number=lambda c, d: c.sum() / d.sum()))
times.wrong("a ratio of norms", counting(number=lambda c, d: c.norm() / d.norm()))
times.wrong(
    "a ratio of norms with the sign",
    counting(number=lambda c, d: c.norm() / d.norm() * (c * d).sum().sign()),
)
times.wrong(
    "a ratio of sizes",
    counting(number=lambda c, d: c.abs().sum() / d.abs().sum() * (c * d).sum().sign()),
)
times.wrong("the first entry", counting(number=lambda c, d: (c / d)[0, 0]))
times.wrong(
    "the largest update",
    counting(number=lambda c, d: c.flatten()[d.abs().argmax()] / d.flatten()[d.abs().argmax()]),
)
times.wrong(
    "the largest change",
    counting(number=lambda c, d: c.flatten()[c.abs().argmax()] / d.flatten()[c.abs().argmax()]),
)
times.wrong("rounded down", counting(end=int))
times.wrong("rounded up", counting(end=lambda n: int(np.ceil(n - 1e-6)) if n == n else 0))
times.wrong("not rounded", counting(end=float))
times.wrong("never below 0", counting(end=lambda n: max(0, round(n))))
times.wrong("its size", counting(end=lambda n: abs(round(n))))
times.wrong("at most 2", counting(end=lambda n: min(2, round(n))))
times.wrong("no scale", counting(delta=lambda A, B, s: B @ A))
times.wrong("the other sign", counting(change=lambda o, n: o.float() - n.float()))
times.wrong("the wrong denominator", counting(number=lambda c, d: (c * d).sum() / c.square().sum()))
times.wrong(
    "a cosine", counting(number=lambda c, d: F.cosine_similarity(c.flatten(), d.flatten(), dim=0))
)
times.wrong(
    "the difference in its own type, rounded",
    counting(change=lambda o, n: (n - o).to(torch.float8_e4m3fn).float()),
)
times.wrong(
    "within allclose",
    lambda o, n, A, B, s: next(
        (k for k in range(-9, 10) if torch.allclose(o.float() + k * s * B @ A, n.float())), 0
    ),
)
times.wrong(
    "merges one by one until it fits",
    lambda o, n, A, B, s: next(
        (k for k in range(-9, 10) if torch.equal((o.float() + k * s * B @ A).to(o.dtype), n)), 0
    ),
)
times.wrong("changed or not", counting(end=lambda n: int(n != 0)))

times.right(
    "least squares in float64",
    lambda o, n, A, B, s: int(
        round(
            torch.linalg.lstsq(
                (s * B.double() @ A.double()).reshape(-1, 1),
                (n.double() - o.double()).reshape(-1, 1),
            ).solution.item()
        )
    ),
)
times.right(
    "numpy's polyfit without a constant",
    lambda o, n, A, B, s: int(
        np.rint(
            np.vdot(
                d := s * B.double().numpy() @ A.double().numpy(),
                n.double().numpy() - o.double().numpy(),
            )
            / np.vdot(d, d)
        )
    ),
)
times.right(
    "thin inner products",
    lambda o, n, A, B, s: round(
        float((B.double().T @ (n.double() - o.double()) * A.double()).sum())
        / (s * float(((B.double().T @ B.double()) * (A.double() @ A.double().T)).sum()))
    ),
)
times.right(
    "the nearest of many",
    lambda o, n, A, B, s: min(
        range(-50, 51),
        key=lambda k: float(
            (n.double() - o.double() - k * s * B.double() @ A.double()).square().sum()
        ),
    ),
)
times.right("a numpy integer", lambda *a: np.int32(count_by(*a)))
times.right(
    "einsum",
    counting(
        number=lambda c, d: (
            torch.einsum("oi,oi->", c.double(), d.double())
            / torch.einsum("oi,oi->", d.double(), d.double())
        )
    ),
)
times.right("a tensor", lambda *a: torch.tensor(count_by(*a)))


@times.right("weighted by the steps' size")
def _(original, now, A, B, scaling):
    delta = (scaling * B @ A).double()
    change = now.double() - original.double()
    weight = 1 / (original.double().abs() + original.double().abs().mean()) ** 2
    return round(float((weight * change * delta).sum() / (weight * delta * delta).sum()))
