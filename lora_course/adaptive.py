"""Adaptive rank growth: start small, and give rank to the layers that turn out to matter while training goes on.

    ΔW = s · (B₀ A₀ + B₁ A₁ + … + B_K A_K),     s = α / r₀ for good;     a new A_k is random, a new B_k zero

A growth adds one pair to a layer. As B_k A_k = 0, the function is what it was; as A_k ≠ 0, the pair learns
(∂L/∂B_k = s · ∂L/∂y (A_k x)ᵀ). Dividing by the new rank, as α/r invites to, would shrink what was learnt by r/(r + k).

A pair is two tensors of its own. Old tensors, and what an optimiser keeps for them, are not touched by a bit; new ones
begin with no moments and a step count of 0. One larger tensor would share the old step count, and its state would have
to be cut and sewn, which that of 8-bit optimisers (blocks of 256, another type below 4,096 numbers) is not made for.

Where to grow follows IncreLoRA, arXiv 2308.12043: every so many steps the top few layers gain rank, by the smoothed
sensitivity of the *layer* times its uncertainty. Unlike its code, the scale is held, the budget is met exactly, and the
sensitivity comes from the factors' gradients, so that no `[out, in]` matrix is formed.

    inject(model, LoraConfig(r=2, lora_alpha=4, …), layer=GrowingLoRALinear)
    grower = RankGrower(model, GrowthSchedule(budget=8 * layers, start=50, every=10, top=8, max_r=16))
    AdapterTrainer(model, args, callbacks=[grower], …).train()

or, in a loop, `backward(); grower.observe(); optimizer.step(); grower.grow(optimizer, step); optimizer.zero_grad()`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_course.injection import adapter_layers
from lora_course.lora import AdapterState, LoRALinear, register


@register
class GrowingLoRALinear(LoRALinear):
    """A LoRA layer whose rank can grow: `y = base(x) + s · Σ_k B_k A_k dropout(x)`, s held at α/r₀ (or α/√r₀).

    It computes what the plain layer of its concatenated factors computes: however many pairs, two matrix products, and a
    copy of the factors for the time of a pass. Arguments are those of `LoRALinear`.

    Attributes:
        A, B, A1, B1, …: the pairs, `[r_k, in]` and `[out, r_k]`, in the order in which they came; r = Σ r_k.
        importance, uncertainty: the smoothed sensitivity Ī and its smoothed deviation Ū, scalars; see `observe`.
        grown_at: the step at which each later pair came, `[K]` int64. With the pairs' shapes it is the layer's whole
            history, and like the averages it is saved and loaded with the adapter.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        self.gaussian = init_lora_weights == "gaussian"
        self.register_buffer("importance", torch.zeros((), device=self.A.device))
        self.register_buffer("uncertainty", torch.zeros((), device=self.A.device))
        self.register_buffer("grown_at", torch.zeros(0, dtype=torch.int64, device=self.A.device))

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """`[(A, B), (A1, B1), …]`."""
        return [(getattr(self, a), getattr(self, b)) for a, b in _names(len(self.grown_at))]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """All pairs side by side: `A` `[r, in]`, `B` `[out, r]`, and s."""
        if len(self.grown_at) == 0:
            return self.A, self.B, self.scaling
        As, Bs = zip(*self.pairs, strict=True)
        return torch.cat(As), torch.cat(Bs, 1), self.scaling

    def grow(
        self, k: int, step: int, generator: torch.Generator | None = None
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Add a pair of rank `k`: `A` `[k, in]` drawn as the first one was, `B` `[out, k]` zero.

        Args:
            step: kept in `grown_at`.    generator: of the CPU, so that the draw is the same on every device.

        Returns:
            The new pair, which no optimiser knows yet: `RankGrower.grow` tells it.

        Raises:
            ValueError: k < 1, or more rank than any matrix of this shape has.    RuntimeError: the layer is merged.
        """
        room = min(self.in_features, self.out_features) - self.r
        if not 1 <= k <= room:
            raise ValueError(
                f"k={k}: a layer of rank {self.r} and shape {[self.out_features, self.in_features]} can gain 1 to {room}."
            )
        if self.merged:
            raise RuntimeError(f"This layer is {MERGED}")
        A = torch.empty(k, self.in_features)
        if self.gaussian:
            nn.init.normal_(A, std=1 / self.A.shape[0], generator=generator)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.grown_at = torch.cat([self.grown_at, self.grown_at.new_tensor([step])])
        self._set_pair(_names(len(self.grown_at))[-1], A, torch.zeros(self.out_features, k))
        self._count()
        return self.pairs[-1]

    @torch.no_grad()
    def sensitivity(self) -> Tensor:
        """I = Σᵢ |⟨ΔWᵢ, G⟩| / √(in · out), a scalar, with G = ∂L/∂ΔW, from the gradients that lie there.

        ΔWᵢ = s bᵢ aᵢ is the i-th part of rank one, and ⟨ΔWᵢ, G⟩, to first order, what the loss would change without it.
        As ∂L/∂B = s G Aᵀ, it is bᵢ · ∂L/∂bᵢ (and as well aᵢ · ∂L/∂aᵢ): G itself is not needed. For random factors and
        gradients it grows as √(in · out), by which large layers compare with small ones. The sum is the *layer's*; that
        of IncreLoRA, |ΔW ∘ G| over all elements, needs both matrices.

        Raises:
            RuntimeError: a pair has no gradient.
        """
        if any(B.grad is None for _, B in self.pairs):
            raise RuntimeError(
                "There is no gradient: call observe() after backward() and before zero_grad()."
            )
        parts = torch.cat([(B * B.grad).float().sum(0) for _, B in self.pairs])
        return parts.abs().sum() / math.sqrt(self.in_features * self.out_features)

    @torch.no_grad()
    def observe(self, beta: float) -> None:
        """Ī ← β Ī + (1 − β) I, then Ū ← β Ū + (1 − β) |I − Ī|. An I that overflowed, as fp16's may, is passed over."""
        sensitivity = self.sensitivity()
        finite = sensitivity.isfinite()  # used on the device: a GPU need not be waited for
        importance = torch.lerp(sensitivity, self.importance, beta)
        uncertainty = torch.lerp((sensitivity - importance).abs(), self.uncertainty, beta)
        self.importance.copy_(torch.where(finite, importance, self.importance))
        self.uncertainty.copy_(torch.where(finite, uncertainty, self.uncertainty))

    def load_tensors(self, tensors: AdapterState) -> None:
        """Take over `tensors`, with as many pairs as they have. If the number changes, optimisers have to be made anew."""
        wanted = _names(len(tensors["grown_at"]))
        for a, b in _names(len(self.grown_at))[len(wanted) :]:
            delattr(self, a), delattr(self, b)
        for names in wanted[len(self.grown_at) + 1 :]:
            self._set_pair(names, *(torch.empty_like(tensors[name]) for name in names))
        super().load_tensors(tensors)
        self._count()

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        """Raise ValueError unless `tensors` are of such a layer of this size; the number of pairs may be another."""
        names = _names(len(tensors.get("grown_at", ())))
        expected = {"scaling", "importance", "uncertainty", "grown_at"}.union(*names)
        if set(tensors) != expected:
            raise ValueError(
                f"The adapter holds {sorted(tensors)} for {name!r}, a {type(self).__name__} that grew {len(names) - 1} times keeps "
                f"{sorted(expected)}: it was made with another kind of layer. Inject that layer, or use factor_state() of its model."
            )
        for a, b in names:
            A, B = list(tensors[a].shape), list(tensors[b].shape)
            if [A[1:], B[:1], B[1:]] != [[self.in_features], [self.out_features], A[:1]]:
                raise ValueError(
                    f"The adapter's factors for {name!r} are {a} {A} and {b} {B}; this layer needs A [r, {self.in_features}] "
                    f"and B [{self.out_features}, r]: it was made for another base model."
                )

    def _set_pair(self, names: tuple[str, str], *factors: Tensor) -> None:
        for name, tensor in zip(names, factors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor.to(self.A), self.A.requires_grad))

    def _count(self) -> None:
        self.r = sum(A.shape[0] for A, _ in self.pairs)
        # the α with which a plain layer of this rank has the same scale
        self.lora_alpha = self.scaling * (math.sqrt(self.r) if self.use_rslora else self.r)


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
        if not 0 <= self.beta < 1:
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


