"""Wrong and right answers to the exercises of chapter 2.2."""

import collections
import copy
import math

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lora_course.classroom.chapter_2_2 import (
    check_given_scaling,
    check_jagged_cosine,
    check_restart,
)
from lora_course.progressive import Stage, multiplier
from lora_course.states import concatenate
from tests.exercises import Answers

schedule = Answers(check_jagged_cosine)


def half(x):
    return 0.5 + 0.5 * math.cos(math.pi * x)


def decay(t, n, L, w, floor, start=None, total=None, shape=half):
    start, total = w if start is None else start, n * L if total is None else total
    return floor + (1 - floor) * shape(max(0, t - start) / (total - start))


def warm(t, L, w):
    return min(1, t % L / w)


def jagged(t, n, L, w, floor):
    return warm(t, L, w) * decay(t, n, L, w, floor)


schedule.wrong("warmed up once", lambda t, n, L, w, f: min(1, t / w) * decay(t, n, L, w, f))
schedule.wrong("no decay", lambda t, n, L, w, f: warm(t, L, w))
schedule.wrong("no warm-up", decay)
schedule.wrong("by stages", lambda t, n, L, w, f: jagged(t % L, 1, L, w, f))
schedule.wrong(
    "a line", lambda t, n, L, w, f: warm(t, L, w) * decay(t, n, L, w, f, shape=lambda x: 1 - x)
)
schedule.wrong(
    "a quarter",
    lambda t, n, L, w, f: (
        warm(t, L, w) * decay(t, n, L, w, f, shape=lambda x: math.cos(math.pi * x / 2))
    ),
)
schedule.wrong("the smaller", lambda t, n, L, w, f: min(warm(t, L, w), decay(t, n, L, w, f)))
schedule.wrong(
    "decay from step 0", lambda t, n, L, w, f: warm(t, L, w) * decay(t, n, L, w, f, start=0)
)
schedule.wrong(
    "decay from the stage's warm-up",
    lambda t, n, L, w, f: warm(t, L, w) * decay(t, n, L, w, f, start=t // L * L + w),
)
schedule.wrong("no floor", lambda t, n, L, w, f: jagged(t, n, L, w, 0))
schedule.wrong("floor 0.1", lambda t, n, L, w, f: jagged(t, n, L, w, 0.1))
schedule.wrong(
    "cut at the floor", lambda t, n, L, w, f: warm(t, L, w) * max(f, decay(t, n, L, w, 0))
)
schedule.wrong("all cut at the floor", lambda t, n, L, w, f: max(f, jagged(t, n, L, w, f)))
schedule.wrong("floor added", lambda t, n, L, w, f: f + jagged(t, n, L, w, 0))
schedule.wrong("floor of the product", lambda t, n, L, w, f: f + (1 - f) * jagged(t, n, L, w, 0))
schedule.wrong(
    "warm-up from 1", lambda t, n, L, w, f: min(1, (t % L + 1) / w) * decay(t, n, L, w, f)
)
schedule.wrong(
    "warm-up over w + 1", lambda t, n, L, w, f: min(1, t % L / (w + 1)) * decay(t, n, L, w, f)
)
schedule.wrong(
    "end one early", lambda t, n, L, w, f: warm(t, L, w) * decay(t, n, L, w, f, total=n * L - 1)
)
schedule.wrong(
    "end a stage early",
    lambda t, n, L, w, f: warm(t, L, w) * decay(t, n, L, w, f, total=max(L, (n - 1) * L)),
)
schedule.wrong(
    "degrees",
    lambda t, n, L, w, f: (
        warm(t, L, w) * decay(t, n, L, w, f, shape=lambda x: 0.5 + 0.5 * math.cos(180 * x))
    ),
)
schedule.wrong(
    "rises", lambda t, n, L, w, f: warm(t, L, w) * decay(t, n, L, w, f, shape=lambda x: half(1 - x))
)
schedule.wrong(
    "whole periods",
    lambda t, n, L, w, f: warm(t, L, w) * decay(t, n, L, w, f, shape=lambda x: half(2 * x)),
)
schedule.wrong(
    "the package's, a line without a floor",
    lambda t, n, L, w, f: multiplier([Stage(1, "all-linear", 1e-3, L, w)] * n, t // L, t % L),
)
schedule.wrong("three stages of ten", lambda t, n, L, w, f: jagged(t % 30, 3, 10, 4, f))
schedule.wrong("starts at 1e-3", lambda *g: max(1e-3, jagged(*g)))
schedule.right("as the solution", jagged)
schedule.right(
    "by phases",
    lambda t, n, L, w, f: (t % L / w if t % L < w else 1) * (1 if t < w else decay(t, n, L, w, f)),
)
schedule.right(
    "sin²",
    lambda t, n, L, w, f: (
        warm(t, L, w) * (1 - (1 - f) * math.sin(math.pi * max(0, t - w) / (n * L - w) / 2) ** 2)
    ),
)
schedule.right(
    "numpy",
    lambda t, n, L, w, f: (
        np.clip(t % L / w, 0, 1)
        * (f + (1 - f) * (1 + np.cos(np.pi * np.maximum(0, t - w) / (n * L - w))) / 2)
    ),
)
schedule.right("torch", lambda t, n, L, w, f: torch.tensor(jagged(t, n, L, w, f)))
schedule.right(
    "by name only",
    lambda *, step, stages, length, warmup, floor: jagged(step, stages, length, warmup, floor),
)
schedule.right(
    "the weights of two ends",
    lambda t, n, L, w, f: (
        warm(t, L, w)
        * (half(max(0, t - w) / (n * L - w)) + f * half(1 - max(0, t - w) / (n * L - w)))
    ),
)


@schedule.right("torch's own scheduler")
def _(t, n, L, w, f):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: warm(step, L, w) * decay(step, n, L, w, f))
    for _ in range(t):
        optimizer.step()
        scheduler.step()
    return optimizer.param_groups[0]["lr"]


schedule.wrong(
    "the cosine is symmetric about the first warm-up's end",
    lambda t, n, L, w, f: warm(t, L, w) * (f + (1 - f) * half((t - w) / (n * L - w))),
)
schedule.wrong(
    "1 at the step before",
    lambda t, n, L, w, f: min(1, t % L / max(1, w - 1)) * decay(t, n, L, w, f),
)
schedule.wrong("kept by all but the floor", lambda *g, S={}: S.setdefault(g[:4], jagged(*g)))


adapter = Answers(check_given_scaling)


def stack(stages, a=lambda s: 1, b=lambda s: s):
    return torch.cat([a(s) * A for A, _, s in stages]), torch.cat(
        [b(s) * B for _, B, s in stages], 1
    )


def delta(stages):
    return sum(s * B @ A for A, B, s in stages)


def added_up(stages, t):
    """Pads to one rank and adds factor to factor."""
    r = max(len(A) for A, _, _ in stages)
    A, B = torch.zeros(r, stages[0][0].shape[1]), torch.zeros(len(stages[0][1]), r)
    for a, b, s in stages:
        A[: len(a)] += a
        B[:, : len(a)] += s / t * b
    return A, B


def by_svd(stages, t):
    U, S, V = torch.linalg.svd(delta(stages) / t, full_matrices=False)
    r = sum(len(A) for A, _, _ in stages)
    return V[:r], U[:, :r] * S[:r]


adapter.wrong("no scales", lambda stages, t: stack(stages, b=lambda s: 1))
adapter.wrong("no stage's scale", lambda stages, t: stack(stages, b=lambda s: 1 / t))
adapter.wrong("not divided", lambda stages, t: stack(stages))
adapter.wrong("multiplied", lambda stages, t: stack(stages, b=lambda s: s * t))
adapter.wrong("scales in both", lambda stages, t: stack(stages, a=lambda s: s, b=lambda s: s / t))
adapter.wrong(
    "divided twice", lambda stages, t: stack(stages, a=lambda s: 1 / t, b=lambda s: s / t)
)
adapter.wrong("the mean", lambda stages, t: stack(stages, b=lambda s: s / t / len(stages)))
adapter.wrong("scales divide", lambda stages, t: stack(stages, b=lambda s: 1 / s / t))
adapter.wrong(
    "the first stage's scale for all", lambda stages, t: stack(stages, b=lambda s: stages[0][2] / t)
)
adapter.wrong(
    "√ in one only", lambda stages, t: stack(stages, a=lambda s: math.sqrt(s / t), b=lambda s: 1)
)
adapter.wrong(
    "ΔW and the identity", lambda stages, t: (torch.eye(stages[0][0].shape[1]), delta(stages) / t)
)
adapter.wrong("added up", added_up)
adapter.wrong(
    "B transposed",
    lambda stages, t: (stack(stages)[0], torch.cat([s / t * B.T for _, B, s in stages])),
)
adapter.wrong(
    "A in another order",
    lambda stages, t: (stack(stages)[0].flip(0), stack(stages, b=lambda s: s / t)[1]),
)
adapter.wrong("B, A", lambda stages, t: stack(stages, b=lambda s: s / t)[::-1])
adapter.wrong(
    "the last stage", lambda stages, t: (stages[-1][0], stages[-1][2] / t * stages[-1][1])
)
adapter.wrong(
    "without the first stage",
    lambda stages, t: stack(stages[1:] or stages, b=lambda s: s / t if len(stages) > 1 else 0),
)
adapter.wrong("through ΔW and an SVD", by_svd)
adapter.wrong(
    "through the sum of products",
    lambda stages, t: (delta(stages), stack(stages, b=lambda s: s / t))[1],
)
adapter.wrong("A only", lambda stages, t: stack(stages)[0])
adapter.wrong("three stages", lambda stages, t: stack(stages[:3], b=lambda s: s / t))
adapter.wrong("a third factor", lambda stages, t: (*stack(stages, b=lambda s: s / t), t))
adapter.wrong(
    "lists of factors",
    lambda stages, t: ([A for A, _, _ in stages], [s / t * B for _, B, s in stages]),
)


@adapter.wrong("scales the stages' own B")
def _(stages, t):
    for _, B, s in stages:
        B.mul_(s / t)
    return stack(stages, b=lambda s: 1)


@adapter.wrong("empties the list")
def _(stages, t):
    answer = stack(stages, b=lambda s: s / t)
    stages.clear()
    return answer


@adapter.wrong("the package's, with scaling 1")
def _(stages, t):
    state = concatenate([{"m.A": A, "m.B": B, "m.scaling": torch.tensor(s)} for A, B, s in stages])
    return state["m.A"], state["m.B"]


adapter.right("as the solution", lambda stages, t: stack(stages, b=lambda s: s / t))
adapter.right("scales in A", lambda stages, t: stack(stages, a=lambda s: s / t, b=lambda s: 1))
adapter.right("a list", lambda stages, scaling: list(stack(stages, b=lambda s: s / scaling)))
adapter.right(
    "half of each",
    lambda stages, t: stack(stages, a=lambda s: math.sqrt(s / t), b=lambda s: math.sqrt(s / t)),
)
adapter.right(
    "numpy",
    lambda stages, t: (
        np.concatenate([A.numpy() for A, _, _ in stages]),
        np.concatenate([s / t * B.numpy() for _, B, s in stages], 1),
    ),
)
adapter.right("another order, in both", lambda stages, t: stack(stages[::-1], b=lambda s: s / t))
adapter.right(
    "in 64 bits", lambda stages, t: tuple(x.double() for x in stack(stages, b=lambda s: s / t))
)
adapter.right(
    "the package's, then divided",
    lambda stages, t: (lambda state: (state["m.A"], state["m.B"] / t))(
        concatenate([{"m.A": A, "m.B": B, "m.scaling": torch.tensor(s)} for A, B, s in stages])
    ),
)


@adapter.right("column and row of each component")
def _(stages, t):
    rows, columns = [], []
    for A, B, s in stages:
        for a, b in zip(A, B.T, strict=True):
            rows.append(a)
            columns.append(b * s / t)
    return torch.stack(rows), torch.stack(columns, 1)


adapter.right(
    "rows in lists", lambda stages, t: [list(x) for x in stack(stages, b=lambda s: s / t)]
)


fresh = Answers(check_restart)


@torch.no_grad()
def rs(layer, optimizer, scale=True, merge=True, A=True, B=True, moments=True, flag=False):
    if merge:
        layer.base_layer.weight += (layer.scaling if scale else 1) * layer.B @ layer.A
    if A:
        nn.init.kaiming_uniform_(layer.A, a=5**0.5)
    if B:
        layer.B.zero_()
    if moments:
        optimizer.state.clear()
    layer.merged = flag


def then(change, before=None, **parts):
    """The restart, and a change of it."""

    def answer(layer, optimizer):
        old = copy.deepcopy(layer)
        if before:
            before(layer, optimizer)
        rs(layer, optimizer, **parts)
        with torch.no_grad():
            change(layer, optimizer, old)

    return answer


def new_parameters(layer):
    with torch.no_grad():
        layer.base_layer.weight += layer.delta_weight()
    layer.A = nn.Parameter(torch.randn_like(layer.A))
    layer.B = nn.Parameter(torch.zeros_like(layer.B))


fresh.wrong("nothing", lambda layer, optimizer: None)
fresh.wrong("no merge", lambda layer, o: rs(layer, o, merge=False))
fresh.wrong("no scale", lambda layer, o: rs(layer, o, scale=False))
fresh.wrong("B stays", lambda layer, o: rs(layer, o, B=False))
fresh.wrong("A stays", lambda layer, o: rs(layer, o, A=False))
fresh.wrong("moments stay", lambda layer, o: rs(layer, o, moments=False))
fresh.wrong("merged set", lambda layer, o: rs(layer, o, flag=True))
fresh.wrong("both zero", then(lambda layer, o, old: layer.A.zero_()))
fresh.wrong("B random too", then(lambda layer, o, old: layer.B.normal_()))
fresh.wrong("B 1e-9", then(lambda layer, o, old: layer.B.fill_(1e-9)))
fresh.wrong("B NaN", then(lambda layer, o, old: layer.B.fill_(math.nan)))
fresh.wrong(
    "factors before merge", then(lambda *_: None, before=lambda layer, o: layer.B.data.zero_())
)
fresh.wrong(
    "merged twice", then(lambda layer, o, old: layer.base_layer.weight.add_(old.delta_weight()))
)
fresh.wrong("only gradients cleared", then(lambda layer, o, old: o.zero_grad(), moments=False))
fresh.wrong(
    "only exp_avg zeroed",
    then(lambda layer, o, old: [s["exp_avg"].zero_() for s in o.state.values()], moments=False),
)
fresh.wrong(
    "the step count stays",
    then(
        lambda layer, o, old: [
            s[k].zero_() for s in o.state.values() for k in ("exp_avg", "exp_avg_sq")
        ],
        moments=False,
    ),
)
fresh.wrong("A's moments only", then(lambda layer, o, old: o.state.pop(layer.A), moments=False))
fresh.wrong("optimizer.state = {}", then(lambda layer, o, old: setattr(o, "state", {})))
fresh.wrong(
    "a weight that is unfrozen",
    lambda layer, o: (
        setattr(
            layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight + layer.delta_weight())
        ),
        rs(layer, o, merge=False),
    )[0],
)
fresh.wrong("all require gradients", then(lambda layer, o, old: layer.requires_grad_(True)))
fresh.wrong("A frozen", then(lambda layer, o, old: layer.A.requires_grad_(False)))
fresh.wrong("A constant", then(lambda layer, o, old: layer.A.fill_(0.1)))
fresh.wrong(
    "A of one row", then(lambda layer, o, old: layer.A.copy_(layer.A[:1].expand_as(layer.A)))
)
fresh.wrong("A halved", then(lambda layer, o, old: layer.A.copy_(old.A / 2)))
fresh.wrong(
    "A's rows in another order", then(lambda layer, o, old: layer.A.copy_(old.A.roll(1, 0)))
)
fresh.wrong(
    "A and some noise",
    then(lambda layer, o, old: layer.A.copy_(old.A + 1e-3 * torch.randn_like(old.A))),
)
fresh.wrong("one row of A drawn", then(lambda layer, o, old: layer.A[1:].copy_(old.A[1:])))
fresh.wrong(
    "A in 16 bits", then(lambda layer, o, old: setattr(layer.A, "data", layer.A.data.half()))
)
fresh.wrong(
    "the bias takes something",
    then(
        lambda layer, o, old: (
            layer.base_layer.bias.add_(1) if layer.base_layer.bias is not None else layer.B.fill_(1)
        )
    ),
)
fresh.wrong(
    "settings of another optimiser", then(lambda layer, o, old: o.__init__([layer.A, layer.B]))
)
fresh.wrong("the rate is set to 0", then(lambda layer, o, old: o.param_groups[0].update(lr=0.0)))
fresh.wrong(
    "the base in the optimiser",
    then(lambda layer, o, old: o.param_groups[0]["params"].append(layer.base_layer.weight)),
)
fresh.wrong(
    "unmerged again",
    then(lambda layer, o, old: layer.base_layer.weight.copy_(old.base_layer.weight)),
)
fresh.wrong("seeds torch", then(lambda *_: torch.manual_seed(0)))


