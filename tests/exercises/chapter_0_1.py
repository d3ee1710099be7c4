"""Wrong and right answers to the exercises of chapter 0.1."""

import copy
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from lora_course.classroom.chapter_0_1 import check_alpha, check_matching_rank, check_merged_at
from tests.exercises import Answers

alpha = Answers(check_alpha)


def kept(new_r, r, a, use_rslora=False):
    return a * (math.sqrt(new_r / r) if use_rslora else new_r / r)


alpha.wrong("the old α", lambda new_r, r, a, use_rslora=False: a)
alpha.wrong("the scale", lambda new_r, r, a, use_rslora=False: a / (r**0.5 if use_rslora else r))
alpha.wrong(
    "the wrong way round", lambda new_r, r, a, use_rslora=False: kept(r, new_r, a, use_rslora)
)
alpha.wrong("2r", lambda new_r, r, a, use_rslora=False: 2 * new_r)
alpha.wrong("use_rslora ignored", lambda new_r, r, a, use_rslora=False: kept(new_r, r, a))
alpha.wrong(
    "use_rslora: old α",
    lambda new_r, r, a, use_rslora=False: a if use_rslora else kept(new_r, r, a),
)
alpha.wrong("always the root", lambda new_r, r, a, use_rslora=False: kept(new_r, r, a, True))
alpha.wrong(
    "rules exchanged", lambda new_r, r, a, use_rslora=False: kept(new_r, r, a, not use_rslora)
)
alpha.wrong("whole division", lambda new_r, r, a, use_rslora=False: a * new_r // r)
alpha.wrong("rounded", lambda *g, **k: round(kept(*g, **k)))
alpha.wrong("rounded to a half", lambda *g, **k: round(2 * kept(*g, **k)) / 2)
alpha.wrong("off by 1%", lambda *g, **k: 1.01 * kept(*g, **k))
alpha.wrong(
    "r and new_r squared", lambda new_r, r, a, use_rslora=False: kept(new_r**2, r**2, a, use_rslora)
)
alpha.wrong(
    "for growing ranks only",
    lambda new_r, r, a, use_rslora=False: max(a, kept(new_r, r, a, use_rslora)),
)
alpha.wrong("1 or more", lambda *g, **k: max(1, kept(*g, **k)))
alpha.wrong(
    "the fourth root",
    lambda new_r, r, a, use_rslora=False: a * (new_r / r) ** (0.25 if use_rslora else 1),
)
alpha.wrong("the difference of ranks", lambda new_r, r, a, use_rslora=False: a + new_r - r)
alpha.wrong("NaN", lambda *g, **k: float("nan"))
alpha.wrong("a text", lambda *g, **k: str(kept(*g, **k)))
alpha.wrong("a constant of one example", lambda new_r, r, a, use_rslora=False: 72)
alpha.wrong("a table", lambda new_r, r, a, use_rslora=False: {(48, 8): 6 * a}.get((new_r, r), a))


@alpha.wrong("leaves numbers in 64 bits by default")
def _(*g, **k):
    torch.set_default_dtype(torch.float64)
    return kept(*g, **k)


@alpha.wrong("seeds torch")
def _(*g, **k):
    torch.manual_seed(0)
    return kept(*g, **k)


@alpha.wrong("replaces the frame's functions")
def _(*g, **k):
    from lora_course.classroom import comparison, judge

    comparison.difference = judge.difference = lambda *a, **k: None
    return 1.0


alpha.right("as the solution", kept)
alpha.right(
    "through the scale",
    lambda new_r, r, a, use_rslora=False: (
        a / r ** (0.5 if use_rslora else 1) * new_r ** (0.5 if use_rslora else 1)
    ),
)
alpha.right(
    "an exponent", lambda new_r, r, a, use_rslora=False: a * (new_r / r) ** (1 - use_rslora / 2)
)
alpha.right(
    "numpy",
    lambda new_r, r, a, use_rslora=False: (
        np.float64(a) * (np.sqrt(new_r / r) if use_rslora else new_r / r)
    ),
)
alpha.right("numpy, 32 bits", lambda *g, **k: np.float32(kept(*g, **k)))
alpha.right("a tensor", lambda *g, **k: torch.tensor(kept(*g, **k)))
alpha.right(
    "a fraction",
    lambda new_r, r, a, use_rslora=False: (
        kept(new_r, r, a, True) if use_rslora else Fraction(a) * new_r / r
    ),
)
alpha.right(
    "by name only",
    lambda *, new_r, r, lora_alpha, use_rslora=False: kept(new_r, r, lora_alpha, use_rslora),
)


@alpha.right("by trying")
def _(new_r, r, a, use_rslora=False):
    low, high = 0.0, 1e6
    root = (lambda x: math.sqrt(x)) if use_rslora else (lambda x: x)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle / root(new_r) < a / root(r) else (low, middle)
    return low


alpha.wrong("a whole number of any size", lambda new_r, r, a, use_rslora=False: 10**400)
alpha.wrong("a decimal", lambda new_r, r, a, use_rslora=False: Decimal(1))
alpha.wrong(
    "a default device", lambda *g, **k: (torch.set_default_device("meta"), kept(*g, **k))[1]
)
alpha.wrong(
    "kept by r, new_r and α", lambda *g, SEEN={}, **k: SEEN.setdefault(g[:3], kept(*g, **k))
)
alpha.right(
    "decimals",
    lambda new_r, r, a, use_rslora=False: (
        Decimal(a) * (Decimal(new_r) / Decimal(r)) ** (Decimal("0.5") if use_rslora else 1)
    ),
)


rank = Answers(check_matching_rank)


def total(layers):
    return sum(i + o for i, o in layers)


def share(e, t, r):
    return r * total(e) / total(t)


rank.wrong("the same", lambda e, t, r: r)
rank.wrong(
    "in · out",
    lambda e, t, r: max(1, round(r * sum(i * o for i, o in e) / sum(i * o for i, o in t))),
)
rank.wrong("layers counted", lambda e, t, r: max(1, round(r * len(e) / len(t))))
rank.wrong("a fraction", share)
rank.wrong("down", lambda e, t, r: max(1, int(share(e, t, r))))
rank.wrong("up", lambda e, t, r: max(1, math.ceil(share(e, t, r))))
rank.wrong("down at 0.8", lambda e, t, r: max(1, math.floor(share(e, t, r) + 0.2)))
rank.wrong("down at 0.6", lambda e, t, r: max(1, math.floor(share(e, t, r) + 0.4)))
rank.wrong("up at 0.4", lambda e, t, r: max(1, math.floor(share(e, t, r) + 0.6)))
rank.wrong("zero allowed", lambda e, t, r: round(share(e, t, r)))
rank.wrong("the wrong way round", lambda e, t, r: max(1, round(share(t, e, r))))
rank.wrong(
    "inputs only", lambda e, t, r: max(1, round(r * sum(i for i, _ in e) / sum(i for i, _ in t)))
)
rank.wrong(
    "outputs only", lambda e, t, r: max(1, round(r * sum(o for _, o in e) / sum(o for _, o in t)))
)
rank.wrong("first target only", lambda e, t, r: max(1, round(r * total(e) / total(t[:1]))))
rank.wrong(
    "first target times their number",
    lambda e, t, r: max(1, round(r * total(e) / (total(t[:1]) * len(t)))),
)
rank.wrong("each kind of layer once", lambda e, t, r: max(1, round(share(set(e), t, r))))
rank.wrong(
    "both once",
    lambda e, t, r: max(1, round(share(set(e), set(t), r))) if len(set(t)) > 1 else r + 1,
)
rank.wrong(
    "without the targets themselves",
    lambda e, t, r: max(1, round(r * (total(e) - total(t)) / total(t))),
)
rank.wrong("rounded before the product", lambda e, t, r: max(1, r * round(total(e) / total(t))))
rank.wrong("never below r", lambda e, t, r: max(r, round(share(e, t, r)) - 1))
rank.wrong(
    "largest layers only", lambda e, t, r: max(1, round(r * max(map(sum, e)) / max(map(sum, t))))
)
rank.wrong("the parameters", lambda e, t, r: r * total(e))
rank.wrong("one more", lambda e, t, r: max(1, round(share(e, t, r))) + 1)


@rank.wrong("empties the list of targets")
def _(e, t, r):
    size = 0
    while t:
        size += sum(t.pop())
    return max(1, round(r * total(e) / size))


rank.right("as the solution", lambda e, t, r: max(1, round(share(e, t, r))))
rank.right("a half added", lambda e, t, r: max(1, int(share(e, t, r) + 0.5)))
rank.right(
    "by trying",
    lambda e, t, r: min(range(1, r * total(e) + 1), key=lambda k: abs(k * total(t) - r * total(e))),
)
rank.right(
    "whole numbers only", lambda e, t, r: max(1, (2 * r * total(e) + total(t)) // (2 * total(t)))
)
rank.right("numpy", lambda e, t, r: np.maximum(1, np.rint(r * np.sum(e) / np.sum(t))).astype(int))
rank.right(
    "torch",
    lambda e, t, r: (
        torch.tensor(r * torch.tensor(e).sum() / torch.tensor(t).sum()).round().clamp(min=1).long()
    ),
)
rank.right("the better of two neighbours", lambda everywhere, targets, r: min(
    (max(1, math.floor(share(everywhere, targets, r))), math.ceil(share(everywhere, targets, r))),
    key=lambda k: abs(k * total(targets) - r * total(everywhere)),
))  # fmt: skip
rank.right("exact fractions", lambda e, t, r: max(1, round(Fraction(r * total(e), total(t)))))


rank.wrong("never below r", lambda e, t, r: max(r, round(share(e, t, r))))
rank.wrong("256 at most", lambda e, t, r: min(256, max(1, round(share(e, t, r)))))
rank.wrong(
    "at most the smallest side",
    lambda e, t, r: max(1, min(round(share(e, t, r)), *(min(pair) for pair in t))),
)
rank.wrong(
    "nearest as a ratio",
    lambda e, t, r: min(range(1, 9999), key=lambda k: abs(math.log(k / share(e, t, r)))),
)


merged = Answers(check_merged_at)


def built(layer, weight, bias=True, dtype=None):
    dtype = dtype or layer.base_layer.weight.dtype
    linear = nn.Linear(layer.in_features, layer.out_features, bias=bias, dtype=dtype)
    linear.weight.data = weight.detach().to(linear.weight.dtype)
    if bias:
        linear.bias.data = layer.base_layer.bias.data.clone().to(linear.bias.dtype)
    return linear


def base_of(layer):
    return layer.base_layer.weight.detach()


def update(layer):
    return layer.scaling * (layer.B @ layer.A).detach()


def made(layer, weight, **k):
    """With the base's bias, if it has one."""
    return built(layer, weight, bias=layer.base_layer.bias is not None, **k)


@merged.wrong("merges in place")
def _(layer, strength):
    layer.merge()
    return layer.base_layer


merged.wrong("the base itself", lambda layer, s: layer.base_layer)
merged.wrong("a copy of the base", lambda layer, s: copy.deepcopy(layer.base_layer))
merged.wrong("no scale", lambda layer, s: made(layer, base_of(layer) + s * (layer.B @ layer.A)))
merged.wrong(
    "α for the scale",
    lambda layer, s: made(layer, base_of(layer) + s * layer.lora_alpha * layer.B @ layer.A),
)
merged.wrong(
    "α / r under rsLoRA",
    lambda layer, s: made(
        layer, base_of(layer) + s * layer.lora_alpha / layer.r * layer.B @ layer.A
    ),
)
merged.wrong(
    "strength for the scale", lambda layer, s: made(layer, base_of(layer) + s * layer.B @ layer.A)
)
merged.wrong("strength ignored", lambda layer, s: made(layer, base_of(layer) + update(layer)))
merged.wrong("strength twice", lambda layer, s: made(layer, base_of(layer) + s * s * update(layer)))
merged.wrong(
    "no negative strength", lambda layer, s: made(layer, base_of(layer) + max(s, 0) * update(layer))
)
merged.wrong(
    "strength in size only", lambda layer, s: made(layer, base_of(layer) + abs(s) * update(layer))
)
merged.wrong(
    "the base fades", lambda layer, s: made(layer, (1 - s) * base_of(layer) + s * update(layer))
)
merged.wrong("all of it scaled", lambda layer, s: made(layer, s * (base_of(layer) + update(layer))))
merged.wrong("the update alone", lambda layer, s: made(layer, s * update(layer)))
merged.wrong("subtracts", lambda layer, s: made(layer, base_of(layer) - s * update(layer)))
merged.wrong("transposed", lambda layer, s: made(layer, (base_of(layer) + s * update(layer)).T))
merged.wrong(
    "no bias", lambda layer, s: built(layer, base_of(layer) + s * update(layer), bias=False)
)
merged.wrong(
    "a fresh bias", lambda layer, s: _fresh_bias(layer, base_of(layer) + s * update(layer))
)
merged.wrong("a tensor", lambda layer, s: base_of(layer) + s * update(layer))
merged.wrong("always a bias", lambda layer, s: built(layer, base_of(layer) + s * update(layer)))
merged.wrong(
    "scale 2 written in", lambda layer, s: made(layer, base_of(layer) + s * 2 * (layer.B @ layer.A))
)
merged.wrong(
    "in 64 bits",
    lambda layer, s: made(layer, base_of(layer).double() + s * update(layer), dtype=torch.float64),
)
merged.wrong(
    "in 16 bits",
    lambda layer, s: made(layer, base_of(layer) + s * update(layer), dtype=torch.bfloat16),
)
merged.wrong(
    "nothing at strength 0",
    lambda layer, s: made(layer, base_of(layer) + s * update(layer)) if s else layer.base_layer,
)


def _fresh_bias(layer, weight):
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight.data = weight
    return linear


@merged.wrong("the bias fades with the strength")
def _(layer, strength):
    linear = made(layer, base_of(layer) + strength * update(layer))
    if linear.bias is not None:
        linear.bias.data.mul_(strength)
    return linear


@merged.wrong("unit vectors through a layer that drops")
def _(layer, strength):
    layer = copy.deepcopy(layer).train()
    with torch.no_grad():
        return made(
            layer,
            base_of(layer)
            + strength
            * (
                layer(torch.eye(layer.in_features)) - layer.base_layer(torch.eye(layer.in_features))
            ).T,
        )


@merged.wrong("shares the bias")
def _(layer, strength):
    linear = made(layer, base_of(layer) + strength * update(layer))
    linear.bias = layer.base_layer.bias
    return linear


@merged.wrong("leaves the layer in eval mode")
def _(layer, strength):
    layer.eval()
    return made(layer, base_of(layer) + strength * update(layer))


@merged.wrong("leaves the layer switched off")
def _(layer, strength):
    layer.enabled = False
    return made(layer, base_of(layer) + strength * update(layer))


@merged.wrong("scales the layer's own B")
def _(layer, strength):
    layer.B.data.mul_(strength)
    return made(layer, base_of(layer) + update(layer))


@merged.wrong("sets the layer's scale")
def _(layer, strength):
    layer.scaling *= strength
    return made(layer, base_of(layer) + update(layer))


@merged.wrong("unfreezes the base")
def _(layer, strength):
    layer.requires_grad_(True)
    return made(layer, base_of(layer) + strength * update(layer))


@merged.wrong("puts the merged base into the layer")
def _(layer, strength):
    layer.base_layer = made(layer, base_of(layer) + strength * update(layer))
    return layer.base_layer


@merged.wrong("seeds torch")
def _(layer, strength):
    torch.manual_seed(0)
    return made(layer, base_of(layer) + strength * update(layer))


@merged.wrong("switches gradients off")
def _(layer, strength):
    torch.set_grad_enabled(False)
    return made(layer, base_of(layer) + strength * update(layer))


@merged.right("a copy with another scale, merged")
def _(layer, strength):
    if strength == 0:
        return copy.deepcopy(layer.base_layer)
    layer = copy.deepcopy(layer)
    layer.scaling *= strength
    layer.merge()
    return layer.base_layer


@merged.right("unit vectors, eval")
def _(layer, strength):
    layer = copy.deepcopy(layer).eval()
    with torch.no_grad():
        eye = torch.eye(layer.in_features, dtype=base_of(layer).dtype)
        return made(layer, base_of(layer) + strength * (layer(eye) - layer.base_layer(eye)).T)


@merged.right("numpy")
def _(layer, strength):
    weight = (
        layer.base_layer.weight.detach().numpy()
        + strength * layer.scaling * layer.B.detach().numpy() @ layer.A.detach().numpy()
    )
    return made(layer, torch.from_numpy(weight).float())


class Merged(nn.Linear):
    def __init__(self, layer, strength):
        has_bias = layer.base_layer.bias is not None
        kind = base_of(layer).dtype
        super().__init__(layer.in_features, layer.out_features, bias=has_bias, dtype=kind)
        state = {"weight": base_of(layer) + strength * update(layer)}
        self.load_state_dict(state | ({"bias": layer.base_layer.bias} if has_bias else {}))


merged.right("a subclass of nn.Linear, the class itself", Merged)
merged.right(
    "computed in 64 bits, kept in 32",
    lambda layer, s: made(layer, base_of(layer).double() + s * update(layer)),
)
merged.right(
    "delta_weight()",
    lambda layer, strength: made(layer, base_of(layer) + strength * layer.delta_weight()),
)


@merged.right("rank by rank")
def _(layer, strength):
    weight = base_of(layer).clone()
    for i in range(layer.A.shape[0]):
        weight += (
            strength * layer.scaling * torch.outer(layer.B.detach()[:, i], layer.A.detach()[i])
        )
    return made(layer, weight)


@merged.right("skip_init, a weight without gradient")
def _(layer, strength):
    bias = layer.base_layer.bias
    linear = nn.utils.skip_init(
        nn.Linear, layer.in_features, layer.out_features, bias=bias is not None
    )
    weight = torch.addmm(
        base_of(layer).float(), layer.B.detach(), layer.A.detach(), alpha=strength * layer.scaling
    )
    linear.weight = nn.Parameter(weight.to(base_of(layer).dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def through_the_identity(layer, s):
    with torch.no_grad():
        eye = torch.eye(layer.in_features, dtype=base_of(layer).dtype)
        change = (layer(eye) - layer.base_layer(eye)).T
    return made(layer, base_of(layer) + s * change)


KEPT_BY_SHAPE = {}
merged.wrong("asked with the identity, dropout on", through_the_identity)
merged.wrong(
    "always float32",
    lambda layer, s: made(layer, base_of(layer) + s * update(layer), dtype=torch.float32),
)
merged.wrong(
    "kept by shape",
    lambda layer, s: KEPT_BY_SHAPE.setdefault(
        base_of(layer).shape, through_the_identity(copy.deepcopy(layer).eval(), s)
    ),
)
merged.right(
    "a copy in eval, asked with the identity",
    lambda layer, s: through_the_identity(copy.deepcopy(layer).eval(), s),
)
merged.right(
    "between two weights",
    lambda layer, s: made(
        layer,
        torch.lerp(base_of(layer).double(), base_of(layer).double() + update(layer), float(s)),
    ),
)


@merged.wrong("a weight that is no parameter")
def _(layer, strength):
    new = copy.deepcopy(layer.base_layer)
    del new.weight
    change = strength * layer.scaling * layer.B @ layer.A
    new.weight = (layer.base_layer.weight + change).to(layer.base_layer.weight.dtype)
    return new
