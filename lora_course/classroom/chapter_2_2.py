"""Checks of the exercises in chapter 2.2, progressive LoRA."""

import copy
import math

import torch
from torch import nn

from lora_course.classroom.calls import Mistake
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def cosine(x):
    return (1 + math.cos(math.pi * x)) / 2


def jagged(
    step,
    stages,
    length,
    warmup,
    floor,
    *,
    again=True,
    start=None,
    end=None,
    shape=cosine,
    join=None,
    low=None,
):
    """ReLoRA's schedule, with each of its parts exchangeable for a mistake."""
    total = stages * length if end is None else end(stages, length, warmup)
    first = warmup if start is None else start
    warm = min(1, (step % length if again else step) / warmup)
    decay = shape(max(0, step - first) / (total - first))
    low = floor if low is None else low
    decay = low + (1 - low) * decay
    return warm * decay if join is None else join(warm, decay)


def _jagged(**other):
    return lambda step, stages, length, warmup, floor: jagged(
        step, stages, length, warmup, floor, **other
    )


def _by_stage(step, stages, length, warmup, floor):
    return jagged(step % length, 1, length, warmup, floor)


JAGGED_MISTAKES = {
    "It is warmed up once only: at the start of every stage it must be 0 again.": _jagged(again=False),
    "The decay is missing.": _jagged(shape=lambda x: 1),
    "The warm-up is missing.": _jagged(join=lambda warm, decay: decay),
    "Each stage decays by itself. One decay over the whole run is asked for.": _by_stage,
    "The decay is a straight line; half a cosine is asked for.": _jagged(shape=lambda x: 1 - x),
    "The decay is a quarter of a cosine, which is steep at its end; half of one is flat at both.":
        _jagged(shape=lambda x: math.cos(math.pi * x / 2)),
    "The smaller of warm-up and decay is taken; they are multiplied.": _jagged(join=min),
    "The decay begins at step 0; it begins at the end of the first warm-up.": _jagged(start=0),
    "`floor` is not used: the decay ends at 0.": _jagged(low=0.0),
    "`floor` is where the rate is cut; the cosine itself ends there.":
        lambda step, stages, length, warmup, floor: min(1, step % length / warmup) * max(
            floor, jagged(step, stages, length, warmup, 0.0, join=lambda w, d: d)),
    "The rate never falls below `floor`, in the warm-ups either; a stage starts at 0.":
        lambda step, stages, length, warmup, floor: max(floor, jagged(step, stages, length, warmup, floor)),
    "The first step of a stage must have rate 0: `step` counts from 0.":
        lambda step, stages, length, warmup, floor: min(1, (step % length + 1) / warmup) * jagged(
            step, stages, length, warmup, floor, join=lambda w, d: d),
    "The decay is at `floor` one step too early: it gets there at step `stages * length`, after the last.":
        _jagged(end=lambda stages, length, warmup: stages * length - 1),
}  # fmt: skip


@exercise(
    "2.2-a",
    right=lambda step, stages, length, warmup, floor: jagged(step, stages, length, warmup, floor),
    mistakes=JAGGED_MISTAKES,
    otherwise="This is not the warm-up of the step's stage times the decay of the whole run.",
)
def check_jagged_cosine(draw: Draw):
    """ReLoRA's own schedule: warm-ups on a cosine that ends at a floor."""
    for round in range(3):
        stages, warmup, floor = draw.integer(2, 4), draw.integer(2, 6), draw.number(0.05, 0.5)
        if round == 2:
            stages, warmup, floor = 1, 1, 0.0
        length = warmup + draw.integer(8, 20)
        total = stages * length
        inside = draw.random.sample(range(warmup + 1, total), 4)
        again = [s * length + draw.integer(1, warmup) for s in range(1, stages)]
        for step in [*inside, *again, 0, (stages - 1) * length, draw.integer(0, warmup), total - 1]:
            hint = ""
            if step % length == 0:
                hint = "At the first step of a stage it goes wrong: its rate is 0."
            elif step < warmup:
                hint = "In the first warm-up it goes wrong: the decay is 1 there."
            yield case(step, stages, length, warmup, floor, hint=hint)


def one_adapter(stages, scaling):
    A = torch.cat([A for A, _, _ in stages])
    return A, torch.cat([s / scaling * B for _, B, s in stages], dim=1)


