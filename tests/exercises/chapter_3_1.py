"""Wrong and right answers to the exercises of chapter 3.1."""

import copy
import math

import numpy as np
import torch
from torch import nn

from lora_course.adaptive import GrowingLoRALinear, add_to_optimizer
from lora_course.classroom.chapter_3_1 import (
    check_grow_both,
    check_introduce,
    check_move_ranks,
    check_without_parts,
)
from tests.exercises import Answers

both = Answers(check_grow_both)


def new(k, n):
    return torch.randn(k, n)


def grown(
    W, A, B, a, k, *, new_A=new, new_B=new, alpha=lambda a, r, k: a * (r + k) / r, moved=None
):
    """The four, with parts that may be exchanged."""
    r, more_A, more_B = len(A), new_A(k, A.shape[1]), new_B(len(B), k)
    off = a / r * more_B @ more_A if moved is None else moved(a, r, more_B, more_A, B, A)
    return W - off, torch.cat([A, more_A]), torch.cat([B, more_B], 1), alpha(a, r, k)


def variant(**other):
    return lambda W, A, B, a, k: grown(W, A, B, a, k, **other)


def equal_rows(k, n):
    return torch.randn(1, n).expand(k, n)


both.wrong("B zero, as the chapter grows", variant(new_B=torch.zeros))
both.wrong("A zero", variant(new_A=torch.zeros))
both.wrong("both zero", variant(new_A=torch.zeros, new_B=torch.zeros))
both.wrong("the weight stays", lambda W, A, B, a, k: (W.clone(), *grown(W, A, B, a, k)[1:]))
both.wrong("added", variant(moved=lambda a, r, b, c, B, A: -a / r * b @ c))
both.wrong("no scale", variant(moved=lambda a, r, b, c, B, A: b @ c))
both.wrong("lora_alpha for the scale", variant(moved=lambda a, r, b, c, B, A: a * b @ c))
both.wrong(
    "scale of the new rank", variant(moved=lambda a, r, b, c, B, A: a / (r + len(c)) * b @ c)
)
both.wrong("alpha stays", variant(alpha=lambda a, r, k: a))
both.wrong("the scale", variant(alpha=lambda a, r, k: a / r))
both.wrong("alpha + k", variant(alpha=lambda a, r, k: a + k))
both.wrong("rsLoRA's", variant(alpha=lambda a, r, k: a * math.sqrt((r + k) / r)))
both.wrong("all of it taken off", variant(moved=lambda a, r, b, c, B, A: a / r * (B @ A + b @ c)))
both.wrong("ones", lambda W, A, B, a, k: grown(W, A, B, a, k, new_A=torch.ones, new_B=torch.ones) if k > 1
           else grown(W, A, B, a, k, new_A=torch.zeros))  # fmt: skip
both.wrong(
    "the old rows again",
    lambda W, A, B, a, k: grown(W, A, B, a, k, new_A=lambda k, n: A[:1].expand(k, n)),
)
both.wrong("equal columns of B", lambda W, A, B, a, k: grown(
    W, A, B, a, k, new_B=lambda n, k: torch.randn(n, 1).expand(n, k) if k > 1 else B[:, :1] * 2))  # fmt: skip
both.wrong(
    "one rank", lambda W, A, B, a, k: grown(W, A, B, a, 1) if k > 1 else grown(W, A, B, a, 2)
)
both.wrong("all drawn anew", lambda W, A, B, a, k: (
    W, torch.randn(len(A) + k, A.shape[1]), torch.randn(len(B), len(A) + k), a * (len(A) + k) / len(A)))  # fmt: skip
both.wrong(
    "transposed", lambda W, A, B, a, k: (lambda w, x, y, z: (w, x.T, y.T, z))(*grown(W, A, B, a, k))
)
both.wrong(
    "A and B exchanged",
    lambda W, A, B, a, k: (lambda w, x, y, z: (w, y, x, z))(*grown(W, A, B, a, k)),
)
both.wrong("three things", lambda W, A, B, a, k: grown(W, A, B, a, k)[1:])
both.wrong("new ones in front", lambda W, A, B, a, k: (lambda w, x, y, z: (w, x.roll(k, 0), y.roll(k, 1), z))(
    *grown(W, A, B, a, k)))  # fmt: skip
