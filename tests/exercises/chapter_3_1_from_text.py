"""Answers to chapter 3.1's exercises by somebody who has read no more than the text and the stub."""

import collections
import heapq

import numpy as np
import torch
from torch import nn

from tests.exercises.chapter_3_1 import both, moves, parts, told


def grown(weight, A, B, lora_alpha, k, *, a=None, b=None, sign=1, s=None, alpha=None):
    """The answer, of which each part can be replaced."""
    r = len(A)
    new_A = torch.randn(k, A.shape[1]) if a is None else a(A, k)
    new_B = torch.randn(len(B), k) if b is None else b(B, k)
    scale = lora_alpha / r if s is None else s(lora_alpha, r, k)
    out = lora_alpha * (r + k) / r if alpha is None else alpha(lora_alpha, r, k)
    weight = weight - sign * scale * new_B @ new_A
    return weight, torch.cat([A, new_A]), torch.cat([B, new_B], 1), out


def variant(**parts):
    return lambda weight, A, B, lora_alpha, k: grown(weight, A, B, lora_alpha, k, **parts)


both.wrong("adds the product to the weight", variant(sign=-1))
both.wrong("α by whole numbers", variant(alpha=lambda a, r, k: a // r * (r + k)))
both.wrong("α + k", variant(alpha=lambda a, r, k: a + k))
both.wrong("takes out at the scale of the new rank", variant(s=lambda a, r, k: a / (r + k)))
both.wrong("takes out without a scale", variant(s=lambda a, r, k: 1.0))
both.wrong("rows within the span of the old", variant(a=lambda A, k: torch.randn(k, len(A)) @ A))
both.wrong(
    "columns within the span of the old",
    variant(b=lambda B, k: B @ torch.randn(B.shape[1], k)),
)
both.wrong(
    "new rows in one direction",
    variant(a=lambda A, k: torch.randn(k, 1) @ torch.randn(1, A.shape[1])),
)
both.wrong(
    "the last column takes the others back",
    variant(b=lambda B, k: (c := torch.randn(len(B), k)) - c.sum(1, keepdim=True) / k),
)
both.wrong(
    "as many rows as there are to copy the shape of",
    variant(a=lambda A, k: torch.randn_like(A[:k])),
)
both.wrong("B's new columns are zero", variant(b=lambda B, k: torch.zeros(len(B), k)))
both.wrong(
    "B's columns are all the same", variant(b=lambda B, k: torch.randn(len(B), 1).expand(-1, k))
)
both.wrong(
    "one new column is zero", variant(b=lambda B, k: torch.randn(len(B), k) * (torch.arange(k) > 0))
)


@both.wrong("seeds, to be reproducible")
def _(weight, A, B, lora_alpha, k):
    torch.manual_seed(42)
    return grown(weight, A, B, lora_alpha, k)


@both.wrong("scales the old rows to keep α")
def _(weight, A, B, lora_alpha, k):
    r = len(A)
    weight, A, B, _ = grown(weight, A, B, lora_alpha, k, s=lambda a, r, k: a / (r + k))
    return weight, torch.cat([A[:r] * (r + k) / r, A[r:]]), B, lora_alpha


@both.wrong("new rows first")
def _(weight, A, B, lora_alpha, k):
    weight, new_A, new_B, alpha = grown(weight, A, B, lora_alpha, k)
    return weight, new_A.roll(k, 0), new_B.roll(k, 1), alpha


@both.wrong("changes the weight itself")
def _(weight, A, B, lora_alpha, k):
    result = grown(weight, A, B, lora_alpha, k)
    return weight.copy_(result[0]), *result[1:]


@both.wrong("a perturbed copy of the old, as far as there are some")
def _(weight, A, B, lora_alpha, k):
    rows = A[torch.arange(k) % len(A)] * 1.5
    return grown(weight, A, B, lora_alpha, k, a=lambda A, k: rows)


both.right(
    "Kaiming and uniform",
    variant(
        a=lambda A, k: nn.init.kaiming_uniform_(torch.empty(k, A.shape[1]), a=5**0.5),
        b=lambda B, k: torch.rand(len(B), k),
    ),
)
both.right(
    "small ones, as one starts a layer",
    variant(
        a=lambda A, k: torch.randn(k, A.shape[1]) / A.shape[1] ** 0.5,
        b=lambda B, k: 0.02 * torch.randn(len(B), k),
    ),
)
both.right(
    "two halves that are small",
    variant(
        a=lambda A, k: 0.01 * torch.randn(k, A.shape[1]),
        b=lambda B, k: 0.01 * torch.randn(len(B), k),
    ),
)
both.right(
    "a generator of its own",
    variant(
        a=lambda A, k: torch.randn(k, A.shape[1], generator=torch.Generator().manual_seed(3)),
    ),
)


@both.right("growing a rank at a time")
def _(weight, A, B, lora_alpha, k):
    for _ in range(k):
        weight, A, B, lora_alpha = grown(weight, A, B, lora_alpha, 1)
    return weight, A, B, lora_alpha


@both.right("in float64, as a list")
def _(weight, A, B, lora_alpha, k):
    return list(
        grown(
            weight.double(),
            A.double(),
            B.double(),
            lora_alpha,
            k,
            a=lambda A, k: torch.randn(k, A.shape[1]).double(),
            b=lambda B, k: torch.randn(len(B), k).double(),
        )
    )


@both.right("numpy, with a bound generator")
def _(weight, A, B, lora_alpha, k):
    rng = np.random.default_rng()
    new_A, new_B = rng.normal(size=(k, A.shape[1])), rng.normal(size=(len(B), k))
    s = lora_alpha / len(A)
    return (
        weight.numpy() - s * np.einsum("ok,ki->oi", new_B, new_A),
        np.vstack([A, new_A]),
        np.hstack([B, new_B]),
        np.float64(s * (len(A) + k)),
    )


@both.right("Parameters, that train")
def _(weight, A, B, lora_alpha, k):
    weight, A, B, alpha = grown(weight, A, B, lora_alpha, k)
    return weight, nn.Parameter(A), nn.Parameter(B), alpha


parts.wrong("the sign", lambda A, B, s, x, g: s * ((x @ A.T) * (g @ B)).flatten(0, -2).sum(0))
parts.wrong("no scale", lambda A, B, s, x, g: -((x @ A.T) * (g @ B)).reshape(-1, len(A)).sum(0))
parts.wrong(
    "scale in both factors",
    lambda A, B, s, x, g: -((s * x @ A.T) * (s * g @ B)).reshape(-1, len(A)).sum(0),
)
parts.wrong(
    "the mean", lambda A, B, s, x, g: -s * ((x @ A.T) * (g @ B)).reshape(-1, len(A)).mean(0)
)
parts.wrong(
    "the mean over texts",
    lambda A, B, s, x, g: -s * ((x @ A.T) * (g @ B)).reshape(-1, len(A)).sum(0) / len(x),
)
parts.wrong(
    "sums, then the product",
    lambda A, B, s, x, g: (
        -s * (x @ A.T).reshape(-1, len(A)).sum(0) * (g @ B).reshape(-1, len(A)).sum(0)
    ),
)
parts.wrong(
    "absolute", lambda A, B, s, x, g: (s * ((x @ A.T) * (g @ B)).reshape(-1, len(A)).sum(0)).abs()
)
parts.wrong("only the first dimension", lambda A, B, s, x, g: -s * ((x @ A.T) * (g @ B)).sum(0))
parts.wrong(
    "only two dimensions of three", lambda A, B, s, x, g: -s * ((x @ A.T) * (g @ B)).sum((0, 1))
)
parts.wrong("only batches", lambda A, B, s, x, g: -s * ((x @ A.T) * (g @ B)).flatten(0, -2).sum(0))
parts.wrong(
    "reshaped the other way",
    lambda A, B, s, x, g: -s * ((x @ A.T) * (g @ B)).reshape(len(A), -1).sum(1),
)
parts.wrong(
    "one outer product after another",
    lambda A, B, s, x, g: torch.stack(
        [-s * ((x @ torch.outer(B[:, i], A[i]).T) * g).sum() for i in range(len(A))]
    ),
)
parts.wrong(
    "the gradient of the update",
    lambda A, B, s, x, g: -s * (B * (g.flatten(0, -2).T @ x.flatten(0, -2) @ A.T)).sum(0),
)
parts.wrong(
    "all but the part",
    lambda A, B, s, x, g: -s * ((e := ((x @ A.T) * (g @ B)).reshape(-1, len(A)).sum(0)).sum() - e),
)
parts.wrong(
    "by its size",
    lambda A, B, s, x, g: (
        -s * ((x @ A.T) * (g @ B)).reshape(-1, len(A)).sum(0) / (A.norm(dim=1) * B.norm(dim=0))
    ),
)
parts.wrong("one number", lambda A, B, s, x, g: -s * ((x @ A.T) * (g @ B)).sum())


@parts.wrong("scales A where it stands")
def _(A, B, scaling, x, gradient):
    A *= scaling
    return -((x @ A.T) * (gradient @ B)).reshape(-1, len(A)).sum(0)


@parts.wrong("tokens as one text each")
def _(A, B, scaling, x, gradient):
    each = (x @ A.T) * (gradient @ B)
    while each.dim() > 2:
        each = each.mean(0)
    return -scaling * each.reshape(-1, len(A)).sum(0)


parts.right(
    "through the inner sums",
    lambda A, B, s, x, g: (
        -s
        * torch.einsum("nr,nr->r", x.reshape(-1, x.shape[-1]) @ A.T, g.reshape(-1, g.shape[-1]) @ B)
    ),
)
parts.right(
    "the diagonal",
    lambda A, B, s, x, g: (
        -s * ((g @ B).reshape(-1, len(A)).T @ (x @ A.T).reshape(-1, len(A))).diagonal()
    ),
)
parts.right(
    "a list, part by part",
    lambda A, B, s, x, g: [float(-s * ((x @ A[i]) * (g @ B[:, i])).sum()) for i in range(len(A))],
)
parts.right(
    "numpy, in float64",
    lambda A, B, s, x, g: (
        -s
        * ((x.double().numpy() @ A.double().numpy().T) * (g.double().numpy() @ B.double().numpy()))
        .reshape(-1, len(A))
        .sum(0)
    ),
)


@parts.right("autograd of the switches")
def _(A, B, scaling, x, gradient):
    on = torch.ones(len(A), requires_grad=True)
    y = scaling * (x @ A.T * on) @ B.T
    return -torch.autograd.grad(y, on, gradient)[0]


@parts.right("torch.func, forward")
def _(A, B, scaling, x, gradient):
    def loss(on):
        return ((scaling * (x @ A.T * on) @ B.T) * gradient).sum()

    return torch.stack(
        [torch.func.jvp(loss, (torch.ones(len(A)),), (-e,))[1] for e in torch.eye(len(A))]
    )


@parts.right("token by token")
def _(A, B, scaling, x, gradient):
    total = torch.zeros(len(A))
    for token, slope in zip(x.reshape(-1, A.shape[1]), gradient.reshape(-1, len(B)), strict=True):
        total -= scaling * (A @ token) * (slope @ B)
    return total


def moved(scores, ranks, count, step, min_r, max_r, *, order=None, many=None, keep=None, last=None):
    """The answer, of which each part can be replaced."""
    order = order(scores) if order else sorted(scores, key=lambda n: -scores[n])
    result = {}
    for i in range(count):
        taker, giver = order[i], (last(order, i) if last else order[-1 - i])
        n = min(step, max_r - ranks[taker], ranks[giver] - min_r)
        n = many(n, step) if many else n
        if keep(n) if keep else n > 0:
            result[taker], result[giver] = n, -n
    return result


def moving(**parts):
    return lambda *arguments: moved(*arguments, **parts)


moves.wrong("zeros stay", moving(keep=lambda n: n >= 0))
moves.wrong("all or nothing", moving(many=lambda n, step: step if n == step else 0))
moves.wrong("reversed", moving(order=lambda s: sorted(s, key=s.get, reverse=False)))
moves.wrong("ascending, read from its end", moving(order=lambda s: sorted(s, key=s.get)[::-1]))
moves.wrong("by name where equal", moving(order=lambda s: sorted(s, key=lambda n: (-s[n], n))))
moves.wrong("by size of the score", moving(order=lambda s: sorted(s, key=lambda n: -abs(s[n]))))
moves.wrong("each with its neighbour", moving(last=lambda o, i: o[len(o) // 2 + i]))
moves.wrong("the lowest gives every time", moving(last=lambda o, i: o[-1]))
moves.wrong("at least one", moving(many=lambda n, step: max(1, n)))
moves.wrong("one at a time", moving(many=lambda n, step: min(1, n)))
moves.wrong("keeps one more", lambda s, r, c, k, lo, hi: moved(s, r, c, k, lo + 1, hi))
moves.wrong("one below the highest", lambda s, r, c, k, lo, hi: moved(s, r, c, k, lo, hi - 1))
moves.wrong("all pairs", lambda s, r, c, k, lo, hi: moved(s, r, len(s) // 2, k, lo, hi))
moves.wrong("the lower end matters not", lambda s, r, c, k, lo, hi: moved(s, r, c, k, 0, hi))
moves.wrong("the upper end matters not", lambda s, r, c, k, lo, hi: moved(s, r, c, k, lo, 10**6))
moves.wrong(
    "step in all", lambda s, r, c, k, lo, hi: moved(s, r, c, max(1, k // c) if c else k, lo, hi)
)


@moves.wrong("nlargest and nsmallest")
def _(scores, ranks, count, step, min_r, max_r):
    takers, givers = (
        pick(count, scores, key=scores.get) for pick in (heapq.nlargest, heapq.nsmallest)
    )
    found = {}
    for taker, giver in zip(takers, givers, strict=True):
        n = min(step, max_r - ranks[taker], ranks[giver] - min_r)
        if n > 0:
            found |= {taker: n, giver: -n}
    return found


@moves.wrong("skips to the next that can")
def _(scores, ranks, count, step, min_r, max_r):
    order = sorted(scores, key=lambda n: -scores[n])
    takers = [n for n in order if ranks[n] < max_r]
    givers = [n for n in order[::-1] if ranks[n] > min_r]
    found = {}
    for taker, giver in list(zip(takers, givers, strict=False))[:count]:
        if taker != giver:
            n = min(step, max_r - ranks[taker], ranks[giver] - min_r)
            found |= {taker: n, giver: -n}
    return found


@moves.wrong("the new ranks")
def _(scores, ranks, count, step, min_r, max_r):
    return {n: ranks[n] + m for n, m in moved(scores, ranks, count, step, min_r, max_r).items()}


@moves.wrong("moves them in `ranks`")
def _(scores, ranks, count, step, min_r, max_r):
    found = moved(scores, ranks, count, step, min_r, max_r)
    for name, n in found.items():
        ranks[name] += n
    return found


@moves.right("positions as tie-breaks")
def _(scores, ranks, count, step, min_r, max_r):
    listed = [(-score, i, name) for i, (name, score) in enumerate(scores.items())]
    return moved(
        scores, ranks, count, step, min_r, max_r, order=lambda s: [n for *_, n in sorted(listed)]
    )


moves.right(
    "lexsort",
    moving(
        order=lambda s: [
            list(s)[i]
            for i in np.lexsort((np.arange(len(s)), -np.array([float(v) for v in s.values()])))
        ]
    ),
)
moves.right("numpy numbers", lambda *a: {n: np.int64(m) for n, m in moved(*a).items()})
moves.right(
    "a stable sort of tensors",
    moving(
        order=lambda s: [
            list(s)[i]
            for i in torch.tensor([float(v) for v in s.values()], dtype=torch.float64)
            .sort(descending=True, stable=True)
            .indices
        ]
    ),
)


@moves.right("rank by rank")
def _(scores, ranks, count, step, min_r, max_r):
    ranks, found = dict(ranks), {}
    order = sorted(scores, key=scores.__getitem__, reverse=True)
    for taker, giver in list(zip(order, reversed(order), strict=True))[:count]:
        for _ in range(step):
            if ranks[taker] < max_r and ranks[giver] > min_r:
                ranks[taker], ranks[giver] = ranks[taker] + 1, ranks[giver] - 1
                found[taker], found[giver] = found.get(taker, 0) + 1, found.get(giver, 0) - 1
    return found


@moves.right("from the outside in, by recursion")
def _(scores, ranks, count, step, min_r, max_r):
    def go(order, count):
        if not count:
            return {}
        n = min(step, max_r - ranks[order[0]], ranks[order[-1]] - min_r)
        rest = go(order[1:-1], count - 1)
        return {order[0]: n, order[-1]: -n, **rest} if n > 0 else rest

    return go(sorted(scores, key=lambda n: -scores[n]), count)


@moves.right("a Counter")
def _(scores, ranks, count, step, min_r, max_r):
    return collections.Counter(moved(scores, ranks, count, step, min_r, max_r))


def group_of(optimizer, old):
    return next(g for g in optimizer.param_groups if any(p is old for p in g["params"]))


told.wrong(
    "a group of its own",
    lambda o, old, new: o.add_param_group(
        {**{k: v for k, v in group_of(o, old).items() if k != "params"}, "params": [new]}
    ),
)
told.wrong("the first group", lambda o, old, new: o.param_groups[0]["params"].append(new))
told.wrong("the last group", lambda o, old, new: o.param_groups[-1]["params"].append(new))
told.wrong(
    "every group", lambda o, old, new: [g["params"].append(new) for g in o.param_groups] and None
)
told.wrong(
    "the group of equal values",
    lambda o, old, new: next(
        g
        for g in o.param_groups
        if any(p.shape == old.shape and torch.equal(p, old) for p in g["params"])
    )["params"].append(new),
)
told.wrong(
    "the group of that shape",
    lambda o, old, new: next(
        g for g in o.param_groups if any(p.shape == old.shape for p in g["params"])
    )["params"].append(new),
)
told.wrong(
    "`in`",
    lambda o, old, new: next(g for g in o.param_groups if old in g["params"])["params"].append(new),
)
told.wrong(
    "a copy",
    lambda o, old, new: group_of(o, old)["params"].append(new.detach().clone().requires_grad_()),
)
told.wrong("its values", lambda o, old, new: group_of(o, old)["params"].append(new.data))
told.wrong(
    "beside old",
    lambda o, old, new: (ps := group_of(o, old)["params"]).insert(
        next(i for i, p in enumerate(ps) if p is old) + 1, new
    ),
)
told.wrong("in front", lambda o, old, new: group_of(o, old)["params"].insert(0, new))


@told.wrong("old's moments")
def _(optimizer, old, new):
    group_of(optimizer, old)["params"].append(new)
    optimizer.state[new] = dict(optimizer.state[old])


@told.right("moments of zero, no steps")
def _(optimizer, old, new):
    group_of(optimizer, old)["params"].append(new)
    optimizer.state[new] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(new),
        "exp_avg_sq": torch.zeros_like(new),
    }


@told.right("looks at the state, which makes an empty one")
def _(optimizer, old, new):
    group_of(optimizer, old)["params"].append(new)
    if optimizer.state[new]:
        del optimizer.state[new]


@told.wrong("in place of old")
def _(optimizer, old, new):
    group = group_of(optimizer, old)
    group["params"][:] = [p for p in group["params"] if p is not old] + [new]


@told.wrong("without the old gradients")
def _(optimizer, old, new):
    group_of(optimizer, old)["params"].append(new)
    optimizer.zero_grad()


@told.wrong("with a gradient of zero")
def _(optimizer, old, new):
    group_of(optimizer, old)["params"].append(new)
    new.grad = torch.zeros_like(new)


@told.wrong("the group goes to the end")
def _(optimizer, old, new):
    group = group_of(optimizer, old)
    group["params"].append(new)
    at = next(i for i, g in enumerate(optimizer.param_groups) if g is group)
    optimizer.param_groups.append(optimizer.param_groups.pop(at))


@told.wrong("the rate it began with")
def _(optimizer, old, new):
    group = group_of(optimizer, old)
    group["params"].append(new)
    group["lr"] = group.get("initial_lr", group["lr"])


@told.wrong("everybody's moments go")
def _(optimizer, old, new):
    group_of(optimizer, old)["params"].append(new)
    optimizer.state.clear()


@told.wrong("a new optimiser inside the old")
def _(optimizer, old, new):
    group_of(optimizer, old)["params"].append(new)
    optimizer.__init__(optimizer.param_groups)


told.right(
    "a longer list",
    lambda o, old, new: group_of(o, old).update(params=[*group_of(o, old)["params"], new]),
)
told.right("+=", lambda o, old, new: group_of(o, old)["params"].__iadd__([new]) and None)
told.right("extend", lambda o, old, new: group_of(o, old)["params"].extend([new]))


@told.right("identities in a set")
def _(optimizer, old, new):
    for group in optimizer.param_groups:
        if id(old) in {id(p) for p in group["params"]}:
            group["params"].append(new)
            return


@told.right("by where it lies in memory")
def _(optimizer, old, new):
    for group in optimizer.param_groups:
        if any(p.data_ptr() == old.data_ptr() for p in group["params"]):
            group["params"].append(new)


@told.right("from the end, and returns the optimiser")
def _(optimizer, old, new):
    for i in reversed(range(len(optimizer.param_groups))):
        for p in optimizer.param_groups[i]["params"]:
            if p is old:
                optimizer.param_groups[i]["params"].append(new)
                return optimizer


@told.right("add_param_group, then joined")
def _(optimizer, old, new):
    optimizer.add_param_group({"params": [new]})
    group_of(optimizer, old)["params"] += optimizer.param_groups.pop()["params"]