@fresh.wrong("new parameters, optimiser not told")
def _(layer, optimizer):
    new_parameters(layer)
    optimizer.state.clear()


@fresh.wrong("a new optimiser that nobody sees")
def _(layer, optimizer):
    rs(layer, optimizer, moments=False)
    optimizer = torch.optim.AdamW([layer.A, layer.B], lr=0.1)


@fresh.wrong("new parameters in a group of their own")
def _(layer, optimizer):
    new_parameters(layer)
    optimizer.add_param_group({"params": [layer.A, layer.B]})


@fresh.wrong("new parameters appended, the old ones stay")
def _(layer, optimizer):
    new_parameters(layer)
    optimizer.param_groups[0]["params"] += [layer.A, layer.B]


fresh.right("as the solution", rs)
fresh.right("returns the layer", lambda layer, o: (rs(layer, o), layer)[1])
fresh.right("inference mode", torch.inference_mode()(lambda layer, o: rs(layer, o)))
fresh.right(
    "moments and steps zeroed",
    then(
        lambda layer, o, old: [v.zero_() for s in o.state.values() for v in s.values()],
        moments=False,
    ),
)
fresh.right(
    "state of each popped",
    then(lambda layer, o, old: [o.state.pop(p, None) for p in (layer.A, layer.B)], moments=False),
)
fresh.right(
    "a new defaultdict",
    then(lambda layer, o, old: setattr(o, "state", collections.defaultdict(dict)), moments=False),
)
fresh.right(
    "A from a normal", then(lambda layer, o, old: layer.A.normal_(std=layer.A.shape[1] ** -0.5))
)
fresh.right("A orthogonal", then(lambda layer, o, old: nn.init.orthogonal_(layer.A)))