both.wrong("a NaN", variant(new_A=lambda k, n: torch.full((k, n), math.nan)))
both.wrong("nearly zero by chance", variant(new_B=lambda n, k: torch.zeros(n, k)))


@both.wrong("changes the weight in place")
def _(weight, A, B, lora_alpha, k):
    W, *rest = grown(weight, A, B, lora_alpha, k)
    weight.copy_(W)
    return weight, *rest


@both.wrong("the package's layer grows")
def _(weight, A, B, lora_alpha, k):
    layer = GrowingLoRALinear(nn.Linear(A.shape[1], len(B)), r=len(A), lora_alpha=lora_alpha)
    layer.A.data, layer.B.data = A.clone(), B.clone()
    layer.grow(k, 1)
    A, B, scaling = layer.factors()
    return weight, A, B, scaling * len(A)


@both.wrong("sets a seed")
def _(weight, A, B, lora_alpha, k):
    torch.manual_seed(0)
    return grown(weight, A, B, lora_alpha, k)


both.right("as the solution", grown)
both.right(
    "small ones",
    variant(
        new_A=lambda k, n: torch.randn(k, n) / math.sqrt(n),
        new_B=lambda n, k: torch.randn(n, k) / 3,
    ),
)
both.right("uniform", variant(new_A=torch.rand, new_B=lambda n, k: torch.rand(n, k) - 0.5))
both.right("a list", lambda weight, A, B, lora_alpha, k: list(grown(weight, A, B, lora_alpha, k)))
both.right("in 64 bits", lambda W, A, B, a, k: grown(W.double(), A.double(), B.double(), a, k, new_A=lambda k, n: torch.randn(k, n).double(),
           new_B=lambda k, n: torch.randn(k, n).double()))  # fmt: skip


@both.right("alpha as a tensor")
def _(weight, A, B, lora_alpha, k):
    *three, alpha = grown(weight, A, B, lora_alpha, k)
    return *three, torch.tensor(alpha)


@both.right("room made first, then filled")
def _(weight, A, B, lora_alpha, k):
    r = len(A)
    larger_A, larger_B = torch.randn(r + k, A.shape[1]), torch.randn(len(B), r + k)
    larger_A[:r], larger_B[:, :r] = A, B
    before, s = B @ A, lora_alpha / r
    return weight + s * (before - larger_B @ larger_A), larger_A, larger_B, s * (r + k)


@both.right("numpy")
def _(weight, A, B, lora_alpha, k):
    a, b = np.random.randn(k, A.shape[1]), np.random.randn(len(B), k)
    W = weight.numpy() - lora_alpha / len(A) * b @ a
    return (
        W,
        np.concatenate([A.numpy(), a]),
        np.concatenate([B.numpy(), b], 1),
        np.float64(lora_alpha * (len(A) + k) / len(A)),
    )


parts = Answers(check_without_parts)


def without(A, B, s, x, g, f=lambda each: -each.sum(0)):
    return f(s * ((x @ A.T) * (g @ B)).reshape(-1, len(A)))


def by(f):
    return lambda A, B, s, x, g: without(A, B, s, x, g, f)


def flat(t):
    return t.reshape(-1, t.shape[-1])