class RankGrower(TrainerCallback):
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
        self.layers, self.schedule = growing_layers(model), schedule
        self.check()

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

    def observe(self) -> None:
        """Update every layer's averages from the gradients of one whole optimiser step: after its last `backward`, after
        unscaling and clipping if there is any, before `zero_grad`. Does nothing once the budget is spent.

        Raises:
            RuntimeError: there are no gradients.
        """
        if not self.finished:
            for layer in self.layers.values():
                layer.observe(self.schedule.beta)

    def scores(self) -> dict[str, float]:
        """Ī · Ū of each layer: how much it matters, times how little that has settled."""
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
                layer.grow(gains[name], step, generator)
                _introduce(layer, optimizer)
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

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Raises ValueError for more than one process, or a run that ends before the budget is spent."""
        if args.world_size > 1:
            raise ValueError(
                f"{args.world_size} processes: new pairs are unknown to DistributedDataParallel. Train in one process."
            )
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

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """`grow`, before a checkpoint of this step is written."""
        self.grow(optimizer, state.global_step)


def growing_layers(model: nn.Module) -> dict[str, GrowingLoRALinear]:
    """The layers of an injected model that can grow, by module name. Raises ValueError if there is none."""
    layers = adapter_layers(model)
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, GrowingLoRALinear)}
    if not layers:
        raise ValueError(
            "This model has no layer that can grow: inject(model, config, layer=GrowingLoRALinear)."
        )
    return layers


def rank_history(model: nn.Module) -> list[dict[str, Any]]:
    """`[{"step": 0, "ranks": {module: r₀, …}}, {"step": …, "ranks": …}, …]`, one entry a growth, as JSON can write it.

    Read off the layers, so it is whole after resuming and comes with every adapter that is loaded.
    """
    layers = growing_layers(model)
    births = {name: [0, *layer.grown_at.tolist()] for name, layer in layers.items()}
    sizes = {name: [A.shape[0] for A, _ in layer.pairs] for name, layer in layers.items()}

    def ranks(step: int) -> dict[str, int]:
        return {
            n: sum(r for r, born in zip(sizes[n], births[n], strict=True) if born <= step)
            for n in layers
        }

    return [{"step": step, "ranks": ranks(step)} for step in sorted(set().union(*births.values()))]


MERGED = "merged, so a new pair would get no gradient: call unmerge(model) before it grows."


def _names(growths: int) -> list[tuple[str, str]]:
    """The pairs' attributes. Without a dot, which in an adapter's state ends the module's name."""
    return [("A", "B"), *((f"A{k}", f"B{k}") for k in range(1, growths + 1))]


def _introduce(layer: GrowingLoRALinear, optimizer: Optimizer) -> None:
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
