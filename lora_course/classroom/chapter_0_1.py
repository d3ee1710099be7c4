"""Checks of the exercises in chapter 0.1, LoRA in one sitting."""

import copy
import math
from typing import Any

import torch
from torch import nn

from lora_course.classroom.exercises import Draw, case, exercise, mistake


def alpha_for(new_r, r, lora_alpha, use_rslora=False):
    return lora_alpha * (math.sqrt(new_r / r) if use_rslora else new_r / r)


ALPHA_MISTAKES = {
    "This is the old α: with it the scale changes, since it is divided by another rank.":
        lambda new_r, r, lora_alpha, use_rslora=False: lora_alpha,
    "This is the scale s of the old run; the α that gives it at the new rank is asked for.":
        lambda new_r, r, lora_alpha, use_rslora=False: lora_alpha / (math.sqrt(r) if use_rslora else r),
    "The wrong way round: a higher rank divides by more, so it needs a larger α.":
        lambda new_r, r, lora_alpha, use_rslora=False: alpha_for(r, new_r, lora_alpha, use_rslora),
    "α = 2r is a habit, not this run: here α/r was something else.":
        lambda new_r, r, lora_alpha, use_rslora=False: 2 * new_r,
    "`use_rslora` is not used: with it the scale is divided by √r.":
        lambda new_r, r, lora_alpha, use_rslora=False: alpha_for(new_r, r, lora_alpha),
    "Both rules are turned round: `use_rslora=True` divides by √r, the default by r.":
        lambda new_r, r, lora_alpha, use_rslora=False: alpha_for(new_r, r, lora_alpha, not use_rslora),
    "The root is there always: without `use_rslora` the scale is divided by r itself.":
        lambda new_r, r, lora_alpha, use_rslora=False: alpha_for(new_r, r, lora_alpha, True),
    "With `use_rslora=True` the old α stays: rsLoRA's scale falls with the rank too, by √r.":
        lambda new_r, r, lora_alpha, use_rslora=False: (
            lora_alpha if use_rslora else alpha_for(new_r, r, lora_alpha)),
    "α is rounded to a whole number: it may be a fraction.": lambda *a, **k: round(alpha_for(*a, **k)),
}  # fmt: skip


@exercise(
    "0.1-a",
    right=alpha_for,
    mistakes=ALPHA_MISTAKES,
    otherwise="With your α the new run has another scale than the old one.",
)
def check_alpha(draw: Draw):
    """The new α of a run, under either rule."""
    for _ in range(3):
        r, new_r = sorted(draw.sizes(2, 2, 64))
        alpha = draw.integer(2, 64) + 0.5  # so that it is never 2r, nor a whole number
        hint = "With `use_rslora=True` your α gives another scale: it divides by √r."
        yield case(new_r, r, alpha)
        yield case(r, new_r, alpha, hint="For a smaller new rank your α gives another scale.")
        yield case(new_r, r, alpha, use_rslora=True, hint=hint)
        yield case(r, new_r, int(alpha), use_rslora=True, hint=hint)
    yield case(7, 7, 3, hint="With the same rank as before α stays as it is.")
    yield case(1, 24, 0.5, use_rslora=False, hint="A small α goes wrong: nothing is to be rounded.")


def parameters(layers):
    return sum(i + o for i, o in layers)


def ranks_that_fit(everywhere, targets, r):
    return r * parameters(everywhere) / parameters(targets)


def matching_rank(everywhere, targets, r):
    return max(1, round(ranks_that_fit(everywhere, targets, r)))