def _use_adapter(found, stages, scaling):
    """ΔW of the adapter that was returned."""
    mistake(
        not isinstance(found, (tuple, list)) or len(found) != 2,
        "Two tensors are expected: A and B.",
    )
    A, B = (torch.as_tensor(t).detach().double() for t in found)
    outputs, inputs = len(stages[0][1]), stages[0][0].shape[1]
    ranks = [len(A) for A, _, _ in stages]
    full = (outputs, inputs)
    mistake(
        tuple(A.shape) == full or tuple(B.shape) == full,
        "One of them is the full [out, in] matrix: an adapter is two thin factors.",
    )
    mistake(
        A.ndim == 2 and 0 < len(A) < sum(ranks) and B.shape == (outputs, len(A)),
        "Rank {} is less than the sum of {}: what is added up before the product mixes one stage's B with another's A.",
        len(A) if A.ndim else 0,
        ranks,
    )
    mistake(
        tuple(A.shape) != (sum(ranks), inputs) or tuple(B.shape) != (outputs, sum(ranks)),
        "A is {} and B is {}; [Σr, in] = {} and [out, Σr] = {} are expected: stack A along its rows, B along its columns.",
        list(A.shape), list(B.shape), [sum(ranks), inputs], [outputs, sum(ranks)],
    )  # fmt: skip
    return scaling * B @ A


def _stacked(a, b):
    """The scales that go into A and into B."""
    return lambda stages, scaling: (
        torch.cat([a(s, scaling, len(stages)) * A for A, _, s in stages]),
        torch.cat([b(s, scaling, len(stages)) * B for _, B, s in stages], dim=1),
    )


ADAPTER_MISTAKES = {
    "The stages' scales are missing: each goes into its own factors.": _stacked(lambda *_: 1, lambda s, t, n: 1 / t),
    "The factors are stacked as they are: the stages' scales, and the one of the adapter, are missing.":
        _stacked(lambda *_: 1, lambda *_: 1),
    "`scaling` is not used: the adapter is multiplied by it, so its factors must be divided by it.":
        _stacked(lambda *_: 1, lambda s, t, n: s),
    "`scaling` is multiplied into the factors; they must be divided by it.": _stacked(lambda *_: 1, lambda s, t, n: s * t),
    "The stages' scales are in A and in B: they must be in one of them.": _stacked(lambda s, t, n: s, lambda s, t, n: s / t),
    "A and B are both divided by `scaling`: once is enough.": _stacked(lambda s, t, n: 1 / t, lambda s, t, n: s / t),
    "This is the mean of the updates; their sum is asked for.": _stacked(lambda *_: 1, lambda s, t, n: s / t / n),
    "The stages' scales divide; they multiply.": _stacked(lambda *_: 1, lambda s, t, n: 1 / s / t),
}  # fmt: skip


@exercise(
    "2.2-b",
    points=2,
    right=one_adapter,
    look=_use_adapter,
    mistakes=ADAPTER_MISTAKES,
    otherwise="scaling · B A is not the sum of the stages' updates.",
)
def check_given_scaling(draw: Draw):
    """One adapter of a given scaling for several stages."""
    for number, hint in [
        (3, ""),
        (2, ""),
        (4, "With four stages it goes wrong."),
        (1, "With a single stage it goes wrong: its scale is not that of the adapter."),
        (3, "With equal ranks it goes wrong."),
    ]:
        inputs, outputs = draw.sizes(2, 60, 90)
        ranks = [3] * number if "equal" in hint else draw.sizes(number, 1, 6)
        stages = [
            (draw.normal(r, inputs), draw.normal(outputs, r), draw.number(0.3, 4)) for r in ranks
        ]
        # a dense [out, in] matrix is larger than all that the thin way needs
        largest = max(inputs, outputs) * sum(ranks)
        yield case(stages, draw.number(0.3, 4), hint=hint, largest=largest)


@torch.no_grad()
def restart(layer, optimizer):
    layer.base_layer.weight += layer.scaling * layer.B @ layer.A
    nn.init.kaiming_uniform_(layer.A, a=math.sqrt(5))
    layer.B.zero_()
    optimizer.state.clear()


