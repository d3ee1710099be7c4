"""Checks of the exercises in chapter 2.2, progressive LoRA."""

import torch
from torch import nn

from lora_course.classroom.first_exercises import exercise, mistake
from lora_course.lora import LoRALinear


@exercise("2.2-a", points=1)
def check_jagged(learner):
    """`learner(step, stages, length, warmup)` → what the learning rate is multiplied by."""
    stages, length, warmup = 3, 10, 4
    steps = range(stages * length)
    right = lambda t, n, L, w: min(1, t % L / w) * min(1, (n * L - t) / (n * L - w))  # noqa: E731
    found = [learner(t, stages, length, warmup) for t in steps]
    same = lambda other: all(abs(a - b) < 1e-6 for a, b in zip(found, other))  # noqa: E731
    mistake(
        same([min(1, t / warmup) * min(1, (30 - t) / 26) for t in steps]),
        "It is warmed up once only: at the start of stages 1 and 2 it must be 0 again.",
    )
    mistake(
        same([min(1, t % length / warmup) for t in steps]),
        "The decay is missing: from the end of the first warm-up it falls to 0 at the run's last step.",
    )
    mistake(
        same(
            [
                min(1, t % length / warmup) * min(1, (length - t % length) / (length - warmup))
                for t in steps
            ]
        ),
        "Each stage decays to 0 by itself. One decay over the whole run is asked for.",
    )
    mistake(
        same([min(1, t % length / warmup, (30 - t) / 26) for t in steps]),
        "The smaller of warm-up and decay is taken: they are multiplied, so that a late stage rises to the decayed rate only at its end.",
    )
    mistake(
        found[0] != 0 or found[length] != 0,
        "The first step of a stage must have rate 0, yours has {:.3g} and {:.3g} at steps 0 and {}.",
        found[0],
        found[length],
        length,
    )
    worst = max(steps, key=lambda t: abs(found[t] - right(t, stages, length, warmup)))
    mistake(
        not same([right(t, stages, length, warmup) for t in steps]),
        "At step {} of three stages of 10 with 4 steps of warm-up it is {:.4g}, not {:.4g}.",
        worst,
        right(worst, stages, length, warmup),
        found[worst],
    )
    mistake(
        any(abs(learner(t, 2, 7, 2) - right(t, 2, 7, 2)) > 1e-6 for t in range(14)),
        "With two stages of 7 steps and 2 of warm-up it goes wrong: use the arguments.",
    )


@exercise("2.2-b", points=2)
def check_one_adapter(learner):
    """`learner(stages)` → `(A, B)` of the one adapter with scaling 1; `stages` is a list of `(A, B, scaling)`."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    stages = [(draw(r, 11), draw(5, r), s) for r, s in ((2, 0.5), (3, 2.0), (2, 1.5))]
    copies = [(A.clone(), B.clone(), s) for A, B, s in stages]
    delta = sum(s * B @ A for A, B, s in stages)
    found = learner(stages)
    mistake(
        any(
            not torch.equal(x, y)
            for one, two in zip(stages, copies)
            for x, y in zip(one[:2], two[:2])
        ),
        "Your function changed the stages it was given: work on copies.",
    )
    mistake(
        not isinstance(found, tuple | list)
        or len(found) != 2
        or not all(isinstance(t, torch.Tensor) for t in found),
        "Two tensors are expected: A and B.",
    )
    A, B = found
    mistake(
        A.shape == (5, 11) or B.shape == (5, 11),
        "One of them is the full [out, in] matrix: an adapter is two thin factors.",
    )
    mistake(
        A.ndim != 2
        or B.ndim != 2
        or A.shape[1] != 11
        or B.shape[0] != 5
        or A.shape[0] != B.shape[1],
        "A is {} and B is {}; A [r, 11] and B [5, r] are expected: stack A along its rows, B along its columns.",
        list(A.shape),
        list(B.shape),
    )
    close = lambda matrix: torch.allclose(B @ A, matrix, atol=1e-5)  # noqa: E731
    mistake(
        close(sum(B_ @ A_ for A_, B_, _ in stages)),
        "The stages' scales are missing: each goes into its own factors.",
    )
    mistake(
        close(sum(s * s * B_ @ A_ for A_, B_, s in stages)),
        "The scale is in A and in B: it must be in one of them.",
    )
    mistake(close(delta / len(stages)), "This is the mean of the updates; their sum is asked for.")
    mistake(
        A.shape[0] < 7,
        "Rank {} is less than the sum 2 + 3 + 2: what is added up before the product mixes one stage's B with another's A.",
        A.shape[0],
    )
    mistake(
        not close(delta),
        "B A is not the sum of the stages' updates; relative error {:.2g}.",
        ((B @ A - delta).norm() / delta.norm()).item(),
    )


@exercise("2.2-c", points=2, in_place=True)
def check_restart(learner):
    """`learner(layer, optimizer)` merges a trained `LoRALinear` into its base and starts it afresh, in place."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(7, 5), r=3, lora_alpha=6)
    nn.init.normal_(layer.B)
    optimizer = torch.optim.AdamW([layer.A, layer.B], lr=0.1, weight_decay=0)
    x = torch.randn(4, 7)
    layer(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    weight, delta, A = (
        layer.base_layer.weight.detach().clone(),
        layer.delta_weight().detach(),
        layer.A.detach().clone(),
    )
    before = layer(x).detach()
    learner(layer, optimizer)
    moved = layer.base_layer.weight.detach() - weight
    close = lambda a, b: torch.allclose(a, b, atol=1e-5)  # noqa: E731
    mistake(
        not moved.any() and torch.equal(layer.A, A),
        "Nothing has happened: the base weight and A are as they were.",
    )
    mistake(
        not moved.any(),
        "The update is in no weight any more: add scaling · B A to layer.base_layer.weight before the factors start afresh.",
    )
    mistake(
        close(moved, delta / 2),
        "The scale is missing: the layer's update is scaling · B A, and scaling is 2 here.",
    )
    mistake(
        not close(moved, delta),
        "The base weight moved by something else than ΔW; relative error {:.2g}.",
        ((moved - delta).norm() / delta.norm()).item(),
    )
    mistake(
        bool(layer.B.any()),
        "B is not zero, so that the function jumps: the merged update is applied a second time, or something random is.",
    )
    mistake(
        not layer.A.any(),
        "A and B are both zero: neither will ever get a gradient. A must be drawn afresh.",
    )
    mistake(
        torch.equal(layer.A, A),
        "A is the old one: the next update would read the same directions again. Draw it afresh.",
    )
    mistake(
        layer.merged,
        "layer.merged is set: the layer would leave its new factors out. What is merged are the old ones.",
    )
    mistake(
        not close(layer(x), before),
        "The layer's function has changed; largest difference {:.2g}.",
        (layer(x) - before).abs().max().item(),
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    mistake(
        id(layer.A) not in held or id(layer.B) not in held,
        "The optimiser does not hold the layer's parameters any more: write into them (copy_, zero_), or give it the new ones.",
    )
    mistake(
        any(
            t.any()
            for p in (layer.A, layer.B)
            for t in optimizer.state.get(p, {}).values()
            if torch.is_tensor(t) and t.ndim
        ),
        "The moments of the old factors are still there: the first step would go where they went.",
    )
    layer(x).square().mean().backward()
    mistake(
        layer.B.grad is None or not layer.B.grad.any(),
        "B gets no gradient after your restart: is it still a parameter that requires one?",
    )