parts.wrong("turned", by(lambda e: e.sum(0)))
parts.wrong("no scale", lambda A, B, s, x, g: without(A, B, 1, x, g))
parts.wrong("scale squared", lambda A, B, s, x, g: without(A, B, s * s, x, g))
parts.wrong("the mean", by(lambda e: -e.mean(0)))
parts.wrong("the magnitude", by(lambda e: e.sum(0).abs()))
parts.wrong("minus the magnitude", by(lambda e: -e.sum(0).abs()))
parts.wrong("each one's magnitude", by(lambda e: e.abs().sum(0)))
parts.wrong("one number", by(lambda e: -e.sum()))
parts.wrong("each token", by(lambda e: -e))
parts.wrong(
    "the chapter's score",
    lambda A, B, s, x, g: without(A, B, s, x, g).abs().sum() / math.sqrt(A.shape[1] * len(B)),
)
parts.wrong(
    "divided by the size",
    lambda A, B, s, x, g: without(A, B, s, x, g) / math.sqrt(A.shape[1] * len(B)),
)
parts.wrong("divided by r", lambda A, B, s, x, g: without(A, B, s, x, g) / len(A))
parts.wrong(
    "products of sums", lambda A, B, s, x, g: -s * flat(x @ A.T).sum(0) * flat(g @ B).sum(0)
)
parts.wrong("A only", lambda A, B, s, x, g: -s * flat(x @ A.T).sum(0))
parts.wrong("B only", lambda A, B, s, x, g: -s * flat(g @ B).sum(0))
parts.wrong(
    "through G", lambda A, B, s, x, g: -s * torch.einsum("or,oi,ri->r", B, flat(g).T @ flat(x), A)
)
parts.wrong("through each part's matrix", lambda A, B, s, x, g: -s * torch.stack(
    [((flat(x) @ (b[:, None] * a).T) * flat(g)).sum() for a, b in zip(A, B.T, strict=True)]))  # fmt: skip
parts.wrong(
    "the first row of the batch",
    lambda A, B, s, x, g: without(A, B, s, *((x[0], g[0]) if x.ndim == 3 else (x, g))),
)
parts.wrong(
    "two dimensions only", lambda A, B, s, x, g: -s * torch.einsum("ni,ri,no,or->r", x, A, g, B)
)
parts.wrong(
    "summed over the first dimension", lambda A, B, s, x, g: -s * ((x @ A.T) * (g @ B)).sum(0)
)
parts.wrong("ranks in another order", lambda A, B, s, x, g: without(A, B.flip(1), s, x, g))
parts.wrong("half of it", lambda A, B, s, x, g: without(A, B, s, x, g) / 2)
parts.wrong("the second order with it", by(lambda e: -e.sum(0) + 0.5 * e.square().sum(0)))
parts.wrong("the other parts' sum", by(lambda e: -(e.sum() - e.sum(0))))
parts.wrong(
    "NaN for no tokens",
    lambda A, B, s, x, g: without(A, B, s, x, g) * (1 if x.numel() else math.nan),
)


@parts.wrong("scales the caller's A")
def _(A, B, scaling, x, gradient):
    A.mul_(scaling)
    return without(A, B, 1, x, gradient)


parts.right("as the solution", without)
parts.right("a loop over parts", lambda A, B, s, x, g: torch.stack(
    [-s * ((x @ a) * (g @ b)).sum() for a, b in zip(A, B.T, strict=True)]))  # fmt: skip
parts.right(
    "numpy", lambda A, B, s, x, g: -s * (flat(x @ A.T).numpy() * flat(g @ B).numpy()).sum(0)
)
parts.right("a list of numbers", lambda A, B, s, x, g: without(A, B, s, x, g).tolist())
parts.right(
    "in 64 bits", lambda A, B, s, x, g: without(A.double(), B.double(), s, x.double(), g.double())
)
parts.right("einsum", lambda A, B, scaling, x, gradient: -scaling * torch.einsum("...r,...r->r", x @ A.T, gradient @ B)
            if x.ndim > 1 else -scaling * (x @ A.T) * (gradient @ B))  # fmt: skip
parts.right(
    "the diagonal of a product",
    lambda A, B, s, x, g: -s * (flat(x @ A.T).T @ flat(g @ B)).diagonal(),
)