RANK_MISTAKES = {
    "This is the same rank: on other layers it gives another number of parameters.":
        lambda everywhere, targets, r: r,
    "You counted in · out, the weights of the layers; an adapter has r · (in + out) parameters.":
        lambda everywhere, targets, r: max(
            1, round(r * sum(i * o for i, o in everywhere) / sum(i * o for i, o in targets))),
    "You counted layers; they differ in size, and an adapter has r · (in + out) parameters on each.":
        lambda everywhere, targets, r: max(1, round(r * len(everywhere) / len(targets))),
    "The wrong way round: fewer layers need a higher rank.":
        lambda everywhere, targets, r: matching_rank(targets, everywhere, r),
    "A fraction is no rank: the nearest whole number is asked for.": ranks_that_fit,
    "You always round down; the next rank above may be nearer.":
        lambda everywhere, targets, r: max(1, math.floor(ranks_that_fit(everywhere, targets, r))),
    "You always round up; the next rank below may be nearer.":
        lambda everywhere, targets, r: max(1, math.ceil(ranks_that_fit(everywhere, targets, r))),
    "This is a number of parameters; the rank is asked for.":
        lambda everywhere, targets, r: r * parameters(everywhere),
    "A rank is 1 or more, also where even rank 1 has too many parameters.":
        lambda everywhere, targets, r: round(ranks_that_fit(everywhere, targets, r)),
}  # fmt: skip


@exercise(
    "0.1-b",
    points=2,
    right=matching_rank,
    mistakes=RANK_MISTAKES,
    otherwise="Another rank has a number of parameters that is nearer to that of the adapter on `everywhere`.",
)
def check_matching_rank(draw: Draw):
    """The rank on some layers that costs what a rank on others costs. No case is a tie."""
    for low, high in [(0.05, 0.3), (0.7, 0.95), (0.38, 0.47), (0.53, 0.62)] * 2:
        rest = -1.0
        while not low < rest < high:
            everywhere = [tuple(draw.sizes(2, 8, 400)) for _ in range(draw.integer(4, 7))]
            targets = everywhere[: draw.integer(1, 3)]
            r = draw.integer(2, 16)
            rest = ranks_that_fit(everywhere, targets, r) % 1
        yield case(everywhere, targets, r)
    yield case(everywhere, everywhere, 5, hint="On the very same layers the rank is the same.")
    few, wide = [(draw.integer(4, 6), 5)] * 2, [tuple(draw.sizes(2, 300, 400))]
    hint = "A rank is 1 or more, also where even rank 1 has too many parameters."
    yield case(few, wide, 1, hint=hint)
    pair = tuple(draw.sizes(2, 20, 40))
    yield case([pair] * 9, [pair] * 3, 4, hint="A layer that is listed twice counts twice.")
    small, large = [tuple(draw.sizes(2, 20, 40))] * 3, [tuple(draw.sizes(2, 60, 80))] * 4
    hint = "Where the targets are larger than `everywhere` it goes wrong: the rank may be below r."
    yield case(small, large, 16, hint=hint)
    many, one = [tuple(draw.sizes(2, 300, 400)) for _ in range(6)], [tuple(draw.sizes(2, 3, 6))]
    hint = "Where a very high rank is nearest it goes wrong: nothing bounds it but the number of parameters."
    yield case(many, one, 16, hint=hint)
    # between the geometric and the arithmetic mean of 1 and 2 parameters a rank
    hint = "The nearest *number* of parameters is asked for; yours is nearest as a ratio."
    yield case([(72, draw.integer(71, 75))], [(49, 51)], 1, hint=hint)


def merged_at(layer, strength):
    merged = copy.deepcopy(layer.base_layer)
    with torch.no_grad():
        merged.weight += strength * layer.scaling * layer.B @ layer.A
    return merged


def _with_weight(layer, weight):
    merged = copy.deepcopy(layer.base_layer)
    merged.weight.data = weight.detach().to(merged.weight.dtype)
    return merged


def _times(factor):
    """Merges B A with another factor than strength · scaling."""
    return lambda layer, strength: _with_weight(
        layer, layer.base_layer.weight + factor(layer, strength) * layer.B @ layer.A
    )