@fresh.right("the package's merge, unset")
def _(layer, optimizer):
    layer.merge()
    layer.merged = False
    nn.init.kaiming_uniform_(layer.A, a=math.sqrt(5))
    nn.init.zeros_(layer.B)
    optimizer.state.clear()


@fresh.right("new parameters told")
def _(layer, optimizer):
    new_parameters(layer)
    optimizer.param_groups[0]["params"] = [layer.A, layer.B]
    optimizer.state.clear()


@fresh.right(".data")
def _(layer, optimizer):
    layer.base_layer.weight.data += layer.scaling * layer.B.data @ layer.A.data
    layer.A.data, layer.B.data = torch.randn_like(layer.A), torch.zeros_like(layer.B)
    optimizer.state.clear()


@fresh.right("the state_dict of a new optimiser")
def _(layer, optimizer):
    rs(layer, optimizer, moments=False)
    (group,) = optimizer.param_groups
    settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    new = torch.optim.AdamW([layer.A, layer.B], **settings)
    optimizer.load_state_dict(new.state_dict())


fresh.wrong("left in eval", then(lambda layer, o, old: layer.eval()))
fresh.wrong("a scale of 1", then(lambda layer, o, old: setattr(layer, "scaling", 1.0)))
fresh.wrong("switched off", then(lambda layer, o, old: setattr(layer, "enabled", False)))
fresh.wrong(
    "weight decay off", then(lambda layer, o, old: o.param_groups[0].update(weight_decay=0))
)
fresh.wrong(
    "the rate the optimiser began with",
    then(lambda layer, o, old: o.param_groups[0].update(lr=o.defaults["lr"])),
)
fresh.wrong(
    "as much of the old A as new",
    then(lambda layer, o, old: layer.A.copy_(old.A + 0.5 * torch.randn_like(old.A))),
)
fresh.right(
    "B drawn, A zero", then(lambda layer, o, old: (layer.B.normal_(std=0.1), layer.A.zero_()))
)


@fresh.wrong("a weight that is no parameter")
def _(layer, optimizer):
    weight = layer.base_layer.weight + layer.scaling * layer.B @ layer.A
    del layer.base_layer.weight
    layer.base_layer.weight = weight
    rs(layer, optimizer, merge=False)


for changed in ("5 * 0.5", "0.5 ** 5", "5", "0.5", "6 ** 0.5", "4 ** 0.5", "5 ** 1.5", "5 ** 0.0"):
    fresh.equivalent(
        f"5 ** 0.5 → {changed}", "a fresh A of another size is as independent of the old one"
    )
fresh.equivalent(
    "nn.init.kaiming_uniform_(layer.A, a=5 ** 0.5) → nn.init.kaiming_uniform_(layer.A)",
    "a fresh A of another size is as independent of the old one",
)
schedule.equivalent(
    "stages * length - warmup → warmup - stages * length",
    "a cosine is the same for minus the angle",
)
