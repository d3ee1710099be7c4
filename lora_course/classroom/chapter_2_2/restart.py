"""Exercise 2.2-c: merge and restart."""

import copy
import math

import torch
from torch import nn

from lora_course.classroom.calls import Mistake
from lora_course.classroom.exercises import Draw, case, exercise, mistake


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
    A, B, base = layer.A.detach(), layer.B.detach(), layer.base_layer
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
        not (A.isfinite().all() and B.isfinite().all()),
        "There are NaN or infinite numbers in A or B.",
    )
    mistake(
        bool(A.any() and B.any()),
        "B is not zero, so the function jumps: the merged update is applied a second time, or something random is.",
    )
    mistake(
        not (A.any() or B.any()),
        "A and B are both zero: neither will ever get a gradient. Draw A afresh.",
    )
    mistake(
        untouched,
        "A is the old one: the next update would read the same directions again. Draw it afresh.",
    )
    mistake(
        A.shape != was.A.shape or B.shape != was.B.shape or {A.dtype, B.dtype} != {torch.float32},
        "The new factors must have the old ones' shapes and their type, float32.",
    )
    # usually A is drawn and B is zero; the other way round the layer starts as its base too
    drawn, old, kind = (A, was.A, "row of A") if A.any() else (B.T, was.B.T, "column of B")
    cosines = nn.functional.normalize(drawn, dim=1) @ nn.functional.normalize(old.detach(), dim=1).T
    mistake(
        bool((cosines.abs() > 0.7).any()),
        "A {} points where an old one did: all of them are to be drawn afresh.",
        kind,
    )
    rank = torch.linalg.svdvals(drawn / drawn.norm())
    mistake(
        bool(rank[-1] < 1e-3),
        "Each new {} is a multiple of another: draw them at random.",
        kind,
    )
    mistake(
        layer.merged,
        "layer.merged is set: the layer would leave its new factors out. The old ones are merged.",
    )
    mistake(
        layer.training != was.training or base.training != was.base_layer.training,
        "The layer is in train or eval mode, as it was not before: leave that as it was.",
    )
    kept = ("scaling", "enabled", "r", "lora_alpha", "use_rslora")
    other = [name for name in kept if getattr(layer, name, None) != getattr(was, name)]
    mistake(bool(other), "`layer.{}` has changed: the layer keeps its settings.", *other[:1])
    mistake(
        not isinstance(base.weight, nn.Parameter),
        "The base's weight is no nn.Parameter any more: it would be missing when the model is saved.",
    )
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
    for place, arguments in enumerate(({}, {"use_rslora": True}, {"bias": False})):
        # in so many dimensions no new row is like an old one
        inputs, outputs = draw.sizes(2, 40, 56)
        r = draw.integer(3, 5)
        # never a scale of 1, with rsLoRA neither: there "the scale is missing" would be right
        alpha = draw.choice([a for a in range(3, 30) if a not in (r, 2 * r, r * r)])
        layer = draw.lora(inputs, outputs, r, lora_alpha=alpha, **arguments)
        rate = draw.number(0.01, 0.1)
        optimizer = torch.optim.AdamW([layer.A, layer.B], lr=2 * rate, weight_decay=0.02)
        x = draw.normal(6, inputs)
        for _ in range(3):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        # as a schedule does: it is no longer the optimiser's default
        optimizer.param_groups[0]["lr"] = rate
        layer.train(place != 1)
        note = {"layer": copy.deepcopy(layer), "x": x, "settings": _settings(optimizer)}
        yield case(layer, optimizer, note=note)
