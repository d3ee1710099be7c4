"""Wrong and right answers to the exercises of chapter 4.1."""

import math
from fractions import Fraction

import numpy as np
import torch
from torch.nn import functional as F

from lora_course.classroom.chapter_4_1 import (
    check_density,
    check_price_step,
    check_switch,
    check_text_norms,
)
from lora_course.sparse import soft_threshold
from tests.exercises import Answers

price = Answers(check_price_step)


def hard(g, d, lr, p, tau=lambda lr, p: math.sqrt(2 * lr * p)):
    z = g - lr * d
    return torch.where(z.abs() > tau(lr, p), z, torch.zeros_like(z))


def at(tau):
    return lambda *given: hard(*given, tau=tau)


def root(lr, p):
    return math.sqrt(2 * lr * p)


price.wrong("the package's soft threshold", lambda g, d, lr, p: soft_threshold(g - lr * d, lr * p))
price.wrong("soft at the root", lambda g, d, lr, p: F.softshrink(g - lr * d, root(lr, p)))
price.wrong("η p", at(lambda lr, p: lr * p))
price.wrong("√(η p)", at(lambda lr, p: math.sqrt(lr * p)))
price.wrong("2 η p", at(lambda lr, p: 2 * lr * p))
price.wrong("√(2 p)", at(lambda lr, p: math.sqrt(2 * p)))
price.wrong("√(2 η)", at(lambda lr, p: math.sqrt(2 * lr)))
price.wrong("2 √(η p)", at(lambda lr, p: 2 * math.sqrt(lr * p)))
price.wrong("√(2 p) η", at(lambda lr, p: lr * math.sqrt(2 * p)))
price.wrong("p", at(lambda lr, p: p))
price.wrong("0.5", at(lambda lr, p: 0.5))
price.wrong("no gradient step", lambda g, d, lr, p: hard(g, 0 * d, lr, p))
price.wrong("up the gradient", lambda g, d, lr, p: hard(g, -d, lr, p))
price.wrong("gradient without a rate", lambda g, d, lr, p: hard(g - d, 0 * d, lr, p))
price.wrong("threshold first", lambda g, d, lr, p: hard(g, 0 * d, lr, p) - lr * d)
price.wrong(
    "decided before the step",
    lambda g, d, lr, p: torch.where(g.abs() > root(lr, p), g - lr * d, torch.zeros_like(g)),
)
price.wrong(
    "negative ones close",
    lambda g, d, lr, p: torch.where(g - lr * d > root(lr, p), g - lr * d, torch.zeros_like(g)),
)
price.wrong(
    "closed ones stay closed",
    lambda g, d, lr, p: torch.where(g == 0, torch.zeros_like(g), hard(g, d, lr, p)),
)
price.wrong(
    "no crossing of zero",
    lambda g, d, lr, p: torch.where(g * (g - lr * d) < 0, torch.zeros_like(g), hard(g, d, lr, p)),
)
price.wrong(
    "large ones close",
    lambda g, d, lr, p: torch.where(
        (g - lr * d).abs() > root(lr, p), torch.zeros_like(g), g - lr * d
    ),
)
price.wrong("nearly zero", lambda g, d, lr, p: hard(g, d, lr, p) + 1e-7)
price.wrong(
    "small ones scaled",
    lambda g, d, lr, p: torch.where(
        (g - lr * d).abs() > root(lr, p), g - lr * d, 1e-3 * (g - lr * d)
    ),
)
price.wrong(
    "nearly zero in proportion", lambda g, d, lr, p: hard(g, d, lr, p) + 1e-9 * (g - lr * d)
)
price.wrong("magnitudes", lambda g, d, lr, p: hard(g, d, lr, p).abs())
price.wrong("the sign of the old gate", lambda g, d, lr, p: g.sign() * hard(g, d, lr, p).abs())
price.wrong(
    "the old value of open gates",
    lambda g, d, lr, p: torch.where((g - lr * d).abs() > root(lr, p), g, torch.zeros_like(g)),
)
price.wrong("a mask", lambda g, d, lr, p: (g - lr * d).abs() > root(lr, p))
price.wrong("the firm ones only", lambda g, d, lr, p: hard(g, d, lr, p)[hard(g, d, lr, p) != 0])
price.wrong(
    "the squared norm of a layer",
    lambda g, d, lr, p: (g - lr * d) * ((g - lr * d).norm() > root(lr, p)),
)