@parts.right("a gradient with respect to a gate")
def _(A, B, scaling, x, gradient):
    gate = torch.ones(len(A), requires_grad=True)
    loss = (scaling * (x @ A.T * gate) @ B.T * gradient).sum()
    return -torch.autograd.grad(loss, gate)[0]


moves = Answers(check_move_ranks)


def pairs(scores, count, reverse=True):
    order = sorted(scores, key=scores.get, reverse=reverse)
    return list(zip(order[:count], order[::-1][:count], strict=True))


def moved(scores, ranks, count, step, low, high, *, pair=pairs, amount=None):
    found = {}
    for taker, giver in pair(scores, count):
        room, spare = high - ranks[taker], ranks[giver] - low
        n = min(step, room, spare) if amount is None else amount(step, room, spare)
        if n:
            found[taker], found[giver] = n, -n
    return found


def unlike(**other):
    return lambda *given: moved(*given, **other)


moves.wrong("the other way", lambda *g: {n: -k for n, k in moved(*g).items()})
moves.wrong("lowest first", unlike(pair=lambda scores, count: pairs(scores, count, False)))
moves.wrong("min_r not kept", unlike(amount=lambda step, room, spare: min(step, room)))
moves.wrong("max_r not kept", unlike(amount=lambda step, room, spare: min(step, spare)))
moves.wrong("always step", unlike(amount=lambda step, room, spare: step))
moves.wrong(
    "step or nothing",
    unlike(amount=lambda step, room, spare: step if min(room, spare) >= step else 0),
)
moves.wrong(
    "down to min_r − 1", unlike(amount=lambda step, room, spare: min(step, room, spare + 1))
)
moves.wrong(
    "stays above min_r", unlike(amount=lambda step, room, spare: max(0, min(step, room, spare - 1)))
)
moves.wrong(
    "stays below max_r", unlike(amount=lambda step, room, spare: max(0, min(step, room - 1, spare)))
)
moves.wrong("no step", unlike(amount=lambda step, room, spare: min(room, spare)))
moves.wrong("one at a time", unlike(amount=lambda step, room, spare: min(1, room, spare)))
moves.wrong(
    "new ranks",
    lambda scores, ranks, *g: {n: ranks[n] + k for n, k in moved(scores, ranks, *g).items()},
)
moves.wrong("all layers listed", lambda scores, *g: dict.fromkeys(scores, 0) | moved(scores, *g))
moves.wrong(
    "pairs without a move listed",
    lambda s, r, count, *g: dict.fromkeys(sum(pairs(s, count), ()), 0) | moved(s, r, count, *g),
)
moves.wrong("gains only", lambda *g: {n: k for n, k in moved(*g).items() if k > 0})
moves.wrong("losses only", lambda *g: {n: k for n, k in moved(*g).items() if k < 0})
moves.wrong("one pair", lambda s, r, count, *g: moved(s, r, min(1, count), *g))
moves.wrong("all pairs", lambda s, r, count, *g: moved(s, r, len(s) // 2, *g))
moves.wrong("one pair fewer", lambda s, r, count, *g: moved(s, r, max(0, count - 1), *g))
moves.wrong("neighbours", unlike(pair=lambda scores, count: [(lambda o: (o[i], o[len(o) - count + i]))(
    sorted(scores, key=scores.get, reverse=True)) for i in range(count)]))  # fmt: skip
moves.wrong("among equals the last one is higher", unlike(
    pair=lambda scores, count: pairs(dict(reversed(scores.items())), count)))  # fmt: skip
moves.wrong(
    "among equals by name",
    unlike(pair=lambda scores, count: pairs(dict(sorted(scores.items(), reverse=True)), count)),
)
moves.wrong("givers sorted by themselves", unlike(pair=lambda scores, count: list(zip(
    sorted(scores, key=scores.get, reverse=True)[:count], sorted(scores, key=scores.get)[:count], strict=True))))  # fmt: skip
moves.wrong("sorted by rank", lambda s, r, *g: moved({n: float(k) for n, k in r.items()}, r, *g))
moves.wrong("score times rank", lambda s, r, *g: moved({n: s[n] * r[n] for n in s}, r, *g))
moves.wrong("floats", lambda *g: {n: float(k) for n, k in moved(*g).items()})
moves.wrong("a list of pairs", lambda *g: list(moved(*g).items()))
moves.wrong("limits 1 and 16", lambda s, r, count, step, low, high: moved(s, r, count, step, 1, 16))
moves.wrong("-0 is the whole list", lambda s, r, count, step, low, high: moved(
    s, r, count, step, low, high, pair=lambda scores, count: (lambda o: list(zip(o, o[-count:][::-1], strict=False)))(
        sorted(scores, key=scores.get, reverse=True)) if count == 0 else pairs(scores, count)))  # fmt: skip


@moves.wrong("what a pair can't move goes to the next")
def _(scores, ranks, count, step, min_r, max_r):
    found, left = {}, 0
    for taker, giver in pairs(scores, count):
        n = min(step + left, max_r - ranks[taker], ranks[giver] - min_r)
        left += step - n
        if n:
            found[taker], found[giver] = n, -n
    return found


@moves.wrong("changes the caller's ranks")
def _(scores, ranks, *rest):
    found = moved(scores, ranks, *rest)
    for name, n in found.items():
        ranks[name] += n
    return found


moves.right("as the solution", moved)
moves.right("numpy's whole numbers", lambda *g: {n: np.int64(k) for n, k in moved(*g).items()})
moves.right("in another order", lambda *g: dict(reversed(moved(*g).items())))
moves.right(
    "by name only",
    lambda *, scores, ranks, count, step, min_r, max_r: moved(
        scores, ranks, count, step, min_r, max_r
    ),
)
moves.right("torch's", lambda *g: {n: torch.tensor(k) for n, k in moved(*g).items()})


@moves.right("rank by rank")
def _(scores, ranks, count, step, min_r, max_r):
    now = dict(ranks)
    for taker, giver in pairs(scores, count):
        for _ in range(step):
            if now[taker] < max_r and now[giver] > min_r:
                now[taker] += 1
                now[giver] -= 1
    return {name: now[name] - ranks[name] for name in ranks if now[name] != ranks[name]}


@moves.right("with indices")
def _(scores, ranks, count, step, min_r, max_r):
    names, s = list(scores), np.array(list(scores.values()))
    order, found = np.argsort(-s, kind="stable"), {}
    for i in range(count):
        a, b = names[order[i]], names[order[len(names) - 1 - i]]
        n = max(0, min(step, max_r - ranks[a], ranks[b] - min_r))
        found |= {a: n, b: -n} if n else {}
    return found


told = Answers(check_introduce)


def tell(o, old, new):
    for g in o.param_groups:
        if any(p is old for p in g["params"]):
            g["params"] = [*g["params"], new]


def after(change):
    def answer(optimizer, old, new):
        tell(optimizer, old, new)
        change(optimizer, old, new)

    return answer


def settings(**new_ones):
    return after(lambda o, old, new: [g.update(new_ones) for g in o.param_groups])


def where(found):
    def answer(optimizer, old, new):
        for g in optimizer.param_groups:
            if found(g["params"], old):
                g["params"].append(new)

    return answer


told.wrong("nothing", lambda o, old, new: None)
told.wrong(
    "a group of its own", lambda o, old, new: o.add_param_group({"params": [new], "lr": 0.01})
)
told.wrong("the first group", lambda o, old, new: o.param_groups[0]["params"].append(new))
told.wrong("the last group", lambda o, old, new: o.param_groups[-1]["params"].append(new))
told.wrong(
    "every group", lambda o, old, new: [g["params"].append(new) for g in o.param_groups] and None
)
told.wrong("twice", after(tell))
told.wrong(
    "with the state of old",
    after(lambda o, old, new: o.state.update({new: copy.deepcopy(o.state[old])})),
)
told.wrong("state cleared", after(lambda o, old, new: o.state.clear()))
told.wrong("step of old reset", after(lambda o, old, new: o.state[old]["step"].zero_()))
told.wrong("moments of old reset", after(lambda o, old, new: o.state[old]["exp_avg"].zero_()))
told.wrong("gradients cleared", after(lambda o, old, new: o.zero_grad()))
told.wrong("old frozen", after(lambda o, old, new: old.requires_grad_(False)))
told.wrong(
    "old's values in new", after(lambda o, old, new: new.data.fill_(float(old.data.mean() + 1)))
)
told.wrong(
    "initial rate again",
    after(lambda o, old, new: [g.update(lr=g["initial_lr"]) for g in o.param_groups] and None),
)
told.wrong("new frozen", after(lambda o, old, new: new.requires_grad_(False)))
told.wrong("another default rate", after(lambda o, old, new: o.defaults.update(lr=0.5)))
told.wrong("betas", settings(betas=(0.5, 0.9)))
told.wrong("weight decay", settings(weight_decay=0.0))
told.wrong("by `in`", where(lambda params, old: old in params))
told.wrong("by value", where(lambda params, old: any(torch.equal(p, old) for p in params)))
told.wrong("the group's first tensor", where(lambda params, old: params[0] is old))
told.wrong("the group's last tensor", where(lambda params, old: params[-1] is old))
told.wrong("by shape", where(lambda params, old: any(p.shape == old.shape for p in params)))
told.wrong(
    "a new optimiser",
    lambda o, old, new: (torch.optim.AdamW([*o.param_groups[0]["params"], new]), None)[1],
)
told.wrong(
    "rates halved", after(lambda o, old, new: [g.update(lr=g["lr"] / 2) for g in o.param_groups])
)
told.wrong("a step at once", after(lambda o, old, new: o.step()))
told.wrong("state of new without its step", after(lambda o, old, new: o.state.update(
    {new: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(new), "exp_avg_sq": torch.zeros_like(new)}})))  # fmt: skip


@told.wrong("the place of old")
def _(o, old, new):
    for g in o.param_groups:
        g["params"] = [new if p is old else p for p in g["params"]]


@told.wrong("put first")
def _(o, old, new):
    for g in o.param_groups:
        if any(p is old for p in g["params"]):
            g["params"].insert(0, new)


@told.wrong("rebuilt, without its state")
def _(o, old, new):
    tell(o, old, new)
    o.__init__([{**g, "params": list(g["params"])} for g in o.param_groups])


@told.wrong("copies in the place of the old ones")
def _(o, old, new):
    tell(o, old, new)
    for g in o.param_groups:
        g["params"] = [p if p is new else nn.Parameter(p.detach().clone()) for p in g["params"]]


@told.wrong("the package's, behind old")
def _(o, old, new):
    class Layer:
        pairs, grown_at = [(old,), (new,)], [1]

    add_to_optimizer(Layer, o)


told.right("as the solution", tell)
told.right("append", lambda optimizer, old, new: next(
    g for g in optimizer.param_groups if any(p is old for p in g["params"]))["params"].append(new))  # fmt: skip
told.right("by id", where(lambda params, old: id(old) in {id(p) for p in params}))
told.right("a set", where(lambda params, old: old in set(params)))
told.right("with an empty state", after(lambda o, old, new: o.state.update({new: {}})))
told.right(
    "with zeros for a state",
    after(
        lambda o, old, new: o.state.update(
            {new: {key: torch.zeros_like(value) for key, value in o.state[old].items()}}
        )
    ),
)
told.right("returns the optimiser", lambda o, old, new: (tell(o, old, new), o)[1])


@told.right("a group of its own, and moved")
def _(optimizer, old, new):
    group = next(g for g in optimizer.param_groups if any(p is old for p in g["params"]))
    optimizer.add_param_group({"params": [new]})
    optimizer.param_groups.pop()
    group["params"].append(new)
