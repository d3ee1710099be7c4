"""When and where ranks are handed out."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_course.adaptive.layer import MERGED, GrowingLoRALinear
from lora_course.callbacks import ModelCallback
from lora_course.injection import layers_of
from lora_course.processes import average_gradient


@dataclasses.dataclass(frozen=True)
class GrowthSchedule:
    """When ranks are handed out, and how many: known before training starts, whichever layers they will go to.

    After steps `start`, `start + every`, … it is `top · add` of them, the last time what is left, until the ranks of all
    layers sum up to `budget`, exactly.

    Args:
        budget: Σ r over all growing layers in the end.
        start: the first growth; until then layers are only observed. Wise: past the learning rate's warm-up, and several
            times 1/(1 − beta).
        every: steps from one growth to the next.    top: layers that grow at a time.    add: ranks for each of them.
        max_r: the most that a layer may have; None: as much as a matrix of its shape has, `min(in, out)`.
        beta: of both moving averages; IncreLoRA's is 0.85.
        seed: of the new `A`s. They have a generator of their own: growth changes neither dropout nor the data's order.

    Raises:
        ValueError: a field outside its range.
    """

    budget: int
    start: int
    every: int
    top: int
    add: int = 1
    max_r: int | None = None
    beta: float = 0.85
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name)
            for name in ("budget", "start", "every", "top", "add", "max_r")
        }
        for name, value in counts.items():
            if not (isinstance(value, int) and value >= 1) and (name, value) != ("max_r", None):
                raise ValueError(f"{name}={value!r}: a whole number of 1 or more is expected.")
        if not isinstance(self.beta, numbers.Real) or not 0 <= self.beta < 1:
            raise ValueError(
                f"beta={self.beta!r}: a number in [0, 1) is expected; 0 looks at the last step alone."
            )

    def due(self, step: int) -> bool:
        """Whether layers grow after the optimiser's step `step` (the first is 1), if budget is left."""
        return step >= self.start and (step - self.start) % self.every == 0

    def steps(self, total: int, after: int = 0) -> list[int]:
        """The steps later than `after` at which layers will grow whose ranks sum up to `total` now."""
        first = self.start + self.every * max(0, (after - self.start) // self.every + 1)
        count = math.ceil((self.budget - total) / (self.top * self.add))
        return [first + i * self.every for i in range(count)]


class RankGrower(ModelCallback):
    """Observes the layers of a model and makes the important ones grow, by a schedule.

    In a loop: `observe()` after each `backward`, `grow(optimizer, step)` after each `optimizer.step`. With a Trainer:
    `callbacks=[grower]`, which does the same. All that is known between two steps lies in the layers, and is saved with
    them: to go on in mid-growth, inject, load the adapter, make the optimiser, load its state, in this order, which is a
    Trainer's too.

    Args:
        model: injected with `layer=GrowingLoRALinear`.

    Raises:
        ValueError: no layer that can grow; one above `max_r`; a budget below the ranks that are there or above their room.
        RuntimeError: a merged layer.
    """

    def __init__(self, model: nn.Module, schedule: GrowthSchedule) -> None:
        super().__init__(model)
        self.schedule = schedule
        self.layers = layers_of(model, GrowingLoRALinear)
        self.averaging: list[Any] = []
        self.check()

    def settings(self) -> dict[str, Any]:
        """The schedule's fields."""
        return dataclasses.asdict(self.schedule)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer now."""
        return {name: layer.r for name, layer in self.layers.items()}

    @property
    def total(self) -> int:
        """Σ r now."""
        return sum(self.ranks.values())

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.total == self.schedule.budget

    def stopped(self) -> None:
        """The next training wraps the model anew, and knows all pairs."""
        for handle in filter(None, self.averaging):
            handle.remove()
        self.averaging = []

    def observe(self) -> None:
        """Update every layer's averages from the gradients of one whole optimiser step: after its last `backward`, after
        unscaling and clipping if there is any, before `zero_grad`. Does nothing once the budget is spent.

        Raises:
            RuntimeError: there are no gradients.
        """
        self.check_model()
        if not self.finished:
            for layer in self.layers.values():
                layer.observe(self.schedule.beta)

    def scores(self) -> dict[str, float]:
        """J̄ · Ū of each layer: how much it matters, times how little that has settled."""
        scores = [layer.importance * layer.uncertainty for layer in self.layers.values()]
        together = torch.stack(
            [score.to(scores[0].device) for score in scores]
        )  # a GPU is waited for once
        return dict(zip(self.layers, together.tolist(), strict=True))

    def plan(self) -> dict[str, int]:
        """What each layer would gain now: `add` for each of the `top` of highest score. What one has no room for goes to
        the next one, so that `top · add` ranks are handed out in any case, or all that are left."""
        scores = self.scores()
        order = sorted(
            self.layers, key=lambda name: -scores[name]
        )  # among equals the first in the model
        left = min(self.schedule.top * self.schedule.add, self.schedule.budget - self.total)
        gains = dict.fromkeys(order, 0)
        while left > 0:  # more than once only where fewer than `top` layers have room
            for name in order:
                room = self._limit(self.layers[name]) - self.layers[name].r - gains[name]
                gain = min(self.schedule.add, room, left)
                gains[name] += gain
                left -= gain
        return {name: gain for name, gain in gains.items() if gain}

    @torch.no_grad()
    def grow(self, optimizer: Optimizer, step: int) -> dict[str, int]:
        """If growth is due after the optimiser's step `step`, give each layer of `plan()` its pair.

        New tensors go to the parameter groups of the layer's first ones, so that they share its learning rate and
        schedulers go on; and in there to the place that they would have in an optimiser made from the grown model, so
        that the saved state of this one can be loaded into that one. The state itself is not touched.

        Args:
            optimizer: torch's, bitsandbytes', or one that accelerate has wrapped; it holds the layers' factors.
            step: optimiser steps done so far, counted on after resuming.

        Returns:
            The ranks gained, by layer; {} when no growth is due.

        Raises:
            ValueError: `optimizer` lacks a factor; `step` is not later than the last growth.
            RuntimeError: nothing was observed; a layer is merged. Nothing has changed then.
        """
        if self.finished or not self.schedule.due(step):
            return {}
        self.check(optimizer)
        last = max([0, *(at for layer in self.layers.values() for at in layer.grown_at.tolist())])
        if step <= last:
            raise ValueError(
                f"step={step}: layers grew at step {last}. After resuming, count on from the checkpoint's step."
            )
        if not any(self.scores().values()):
            raise RuntimeError(
                "No layer has any importance yet: call observe() after each backward(). The first steps show none, as B is zero."
            )
        gains = self.plan()
        generator = torch.Generator().manual_seed(1_000_000 * self.schedule.seed + step)
        for (
            name,
            layer,
        ) in self.layers.items():  # the generator's draws are dealt in the model's order
            if name in gains:
                pair = layer.grow(gains[name], step, generator)
                add_to_optimizer(layer, optimizer)
                self.averaging += [average_gradient(factor) for factor in pair]
        return gains

    def check(self, optimizer: Optimizer | None = None) -> None:
        """Raise, as the class does, if the layers can't grow by the schedule, or if `optimizer` lacks one of their factors."""
        limits = {name: self._limit(layer) for name, layer in self.layers.items()}
        groups = optimizer.param_groups if optimizer else []
        known = {id(parameter) for group in groups for parameter in group["params"]}
        for name, layer in self.layers.items():
            if layer.merged:
                raise RuntimeError(f"{name!r} is {MERGED}")
            if layer.r > limits[name]:
                raise ValueError(
                    f"{name!r} has rank {layer.r} and may have {limits[name]} at most: raise max_r, or start lower."
                )
            if optimizer and any(
                id(tensor) not in known for pair in layer.pairs for tensor in pair
            ):
                raise ValueError(
                    f"The optimiser does not hold the factors of {name!r}: give the one that trains this model, made after "
                    "its adapter was injected or loaded."
                )
        if not self.total <= self.schedule.budget <= sum(limits.values()):
            raise ValueError(
                f"budget={self.schedule.budget}: it counts the ranks of all {len(limits)} layers together, which are {self.total} now "
                f"and can become {sum(limits.values())} (max_r={self.schedule.max_r}). Give a number between the two."
            )

    def _limit(self, layer: GrowingLoRALinear) -> int:
        limit = min(layer.in_features, layer.out_features)
        return limit if self.schedule.max_r is None else min(limit, self.schedule.max_r)

    def on_train_begin(  # type: ignore[override]  # the trainer gives the optimiser by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Raises ValueError for another model, or a run that ends before the budget is spent."""
        super().on_train_begin(args, state, control, model)
        self.check(optimizer)
        steps = self.schedule.steps(self.total, after=state.global_step)
        if steps and steps[-1] >= state.max_steps:
            raise ValueError(
                f"The last growth would come after step {steps[-1]} and the run has {state.max_steps}: grow by more at a time "
                "(top, add), more often (every), or train longer."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """`observe`, where the gradients are whole and clipped."""
        self.observe()

    def on_step_end(  # type: ignore[override]  # the trainer gives the optimiser by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """`grow`, before a checkpoint of this step is written."""
        self.grow(optimizer, state.global_step)


def add_to_optimizer(layer: GrowingLoRALinear, optimizer: Optimizer) -> None:
    """Put the layer's last pair into the parameter groups of its first, behind the layer's other tensors there."""
    own = {id(tensor) for pair in layer.pairs for tensor in pair}
    for first, new in zip(layer.pairs[0], layer.pairs[-1], strict=True):
        for group in optimizer.param_groups:
            ids = [id(parameter) for parameter in group["params"]]
            if id(first) in ids:
                place = 1 + max(i for i, found in enumerate(ids) if found in own)
                group["params"].insert(place, new)
                if names := group.get("param_names"):
                    names.insert(place, f"{names[ids.index(id(first))]}{len(layer.grown_at)}")


def rank_history(model: nn.Module) -> list[dict[str, Any]]:
    """`[{"step": 0, "ranks": {module: r₀, …}}, {"step": …, "ranks": …}, …]`, one entry a growth, as JSON can write it.

    Read off the layers, so it is whole after resuming and comes with every adapter that is loaded.
    """
    layers = layers_of(model, GrowingLoRALinear)
    births = {name: [0, *layer.grown_at.tolist()] for name, layer in layers.items()}
    sizes = {name: [A.shape[0] for A, _ in layer.pairs] for name, layer in layers.items()}

    def ranks_at(step: int) -> dict[str, int]:
        return {
            n: sum(r for r, born in zip(sizes[n], births[n], strict=True) if born <= step)
            for n in layers
        }

    return [
        {"step": step, "ranks": ranks_at(step)} for step in sorted(set().union(*births.values()))
    ]