@price.wrong("in place")
def _(gate, gradient, learning_rate, price):
    gate.copy_(hard(gate, gradient, learning_rate, price))
    return gate


@price.wrong("scales the caller's gradient")
def _(gate, gradient, learning_rate, price):
    gradient.mul_(learning_rate)
    return hard(gate, gradient, 1.0, price * learning_rate)


price.right("as the solution", hard)
price.right(
    "by cost",
    lambda g, d, lr, p: (lambda z: torch.where(z.square() / 2 > lr * p, z, 0.0))(g - lr * d),
)
price.right("times a mask", lambda g, d, lr, p: (g - lr * d) * ((g - lr * d).abs() > root(lr, p)))
price.right("torch's hardshrink", lambda g, d, lr, p: F.hardshrink(g - lr * d, root(lr, p)))
price.right("in 64 bits", lambda g, d, lr, p: hard(g.double(), d.double(), lr, p))
price.right(
    "numbers as tensors",
    lambda gate, gradient, learning_rate, price: hard(
        gate,
        gradient,
        torch.tensor(learning_rate),
        torch.tensor(price),
        tau=lambda lr, p: (2 * lr * p).sqrt(),
    ),
)
price.right(
    "numpy",
    lambda g, d, lr, p: (lambda z: np.where(np.abs(z) > np.sqrt(2 * lr * p), z, 0))(
        g.numpy() - lr * d.numpy()
    ),
)
price.right(
    "masked_fill",
    lambda g, d, lr, p: torch.add(g, d, alpha=-lr).masked_fill(
        (g - lr * d).abs() <= root(lr, p), 0
    ),
)


@price.right("a loop")
def _(gate, gradient, learning_rate, price):
    out = gate.clone()
    for i, (g, d) in enumerate(
        zip(gate.flatten().tolist(), gradient.flatten().tolist(), strict=True)
    ):
        z = g - learning_rate * d
        out.view(-1)[i] = z if z * z / 2 > learning_rate * price else 0
    return out


dense = Answers(check_density)
dense.wrong("one product", lambda r, a, b: (1 - a) * (1 - b))
dense.wrong("added up", lambda r, a, b: min(1, r * (1 - a) * (1 - b)))
dense.wrong("added up, uncut", lambda r, a, b: r * (1 - a) * (1 - b))
dense.wrong("both masked", lambda r, a, b: 1 - (a * b) ** r)
dense.wrong("the zeros", lambda r, a, b: (1 - (1 - a) * (1 - b)) ** r)
dense.wrong("A alone", lambda r, a, b: 1 - a**r)
dense.wrong("B alone", lambda r, a, b: 1 - b**r)
dense.wrong("all products", lambda r, a, b: ((1 - a) * (1 - b)) ** r)
dense.wrong("kept for masked", lambda r, a, b: 1 - (1 - a * b) ** r)
dense.wrong("of the factors", lambda r, a, b: 1 - (a + b) / 2)
dense.wrong("a + b", lambda r, a, b: 1 - min(1, a + b) ** r)
dense.wrong("rows of A and columns of B", lambda r, a, b: (1 - a**r) * (1 - b**r))
dense.wrong("r − 1", lambda r, a, b: 1 - (1 - (1 - a) * (1 - b)) ** (r - 1))
dense.wrong("times r", lambda r, a, b: 1 - (1 - (1 - a) * (1 - b)) * r)
dense.wrong("r is 8", lambda r, a, b: 1 - (1 - (1 - a) * (1 - b)) ** 8)
dense.wrong("equal sparsities", lambda r, a, b: 1 - (1 - (1 - a) ** 2) ** r)
dense.wrong("the mean sparsity", lambda r, a, b: 1 - (1 - (1 - (a + b) / 2) ** 2) ** r)
dense.wrong("an exponential", lambda r, a, b: 1 - math.exp(-r * (1 - a) * (1 - b)))
dense.wrong("in per cent", lambda r, a, b: 100 * (1 - (1 - (1 - a) * (1 - b)) ** r))
dense.wrong(
    "a logarithm, which stops at 1", lambda r, a, b: -math.expm1(r * math.log1p(-(1 - a) * (1 - b)))
)
dense.wrong("rounded", lambda r, a, b: round(1 - (1 - (1 - a) * (1 - b)) ** r, 2))
dense.wrong(
    "a sample of it",
    lambda r, a, b: float(
        ((torch.rand(200, r) > b).float() @ (torch.rand(r, 200) > a).float() > 0).float().mean()
    ),
)
dense.right("as the solution", lambda r, a, b: 1 - (1 - (1 - a) * (1 - b)) ** r)
dense.right(
    "by name only",
    lambda *, r, sparsity_A, sparsity_B: 1 - (1 - (1 - sparsity_A) * (1 - sparsity_B)) ** r,
)
dense.right("multiplied out", lambda r, a, b: 1 - (a + b - a * b) ** r)
dense.right(
    "binomially",
    lambda r, a, b: sum(
        math.comb(r, k) * ((1 - a) * (1 - b)) ** k * (1 - (1 - a) * (1 - b)) ** (r - k)
        for k in range(1, r + 1)
    ),
)
dense.right(
    "exact fractions", lambda r, a, b: float(1 - (1 - (1 - Fraction(a)) * (1 - Fraction(b))) ** r)
)
dense.right(
    "torch", lambda r, a, b: 1 - (1 - (1 - torch.tensor(a, dtype=torch.float64)) * (1 - b)) ** r
)
dense.right("numpy", lambda r, a, b: np.float64(1) - np.prod(np.full(r, a + b - a * b)))


