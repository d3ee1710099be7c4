"""Checks of the exercises in chapter 0.1, LoRA in one sitting."""

import math

import torch
from torch import nn

from lora_course.classroom.exercises import exercise, mistake
from lora_course.lora import LoRALinear


@exercise("0.1-a", points=1)
def check_alpha(learner):
    """`learner(new_r, r, lora_alpha, use_rslora=False)` → the new α."""
    close = lambda a, b: abs(a - b) < 1e-6  # noqa: E731
    found = learner(48, 8, 12)
    mistake(
        close(found, 12),
        "The old α: with it the scale falls from {:g} to {:g}, since it is divided by the new rank.",
        12 / 8,
        12 / 48,
    )
    mistake(
        close(found, 12 / 8),
        "This is the scale s = α/r; the α that gives it at the new rank is asked for.",
    )
    mistake(
        close(found, 12 * 8 / 48),
        "The wrong way round: a higher rank divides by more, so it needs a larger α.",
    )
    mistake(close(found, 96), "α = 2r is a habit, not this run: here α/r was {:g}, not 2.", 12 / 8)
    mistake(
        not close(found, 72),
        "From r = 8, α = 12 to r = 48 the scale α/r stays {:g} with α = 72, not {:g}.",
        12 / 8,
        found,
    )
    stabilised = learner(48, 8, 12, use_rslora=True)
    mistake(
        close(stabilised, 72),
        "`use_rslora=True` divides by √r: α then grows with √(new_r / r) only.",
    )
    mistake(
        close(stabilised, 12),
        "rsLoRA's scale still falls with the rank, by √r: α must grow to hold it.",
    )
    mistake(
        not close(stabilised, 12 * math.sqrt(6)),
        "With rsLoRA, from r = 8, α = 12 to r = 48, α/√r stays with α = {:.3f}, not {:g}.",
        12 * math.sqrt(6),
        stabilised,
    )
    mistake(
        not close(learner(3, 6, 5), 2.5),
        "From r = 6 to r = 3 with α = 5 the answer is 2.5: α may be a fraction.",
    )


@exercise("0.1-b", points=2)
def check_matching_rank(learner):
    """`learner(everywhere, targets, r)` → the rank, a whole number."""
    attention = [(256, 256), (256, 128), (256, 128), (256, 256)]
    mlp = [(256, 704), (256, 704), (704, 256)]
    everywhere = attention + mlp
    found = learner(everywhere, attention, 8)
    mistake(found == 8, "The same rank: on fewer layers it gives fewer parameters, not as many.")
    mistake(
        found == round(8 * sum(i * o for i, o in everywhere) / sum(i * o for i, o in attention)),
        "You counted in · out, the weights of the layers; an adapter has r · (in + out) parameters.",
    )
    mistake(
        found == round(8 * len(everywhere) / len(attention)),
        "You counted layers; they differ in size, and an adapter has r · (in + out) parameters on each.",
    )
    mistake(
        isinstance(found, float) and not found.is_integer(),
        "{:g} is no rank: a whole number is expected, the nearest.",
        found,
    )
    mistake(
        found == 20,
        "You round down: 8 · 4,672 parameters against 1,792 a rank are 20.9 ranks, so 21 is nearest.",
    )
    mistake(
        found != 21,
        "On nano's attention layers, rank 8 on all linear layers is matched by rank 21, not {}.",
        found,
    )
    mistake(
        learner(everywhere, everywhere[:1] * 9, 8) != 8,
        "You round up: 8 · 4,672 parameters against 4,608 a rank are 8.1 ranks, so 8 is nearest.",
    )
    mistake(
        learner([(10, 8)], [(10, 10)], 3) != 3,
        "3 · 18 parameters against 20 a rank are 2.7 ranks: 3 is nearest: round, from a half on upwards.",
    )
    mistake(
        learner([(4, 4)], [(400, 400)], 1) < 1,
        "A rank is 1 or more, also where even rank 1 has too many parameters.",
    )


@exercise("0.1-c", points=2)
def check_merged_linear(learner):
    """`learner(layer)` → an `nn.Linear` that computes what the layer computes."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(24, 40)
    for parameter in base.parameters():
        parameter.data.normal_(generator=generator)
    layer = LoRALinear(base, r=4, lora_alpha=12)
    layer.A.data.normal_(generator=generator)
    layer.B.data.normal_(generator=generator)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    delta = (layer.B @ layer.A).detach()
    found = learner(layer)
    mistake(
        not isinstance(found, nn.Linear),
        "An nn.Linear is expected, not a {}.",
        type(found).__name__,
    )
    changed = [name for name, p in layer.named_parameters() if not torch.equal(p, before[name])]
    mistake(
        bool(changed) or layer.merged,
        "Your function changed the layer it was given ({}): its update now counts twice. Work on a copy.",
        ", ".join(changed) or "merged",
    )
    mistake(found is layer.base_layer, "This is the layer's own base, not a new nn.Linear.")
    mistake(
        found.weight.shape != (40, 24),
        "The weight has shape {}; [40, 24] is expected, [out, in].",
        list(found.weight.shape),
    )
    close = lambda a, b: bool((a - b).norm() / b.norm() < 1e-4)  # noqa: E731
    weight = before["base_layer.weight"]
    mistake(close(found.weight, weight), "This is the base alone: the adapter's update is missing.")
    mistake(
        close(found.weight, weight + delta), "The scale is missing: the update is scaling · B A."
    )
    mistake(
        close(found.weight, weight + 12 * delta),
        "You multiplied by α; the scale is α / r, which the layer keeps in `scaling`.",
    )
    mistake(close(found.weight, 3 * delta), "This is the update alone: the base weight is missing.")
    mistake(
        not close(found.weight, weight + 3 * delta),
        "The weight is not W₀ + scaling · B A; relative error {:.2g}.",
        ((found.weight - weight - 3 * delta).norm() / weight.norm()).item(),
    )
    bias = before["base_layer.bias"]
    mistake(
        found.bias is None or not close(found.bias, bias),
        "The weight is right; the bias of the base layer is missing or another one.",
    )