def _settings(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def _use_restart(found, layer, optimizer, note):
    """Looks at weight, factors and optimiser, and takes a step with them."""
    was = note["layer"]
    x, moved = note["x"], (layer.base_layer.weight - was.base_layer.weight).detach().float()
    delta = was.delta_weight().detach()
    near = lambda a, b: bool((a - b).abs().max() <= 1e-4 * b.abs().max())  # noqa: E731
    A, B = layer.A.detach(), layer.B.detach()
    untouched = A.shape == was.A.shape and torch.equal(A, was.A)
    mistake(
        not moved.any() and untouched,
        "Nothing has happened: the base weight and A are as they were.",
    )
    mistake(
        not moved.any(),
        "The update is in no weight any more: add scaling · B A to layer.base_layer.weight before the factors start afresh.",
    )
    mistake(
        near(moved, delta / was.scaling),
        "The scale is missing: the layer's update is scaling · B A.",
    )
    mistake(near(moved, 2 * delta), "The update was merged twice.")
    mistake(not near(moved, delta), "The base weight moved by something else than ΔW.")
    mistake(
        was.base_layer.bias is not None
        and not torch.equal(layer.base_layer.bias, was.base_layer.bias),
        "The base's bias has changed; it is no part of the update.",
    )
    mistake(
        bool(B.any()) or not B.isfinite().all(),
        "B is not zero, so the function jumps: the merged update is applied a second time, or something random is.",
    )
    mistake(not A.any(), "A and B are both zero: neither will ever get a gradient. Draw A afresh.")
    mistake(
        untouched,
        "A is the old one: the next update would read the same directions again. Draw it afresh.",
    )
    mistake(
        A.shape != was.A.shape or B.shape != was.B.shape or {A.dtype, B.dtype} != {torch.float32},
        "The new factors must have the old ones' shapes and their type, float32.",
    )
    cosines = nn.functional.normalize(A, dim=1) @ nn.functional.normalize(was.A.detach(), dim=1).T
    mistake(
        bool((cosines.abs() > 0.95).any()),
        "A row of A points where an old one did: all of A is to be drawn afresh.",
    )
    rank = torch.linalg.svdvals(A / A.norm())
    mistake(
        bool(rank[-1] < 1e-3), "Rows of the new A are multiples of each other: draw them at random."
    )
    mistake(
        layer.merged,
        "layer.merged is set: the layer would leave its new factors out. The old ones are merged.",
    )
    base = layer.base_layer
    mistake(
        any(p.requires_grad for p in base.parameters()),
        "The base requires gradients now: it stays frozen.",
    )
    mistake(
        not (layer.A.requires_grad and layer.B.requires_grad),
        "A factor requires no gradient any more: it would not be trained.",
    )
    mistake(not near(layer(x).detach(), was(x).detach()), "The layer's function has changed.")
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    mistake(
        id(layer.A) not in held or id(layer.B) not in held,
        "The optimiser does not hold the layer's parameters any more: write into them (copy_, zero_), or give it the new ones.",
    )
    mistake(
        len(held) != 2 or len(optimizer.param_groups) != 1,
        "The optimiser holds other parameters than A and B, or holds them twice.",
    )
    mistake(
        _settings(optimizer) != note["settings"],
        "The optimiser's settings have changed: learning rate, betas and weight decay stay as they were.",
    )
    mistake(
        any(
            bool(value.any())
            for p in (layer.A, layer.B)
            for key, value in optimizer.state.get(p, {}).items()
            if torch.is_tensor(value) and key != "step"
        ),
        "The moments of the old factors are still there: the first step would go where they went.",
    )
    _step_twice(layer, optimizer, x)


def _step_twice(layer, optimizer, x):
    """What a new AdamW does with such factors, and the given one does."""
    twin = copy.deepcopy(layer)
    (settings,) = _settings(optimizer)
    fresh = torch.optim.AdamW(
        [twin.A, twin.B], **{k: settings[k] for k in ("lr", "betas", "eps", "weight_decay")}
    )
    for one, its in ((layer, optimizer), (twin, fresh)):
        for _ in range(2):
            one.A.grad = one.B.grad = None
            one(x).square().mean().backward()
            try:
                its.step()
            except Exception as error:
                text = "The optimiser's next step stops: its state is not what torch expects of an optimiser."
                raise Mistake(text) from error
    mistake(
        not all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-6)
            for a, b in ((layer.A, twin.A), (layer.B, twin.B))
        ),
        "The optimiser's next steps are not those of a new one: it remembers something, the number of steps for instance.",
    )


@exercise(
    "2.2-c",
    points=2,
    right=restart,
    look=_use_restart,
    changes=("layer", "optimizer"),
    draws=True,
)
def check_restart(draw: Draw):
    """ReLoRA's restart, in place."""
    for arguments in ({}, {"use_rslora": True}, {"bias": False}):
        inputs, outputs = draw.sizes(
            2, 16, 28
        )  # in so many dimensions no new row is like an old one
        r = draw.integer(3, 5)
        alpha = draw.choice([a for a in range(2, 30) if a not in (r, 2 * r, r * r)])
        layer = draw.lora(inputs, outputs, r, lora_alpha=alpha, **arguments)
        rate = draw.number(0.01, 0.1)
        optimizer = torch.optim.AdamW([layer.A, layer.B], lr=rate, weight_decay=0)
        x = draw.normal(6, inputs)
        for _ in range(3):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        note = {"layer": copy.deepcopy(layer), "x": x, "settings": _settings(optimizer)}
        yield case(layer, optimizer, note=note)