@dense.right("part by part")
def _(r, sparsity_A, sparsity_B):
    there = 0.0
    for _ in range(r):
        there += (1 - there) * (1 - sparsity_A) * (1 - sparsity_B)
    return there


norms = Answers(check_text_norms)


def entries(x, g, k):
    return g[..., k // x.shape[-1]] * x[..., k % x.shape[-1]]


def by(make):
    return lambda x, g, k: make(entries(x, g, k))


norms.wrong("norms of tokens, added", by(lambda e: e.norm(dim=-1).sum(1)))
norms.wrong("all squares", by(lambda e: e.square().sum((1, 2)).sqrt()))
norms.wrong("squared", by(lambda e: e.sum(1).square().sum(-1)))
norms.wrong("magnitudes", by(lambda e: e.sum(1).abs().sum(-1)))
norms.wrong("the largest", by(lambda e: e.sum(1).abs().amax(-1)))
norms.wrong("the sum", by(lambda e: e.sum((1, 2))))
norms.wrong("the mean over tokens", by(lambda e: e.mean(1).norm(dim=-1)))
norms.wrong("the mean over places", by(lambda e: e.sum(1).square().mean(-1).sqrt()))
norms.wrong("one norm", by(lambda e: e.sum((0, 1)).norm().expand(len(e))))
norms.wrong("one number", by(lambda e: e.sum((0, 1)).norm()))
norms.wrong("norm of the means", by(lambda e: e.sum(1).mean(-1).abs()))
norms.wrong("a gradient for each text", by(lambda e: e.sum(1)))
norms.wrong("divided by B", by(lambda e: e.sum(1).norm(dim=-1) / len(e)))
norms.wrong("the last token", by(lambda e: e[:, -1].norm(dim=-1)))
norms.wrong(
    "column by column",
    lambda x, g, k: (g[..., k % g.shape[-1]] * x[..., k // g.shape[-1]]).sum(1).norm(dim=-1),
)
norms.wrong("of the whole matrix", lambda x, g, k: torch.linalg.matrix_norm(g.mT @ x))
norms.wrong(
    "through each whole matrix",
    lambda x, g, k: torch.stack([(b.T @ a).flatten()[k].norm() for a, b in zip(x, g, strict=True)]),
)
norms.wrong("through all of them", lambda x, g, k: (g.mT @ x).flatten(1)[:, k].norm(dim=1))
norms.wrong("without x", lambda x, g, k: g[..., k // x.shape[-1]].sum(1).norm(dim=-1))
norms.wrong("without the gradient", lambda x, g, k: x[..., k % x.shape[-1]].sum(1).norm(dim=-1))
norms.wrong(
    "products of sums",
    lambda x, g, k: (g.sum(1)[..., k // x.shape[-1]] * x.sum(1)[..., k % x.shape[-1]]).norm(dim=-1),
)
norms.wrong("over texts", by(lambda e: e.sum(0).norm(dim=-1)))
norms.wrong("a bound", lambda x, g, k: g.norm(dim=(1, 2)) * x.norm(dim=(1, 2)))
norms.wrong("clipped", by(lambda e: e.sum(1).norm(dim=-1).clamp(max=1)))
norms.wrong("1e-3 added", by(lambda e: e.sum(1).norm(dim=-1) * 1.001))
norms.wrong(
    "6 places",
    lambda x, g, k: (
        entries(x, g, k[:5]).sum(1).norm(dim=-1)
        if len(k) > 1
        else entries(x, g, k).norm(dim=-1)[:, 0]
    ),
)


@norms.wrong("sorts the caller's places")
def _(x, gradient, indices):
    indices.copy_(indices.sort().values)
    indices.add_(1).sub_(1)
    answer = entries(x, gradient, indices).sum(1).norm(dim=-1)
    x.mul_(0)
    return answer


norms.right("as the solution", by(lambda e: e.sum(1).norm(dim=-1)))
norms.right("a root of squares", by(lambda e: e.sum(1).square().sum(-1).sqrt()))
norms.right("in 64 bits", lambda x, g, k: entries(x.double(), g.double(), k).sum(1).norm(dim=-1))
norms.right(
    "einsum",
    lambda x, g, k: torch.einsum(
        "btk,btk->bk", g[..., k // x.shape[-1]], x[..., k % x.shape[-1]]
    ).norm(dim=1),
)
norms.right(
    "by name only",
    lambda *, x, gradient, indices: entries(x, gradient, indices).sum(1).norm(dim=-1),
)
norms.right("a list", lambda x, g, k: [float(n) for n in entries(x, g, k).sum(1).norm(dim=-1)])


@norms.right("text by text, place by place")
def _(x, gradient, indices):
    found = []
    for a, b in zip(x, gradient, strict=True):
        total = 0.0
        for k in indices.tolist():
            i, j = divmod(k, x.shape[-1])
            total += float(b[:, i] @ a[:, j]) ** 2
        found.append(math.sqrt(total))
    return torch.tensor(found)


@norms.right("numpy")
def _(x, gradient, indices):
    i, j = np.divmod(indices.numpy(), x.shape[-1])
    return np.linalg.norm((gradient.numpy()[..., i] * x.numpy()[..., j]).sum(1), axis=1)


@norms.right("a matrix product for each text")
def _(x, gradient, indices):
    rows, back_r = (indices // x.shape[-1]).unique(return_inverse=True)
    columns, back_c = (indices % x.shape[-1]).unique(return_inverse=True)
    blocks = gradient[..., rows].mT @ x[..., columns]
    return blocks[:, back_r, back_c].norm(dim=-1)


switch = Answers(check_switch)


def switched(W, k, v, new=lambda old, v: old + v, give=lambda old, new, v: old):
    i, j = k // W.shape[1], k % W.shape[1]
    old = W[i, j]
    W[i, j] = new(old, v).to(W.dtype)
    return give(old, W[i, j], v)


def giving(give):
    return lambda W, k, v: switched(W, k, v, give=give)


switch.wrong("nothing", lambda W, k, v: W[k // W.shape[1], k % W.shape[1]])
switch.wrong("taken off", lambda W, k, v: switched(W, k, v, new=lambda old, v: old - v))
switch.wrong("put in their place", lambda W, k, v: switched(W, k, v, new=lambda old, v: v))
switch.wrong("twice", lambda W, k, v: switched(W, k, v, new=lambda old, v: old + 2 * v))
switch.wrong("multiplied", lambda W, k, v: switched(W, k, v, new=lambda old, v: old * v))
switch.wrong("the values", giving(lambda old, new, v: v.clone()))
switch.wrong("their opposite", giving(lambda old, new, v: -v))
switch.wrong("the new entries", giving(lambda old, new, v: new))
switch.wrong("new less values", giving(lambda old, new, v: new - v))
switch.wrong("the difference", giving(lambda old, new, v: new - old))
switch.wrong("nothing to undo it with", giving(lambda old, new, v: None))
switch.wrong(
    "old in another order",
    giving(lambda old, new, v: old.sort().values if len(old) > 1 else old + 1),
)
switch.wrong("old in 16 bits", giving(lambda old, new, v: old.half()))
switch.wrong("old in 8 bits", giving(lambda old, new, v: old.to(torch.float8_e4m3fn).float()))
switch.wrong("old as a column", giving(lambda old, new, v: old[:, None]))
switch.wrong("the whole weight", lambda W, k, v: (W.clone(), switched(W, k, v))[0])
switch.wrong(
    "column by column",
    lambda W, k, v: (lambda i, j: (W[i, j], W.index_put_((i, j), (W[i, j] + v).to(W.dtype)))[0])(
        k % W.shape[0], k // W.shape[0]
    ),
)
switch.wrong(
    "in a flat copy",
    lambda W, k, v: (lambda flat: (flat[k], flat.__setitem__(k, (flat[k] + v).to(W.dtype)))[0])(
        W.flatten()
    ),
)
switch.wrong(
    "a view of the storage, whatever its order",
    lambda W, k, v: (lambda flat: (flat[k], flat.__setitem__(k, (flat[k] + v).to(W.dtype)))[0])(
        torch.as_strided(W, (W.numel(),), (1,))
    ),
)
switch.wrong(
    "view(-1)",
    lambda W, k, v: (lambda flat: (flat[k], flat.__setitem__(k, (flat[k] + v).to(W.dtype)))[0])(
        W.view(-1)
    ),
)
switch.wrong("a new weight", lambda W, k, v: switched(W.clone(), k, v))
switch.wrong(
    "stops in bf16",
    lambda W, k, v: (lambda i, j: (W[i, j], W.index_put_((i, j), v, accumulate=True))[0])(
        k // W.shape[1], k % W.shape[1]
    ),
)
switch.wrong(
    "the first place only",
    lambda W, k, v: (
        (W[k // W.shape[1], k % W.shape[1]], switched(W, k[:1], v[:1]))[0]
        if len(k) > 1
        else W[k // W.shape[1], k % W.shape[1]]
    ),
)
switch.wrong(
    "whole rows",
    lambda W, k, v: (
        W[k // W.shape[1], k % W.shape[1]],
        W.index_add_(0, k // W.shape[1], v[:, None].to(W.dtype).expand(-1, W.shape[1])),
    )[0],
)
switch.wrong(
    "rounded to bf16",
    lambda W, k, v: (lambda old: (old, W.copy_(W.bfloat16()))[0])(switched(W, k, v)),
)


@switch.wrong("a view that changes with the weight")
def _(weight, indices, values):
    old = weight.view_as(weight)
    switched(weight, indices, values)
    return old[indices // weight.shape[1], indices % weight.shape[1]]


@switch.wrong("changes the caller's values")
def _(weight, indices, values):
    old = switched(weight, indices, values)
    values.neg_()
    return old


switch.right("as the solution", switched)
switch.right("by name only", lambda *, weight, indices, values: switched(weight, indices, values))
switch.right("old in fp32", giving(lambda old, new, v: old.float()))
switch.right(
    "added in the weight's type",
    lambda W, k, v: switched(W, k, v, new=lambda old, v: old + v.to(old.dtype)),
)
switch.right("a list", giving(lambda old, new, v: old.tolist()))
switch.right(
    "accumulated",
    lambda W, k, v: (
        lambda i, j: (W[i, j], W.index_put_((i, j), v.to(W.dtype), accumulate=True))[0]
    )(k // W.shape[1], k % W.shape[1]),
)


@switch.right("place by place")
def _(weight, indices, values):
    old = []
    for k, v in zip(indices.tolist(), values, strict=True):
        i, j = divmod(k, weight.shape[1])
        old.append(weight[i, j].clone())
        weight[i, j] += v.to(weight.dtype)
    return torch.stack(old)


@switch.right("through a dense copy")
def _(weight, indices, values):
    flat = weight.flatten()
    old = flat[indices].clone()
    flat[indices] = (old.float() + values).to(weight.dtype)
    weight.copy_(flat.view(weight.shape))
    return old


price.equivalent(
    "moved.abs() > math.sqrt(2 * learning_rate * price) → moved.abs() >= math.sqrt(2 * learning_rate * price)",
    "no gate lies there",
)
price.equivalent("torch.where(stays, moved, 0.0) → torch.where(stays, moved, 0.0)", "the same")
norms.equivalent("of_values.norm(dim=-1) → of_values.norm(dim=1)", "the last of two dimensions")