def _use_merged(found, layer, strength, note):
    """The weight of the layer that was returned, and what it makes of the inputs in `note`."""
    base = layer.base_layer
    mistake(found is base, "This is the layer's own base; a new nn.Linear is asked for.")
    kind = type(found).__name__
    mistake(
        not isinstance(found, nn.Linear),
        "An nn.Linear is expected; what you return is of type {}.",
        kind,
    )
    mistake(
        found.weight.shape != base.weight.shape,
        "The weight has shape {}; [out, in] is expected, {}.",
        list(found.weight.shape),
        list(base.weight.shape),
    )
    mistake(
        found.weight.dtype != base.weight.dtype,
        "The weight is {}; it must have the base's type, or the model's next layer stops.",
        str(found.weight.dtype).removeprefix("torch."),
    )
    mistake(base.bias is not None and found.bias is None, "The bias of the base layer is missing.")
    mistake(
        not isinstance(found.weight, nn.Parameter),
        "The weight is no nn.Parameter: it would be missing when the layer is saved.",
    )
    return [found.weight, found(note)]


MERGE_MISTAKES = {
    "This is the base alone: the adapter's update is missing.": _times(lambda layer, strength: 0),
    "The scale is missing: the update is scaling · B A.": _times(lambda layer, strength: strength),
    "You multiplied by α; the scale is what the layer keeps in `scaling`.":
        _times(lambda layer, strength: strength * layer.lora_alpha),
    "You divided α by r, which is not the scale under rsLoRA: the layer keeps it in `scaling`.":
        _times(lambda layer, strength: strength * layer.lora_alpha / layer.r),
    "`strength` is not used: the whole update is merged.": _times(lambda layer, strength: layer.scaling),
    "`strength` divides the update; it multiplies it.":
        _times(lambda layer, strength: layer.scaling / strength if strength else 0),
    "The update is subtracted.": _times(lambda layer, strength: -strength * layer.scaling),
    "Base and merged layer are mixed with their shares exchanged.":
        _times(lambda layer, strength: (1 - strength) * layer.scaling),
    "The base is scaled too: it stays whole, `strength` is for the update.":
        lambda layer, strength: _with_weight(
            layer, strength * (layer.base_layer.weight + layer.scaling * layer.B @ layer.A)),
    "This is the update alone: the base weight is missing.":
        lambda layer, strength: _with_weight(layer, strength * layer.scaling * layer.B @ layer.A),
}  # fmt: skip


@exercise(
    "0.1-c",
    points=2,
    right=merged_at,
    look=_use_merged,
    fresh=True,
    draws=True,
    mistakes=MERGE_MISTAKES,
    otherwise="Your layer's weight or bias is not that of a layer which computes what is asked for.",
)
def check_merged_at(draw: Draw):
    """A plain layer that computes the base with a share of its adapter."""
    cases: list[tuple[Any, ...]] = [
        (draw.number(0.2, 0.9), {}, ""),
        (
            draw.number(1.1, 3),
            {"use_rslora": True},
            "With an rsLoRA layer it goes wrong: see `scaling`.",
        ),
        (draw.number(0.2, 0.9), {"bias": False}, "With a base without a bias it goes wrong."),
        (
            draw.number(0.2, 0.9),
            {"lora_dropout": 0.5},
            "With dropout it goes wrong: it is not merged.",
        ),
        (-draw.number(0.2, 0.9), {}, "With a negative strength it goes wrong."),
        (0.0, {}, "With a strength of 0 it goes wrong: the base is asked for, in a new nn.Linear."),
        (1, {}, "With a strength of 1 it goes wrong."),
        (draw.number(1.1, 2), {"dtype": torch.float16}, "With a base in float16 it goes wrong."),
    ]
    for place, (strength, arguments, hint) in enumerate(cases):
        if place % 2 == 0:  # a shape comes twice, so that what was kept by shape shows
            inputs, outputs, r = draw.sizes(3, 2, 24)
        dtype = arguments.pop("dtype", torch.float32)
        layer = draw.lora(inputs, outputs, r, **arguments)
        layer.base_layer.to(dtype)
        layer.train(place != 1)  # with dropout it trains: there a random mask shows
        yield case(layer, strength, hint=hint, note=draw.normal(5, inputs).to(dtype))
