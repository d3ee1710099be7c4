"""Answers to chapter 4.1's exercises by somebody who has read no more than the text and the stub."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from tests.exercises.chapter_4_1 import dense, norms, price, switch


def cut(gate, gradient, lr, cost, *, line=lambda lr, p: (2 * lr * p) ** 0.5, step=None, end=None):
    z = step(gate, gradient, lr, cost) if step else gate - lr * gradient
    u = torch.where(z.abs() > line(lr, cost), z, torch.zeros_like(z))
    return end(u, z, gate, line(lr, cost)) if end else u


def priced(**parts):
    return lambda *arguments: cut(*arguments, **parts)


price.wrong("no 2", priced(line=lambda lr, p: (lr * p) ** 0.5))
price.wrong("no root", priced(line=lambda lr, p: 2 * lr * p))
price.wrong("half in the root", priced(line=lambda lr, p: (lr * p / 2) ** 0.5))
price.wrong("no rate", priced(line=lambda lr, p: (2 * p) ** 0.5))
price.wrong("rate outside the root", priced(line=lambda lr, p: lr * (2 * p) ** 0.5))
price.wrong("2 outside the root", priced(line=lambda lr, p: 2 * (lr * p) ** 0.5))
price.wrong("the soft step's line", priced(line=lambda lr, p: lr * p))
price.wrong("uphill", priced(step=lambda g, d, lr, p: g + lr * d))
price.wrong("no step", priced(step=lambda g, d, lr, p: g))
price.wrong(
    "the price in the gradient", priced(step=lambda g, d, lr, p: g - lr * (d + p * g.sign()))
)
price.wrong("shrinks what stays", priced(end=lambda u, z, g, t: u - t * u.sign()))
price.wrong("none below zero", priced(end=lambda u, z, g, t: u.clamp(min=0)))
price.wrong(
    "closed stays closed",
    priced(end=lambda u, z, g, t: torch.where(g == 0, torch.zeros_like(u), u)),
)
price.wrong(
    "what stays keeps its old value", priced(end=lambda u, z, g, t: torch.where(u != 0, g, u))
)
price.wrong("almost zero", priced(end=lambda u, z, g, t: torch.where(u != 0, u, 1e-6 * z)))
price.wrong("one or zero", priced(end=lambda u, z, g, t: (u != 0).float()))
price.wrong(
    "the old gate decides",
    priced(end=lambda u, z, g, t: torch.where(g.abs() > t, z, torch.zeros_like(z))),
)
price.wrong("by row", priced(end=lambda u, z, g, t: z * (z.norm(dim=-1, keepdim=True) > t)))


@price.wrong("in place")
def _(gate, gradient, learning_rate, price):
    gate -= learning_rate * gradient
    gate[gate.abs() <= (2 * learning_rate * price) ** 0.5] = 0
    return gate


@price.wrong("in place, without a graph")
def _(gate, gradient, learning_rate, price):
    gate.data = cut(gate.data, gradient, learning_rate, price)
    return gate.clone()


price.right(
    "both costs compared",
    lambda g, d, lr, p: torch.where(
        (z := g - lr * d).square() / 2 < lr * p, torch.zeros_like(z), z
    ),
)
price.right("hardshrink", lambda g, d, lr, p: F.hardshrink(g - lr * d, (2 * lr * p) ** 0.5))
price.right(
    "a product", lambda g, d, lr, p: (z := torch.sub(g, d, alpha=lr)) * (z * z > 2 * lr * p)
)
price.right(
    "masked_fill",
    lambda g, d, lr, p: (z := g - lr * d).masked_fill(z.abs() < math.sqrt(2 * lr * p), 0),
)
price.right(
    "numpy",
    lambda g, d, lr, p: np.where(
        np.abs(z := g.numpy() - lr * d.numpy()) > np.sqrt(2 * lr * p), z, 0
    ),
)
price.right("float64", lambda g, d, lr, p: cut(g.double(), d.double(), lr, p))
price.right("a new Parameter", lambda g, d, lr, p: torch.nn.Parameter(cut(g, d, lr, p)))
price.right(
    "by loops",
    lambda g, d, lr, p: torch.tensor(
        [z if z * z / 2 > lr * p else 0.0 for z in (g - lr * d).flatten().tolist()]
    ).reshape(g.shape),
)

dense.wrong("either zero", lambda r, a, b: 1 - (a + b - a * b))
dense.wrong("both zero", lambda r, a, b: 1 - (a * b) ** r)
dense.wrong("shares as sparsities", lambda r, a, b: 1 - (1 - a * b) ** r)
dense.wrong("the sum, up to 1", lambda r, a, b: min(1, r * (1 - a) * (1 - b)))
dense.wrong("all open", lambda r, a, b: ((1 - a) * (1 - b)) ** r)
dense.wrong("the zeros", lambda r, a, b: (1 - (1 - a) * (1 - b)) ** r)
dense.wrong("one rank less", lambda r, a, b: 1 - (1 - (1 - a) * (1 - b)) ** (r - 1))
dense.wrong("one rank more", lambda r, a, b: 1 - (1 - (1 - a) * (1 - b)) ** (r + 1))
dense.wrong("A twice", lambda r, a, b: 1 - (1 - (1 - a) ** 2) ** r)
dense.wrong("the mean sparsity", lambda r, a, b: 1 - (1 - (1 - (a + b) / 2) ** 2) ** r)
dense.wrong("rows and columns each", lambda r, a, b: (1 - a**r) * (1 - b**r))
dense.wrong(
    "logarithms that need a mask", lambda r, a, b: 1 - math.exp(r * math.log(1 - (1 - a) * (1 - b)))
)
dense.wrong("an approximation", lambda r, a, b: 1 - math.exp(-r * (1 - a) * (1 - b)))
dense.wrong("the higher sparsity", lambda r, a, b: 1 - max(a, b) ** r)
dense.wrong("percent", lambda r, a, b: 100 * (1 - (1 - (1 - a) * (1 - b)) ** r))
dense.wrong("rounded", lambda r, a, b: round(1 - (1 - (1 - a) * (1 - b)) ** r, 2))


@dense.wrong("tries it")
def _(r, sparsity_A, sparsity_B):
    rng = np.random.default_rng()
    A = rng.random((r, 200)) >= sparsity_A
    B = rng.random((200, r)) >= sparsity_B
    return float(((B.astype(int) @ A.astype(int)) > 0).mean())


@dense.wrong("integers of the mask")
def _(r, sparsity_A, sparsity_B):
    return 1 - (1 - round((1 - sparsity_A) * r) / r * (1 - sparsity_B)) ** r


dense.right("inclusion and exclusion", lambda r, a, b: 1 - (a + b - a * b) ** r)
dense.right(
    "rank by rank",
    lambda r, a, b: (lambda f: f(f, r))(
        lambda f, n: 0.0 if n == 0 else (p := f(f, n - 1)) + (1 - p) * (1 - a) * (1 - b)
    ),
)
dense.right(
    "a geometric sum",
    lambda r, a, b: sum((1 - a) * (1 - b) * (1 - (1 - a) * (1 - b)) ** i for i in range(r)),
)
dense.right(
    "the binomial",
    lambda r, a, b: sum(
        math.comb(r, i) * ((1 - a) * (1 - b)) ** i * (a + b - a * b) ** (r - i)
        for i in range(1, r + 1)
    ),
)
dense.right(
    "scipy", lambda r, a, b: __import__("scipy.stats").stats.binom.sf(0, r, (1 - a) * (1 - b))
)
dense.right(
    "a tensor", lambda r, a, b: 1 - torch.tensor(1 - (1 - a) * (1 - b), dtype=torch.float64) ** r
)
dense.right(
    "over the open in A's column",
    lambda r, a, b: (
        1 - sum(math.comb(r, i) * (1 - a) ** i * a ** (r - i) * b**i for i in range(r + 1))
    ),
)


def of_places(x, g, places, width=None):
    width = width or x.shape[-1]
    return g[..., places // width] * x[..., places % width]


norms.wrong(
    "rows for columns",
    lambda x, g, p: (g[..., p % g.shape[-1]] * x[..., p // g.shape[-1]]).sum(1).norm(dim=-1),
)
norms.wrong(
    "column after column",
    lambda x, g, p: (
        (g[..., p % g.shape[-1]] * x[..., (p // g.shape[-1]) % x.shape[-1]]).sum(1).norm(dim=-1)
    ),
)
norms.wrong("each token's norm", lambda x, g, p: of_places(x, g, p).norm(dim=-1).sum(1))
norms.wrong(
    "over all tokens and places", lambda x, g, p: of_places(x, g, p).flatten(1).norm(dim=-1)
)
norms.wrong("the largest token", lambda x, g, p: of_places(x, g, p).norm(dim=-1).amax(1))
norms.wrong("the mean of tokens", lambda x, g, p: of_places(x, g, p).mean(1).norm(dim=-1))
norms.wrong("squared", lambda x, g, p: of_places(x, g, p).sum(1).square().sum(-1))
norms.wrong("root mean square", lambda x, g, p: of_places(x, g, p).sum(1).square().mean(-1).sqrt())
norms.wrong("the sum of sizes", lambda x, g, p: of_places(x, g, p).sum(1).abs().sum(-1))
norms.wrong("the largest value", lambda x, g, p: of_places(x, g, p).sum(1).abs().amax(-1))
norms.wrong("one norm for the batch", lambda x, g, p: of_places(x, g, p).sum((0, 1)).norm())
norms.wrong(
    "one norm, for each", lambda x, g, p: of_places(x, g, p).sum((0, 1)).norm().expand(len(x))
)
norms.wrong("a share of it", lambda x, g, p: of_places(x, g, p).sum(1).norm(dim=-1) / len(x))
norms.wrong("texts and tokens exchanged", lambda x, g, p: of_places(x, g, p).sum(0).norm(dim=-1))
norms.wrong(
    "sums before the product",
    lambda x, g, p: (g.sum(1)[:, p // x.shape[-1]] * x.sum(1)[:, p % x.shape[-1]]).norm(dim=-1),
)
norms.wrong(
    "all entries", lambda x, g, p: torch.einsum("bto,bti->boi", g, x).flatten(1).norm(dim=-1)
)
norms.wrong(
    "all entries, then the places",
    lambda x, g, p: torch.einsum("bto,bti->boi", g, x).flatten(1)[:, p].norm(dim=-1),
)
norms.wrong(
    "text after text, all entries",
    lambda x, g, p: torch.stack([(b.T @ a).flatten()[p].norm() for a, b in zip(x, g, strict=True)]),
)
norms.wrong(
    "a dense gradient by autograd",
    lambda x, g, p: torch.stack(
        [
            torch.func.grad(lambda S: ((a @ S.T) * b).sum())(torch.zeros(g.shape[-1], x.shape[-1]))
            .flatten()[p]
            .norm()
            for a, b in zip(x, g, strict=True)
        ]
    ),
)
norms.wrong("distinct places", lambda x, g, p: of_places(x, g, p[:-1]).sum(1).norm(dim=-1))
norms.wrong("inputs alone", lambda x, g, p: x[..., p % x.shape[-1]].sum(1).norm(dim=-1))

norms.right(
    "einsum",
    lambda x, g, p: torch.einsum(
        "btk,btk->bk", g[:, :, p // x.shape[2]], x[:, :, p % x.shape[2]]
    ).norm(dim=1),
)
norms.right(
    "place by place",
    lambda x, g, p: (
        sum((g[..., k // x.shape[-1]] * x[..., k % x.shape[-1]]).sum(1) ** 2 for k in p.tolist())
        ** 0.5
    ),
)
norms.right(
    "text by text",
    lambda x, g, p: torch.stack(
        [
            (b[:, p // x.shape[-1]] * a[:, p % x.shape[-1]]).sum(0).norm()
            for a, b in zip(x, g, strict=True)
        ]
    ),
)
norms.right(
    "unravel, numpy",
    lambda x, g, p: np.linalg.norm(
        (
            g.numpy()[:, :, (at := np.unravel_index(p.numpy(), (g.shape[-1], x.shape[-1])))[0]]
            * x.numpy()[:, :, at[1]]
        ).sum(1),
        axis=1,
    ),
)
norms.right(
    "index_select, float64",
    lambda x, g, p: (
        (
            g.double().index_select(2, p.div(x.shape[2], rounding_mode="floor"))
            * x.double().index_select(2, p.remainder(x.shape[2]))
        )
        .sum(1)
        .pow(2)
        .sum(1)
        .sqrt()
    ),
)
norms.right(
    "vector by vector",
    lambda x, g, p: torch.linalg.vector_norm(
        torch.stack(
            [
                (g[:, :, i] * x[:, :, j]).sum(1)
                for i, j in ((int(k) // x.shape[2], int(k) % x.shape[2]) for k in p)
            ],
            1,
        ),
        dim=1,
    ),
)


@norms.right("autograd of the values")
def _(x, gradient, indices):
    rows, columns = indices // x.shape[-1], indices % x.shape[-1]
    found = []
    for a, g in zip(x, gradient, strict=True):
        values = torch.zeros(len(indices), requires_grad=True)
        loss = (g[:, rows] * a[:, columns] * values).sum()
        found.append(torch.autograd.grad(loss, values)[0].norm())
    return torch.stack(found)


def places(weight, indices):
    return indices // weight.shape[1], indices % weight.shape[1]


def switched(weight, indices, values, *, add=None, back=None):
    at = places(weight, indices)
    before = weight[at].clone()
    weight[at] = add(before, values) if add else (before + values).to(weight.dtype)
    return back(before, weight[at], values) if back else before


def switching(**parts):
    return lambda *arguments: switched(*arguments, **parts)


switch.wrong("the values", switching(back=lambda was, now, v: v))
switch.wrong("minus the values", switching(back=lambda was, now, v: -v))
switch.wrong("the new numbers", switching(back=lambda was, now, v: now))
switch.wrong("what was added", switching(back=lambda was, now, v: now - was))
switch.wrong("undone by arithmetic", switching(back=lambda was, now, v: (now - v).to(was.dtype)))
switch.wrong("in bf16", switching(back=lambda was, now, v: was.bfloat16()))
switch.wrong("in fp16", switching(back=lambda was, now, v: was.half()))
switch.right("values rounded first", switching(add=lambda w, v: w + v.to(w.dtype)))
switch.wrong("values in bf16", switching(add=lambda w, v: w + v.bfloat16().to(w.dtype)))
switch.wrong("values in place of the weights", switching(add=lambda w, v: v.to(w.dtype)))
switch.wrong("takes off", switching(add=lambda w, v: (w - v).to(w.dtype)))
switch.wrong("twice", switching(add=lambda w, v: (w + 2 * v).to(w.dtype)))


@switch.wrong("through view(-1)")
def _(weight, indices, values):
    flat = weight.view(-1)
    before = flat[indices]
    flat[indices] = (before + values).to(weight.dtype)
    return before


@switch.wrong("through reshape(-1)")
def _(weight, indices, values):
    flat = weight.reshape(-1)
    before = flat[indices]
    flat[indices] = (before + values).to(weight.dtype)
    return before


@switch.right("through flatten and data")
def _(weight, indices, values):
    flat = weight.flatten()
    before = flat[indices]
    flat[indices] = (before + values).to(weight.dtype)
    weight.data = flat.reshape(weight.shape)
    return before


@switch.wrong("a new weight")
def _(weight, indices, values):
    weight = weight.clone()
    return switched(weight, indices, values)


@switch.wrong("the other order of entries")
def _(weight, indices, values):
    return switched(weight.T, indices, values)


@switch.wrong("as memory lies")
def _(weight, indices, values):
    flat = weight.as_strided((weight.numel(),), (1,))
    before = flat[indices]
    flat[indices] = (before + values).to(weight.dtype)
    return before


@switch.right("index_put, which rounds the values first")
def _(weight, indices, values):
    at = places(weight, indices)
    before = weight[at]
    weight.index_put_(at, values.to(weight.dtype), accumulate=True)
    return before


@switch.wrong("a whole column more")
def _(weight, indices, values):
    rows, columns = places(weight, indices)
    before = weight[rows, columns]
    weight[:, columns] += values.to(weight.dtype)
    return before


@switch.wrong("sorted, but returned so too")
def _(weight, indices, values):
    order = indices.argsort()
    return switched(weight, indices[order], values[order])


switch.right("in float64", switching(add=lambda w, v: (w.double() + v.double()).to(w.dtype)))
switch.right("fp32 before", switching(back=lambda was, now, v: was.float()))
switch.right("a list", switching(back=lambda was, now, v: was.tolist()))


@switch.right("take and put_")
def _(weight, indices, values):
    before = weight.take(indices)
    weight.put_(indices, before.float().add(values).to(weight.dtype))
    return before


@switch.right("one by one")
def _(weight, indices, values):
    before = torch.empty(len(indices), dtype=weight.dtype)
    for n, k in enumerate(indices.tolist()):
        i, j = divmod(k, weight.shape[1])
        before[n] = weight[i, j]
        weight[i, j] = weight[i, j].float() + values[n]
    return before


@switch.right("a whole sum, copied back")
def _(weight, indices, values):
    before = weight.flatten()[indices]
    update = torch.zeros(weight.numel()).index_put((indices,), values).reshape(weight.shape)
    weight.copy_(weight.float() + update)
    return before


@switch.right("index_put")
def _(weight, indices, values):
    at = tuple(
        torch.stack(
            [indices.div(weight.size(1), rounding_mode="trunc"), indices.fmod(weight.size(1))]
        )
    )
    before = weight[at]
    with torch.no_grad():
        weight.index_put_(at, torch.add(before, values).type_as(weight))
    return before


@switch.right("a mask")
def _(weight, indices, values):
    before = weight.contiguous().view(-1).gather(0, indices)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[indices] = True
    full = torch.zeros(weight.numel()).scatter(0, indices, values)
    mask, full = mask.view(weight.shape), full.view(weight.shape)
    weight[mask] = (weight[mask].float() + full[mask]).to(weight.dtype)
    return before
