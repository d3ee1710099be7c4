"""The budget: triplets of all layers compete, and those that lose are masked and pruned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_course.adalora.layer import AdaLoRALinear, config_of
from lora_course.callbacks import ModelCallback
from lora_course.injection import layers_of
from lora_course.linears import check_not_sharded, whole, zero_where


class RankAllocator(ModelCallback):
    """Scores the triplets of a model after each step, and shrinks the number that is kept from init_r to target_r a layer.

    With w a weight, g its gradient, I = |w g|:

        Ī ← β₁ Ī + (1 − β₁) I  (sensitivity),    Ū ← β₂ Ū + (1 − β₂) |I − Ī|  (uncertainty),    s(w) = Ī Ū
        b(t) = b₁ + (b₀ − b₁) (1 − (t − tinit) / (total_step − tfinal − tinit))³     triplets in all layers together

    Step t = 1 … tinit: scores only. Until total_step − tfinal: scores, and at each t divisible by deltaT the b(t) triplets of
    highest score keep their λ, while the others' is set to zero; they may come back at the next allocation. At
    t = total_step − tfinal the last choice is made: exactly b₁ = target_r · layers. From then on it is held, without scores.

    In a loop: `optimizer.step(); allocator.step(t); optimizer.zero_grad()`, t from 1 on. With a Trainer:
    `callbacks=[allocator]`, which does the same. All state is in the layers, so that a resumed run goes on as it was.

    Args:
        model: injected with `AdaLoRALinear`.

    Raises:
        ValueError: a model without AdaLoRA layers.
    """

    works_sharded = True

    def __init__(self, model: nn.Module) -> None:
        self.config = config_of(model)
        super().__init__(model)
        self.layers = layers_of(model, AdaLoRALinear)
        self.total_step = self.config.total_step or 0
        self.final = self.total_step - self.config.tfinal
        self.target = self.config.target_r * len(self.layers)

    def budget(self, t: int) -> int:
        """b(t): how many triplets are kept after step t, in all layers together."""
        c, initial = self.config, self.config.init_r * len(self.layers)
        left = 1 - (min(max(t, c.tinit), self.final) - c.tinit) / (self.final - c.tinit)
        return int((initial - self.target) * left**3 + self.target)

    @torch.no_grad()
    def step(self, t: int) -> dict[str, int] | None:
        """To be called after the optimiser's step t (the first is 1) and before the gradients are cleared.

        Returns:
            Where the budget was allocated at this step, the ranks by module; else None.

        Raises:
            ValueError: t < 1.    RuntimeError: there are no gradients, or no scores when they are needed.
        """
        if t < 1:
            raise ValueError(f"t={t}: steps are counted from 1, the optimiser's first.")
        if t < self.final:
            self._observe()
        chosen = None
        late = t > self.final and sum(kept_triplets(self.model).values()) > self.target
        if (
            t == self.final
            or late
            or (self.config.tinit < t < self.final and t % self.config.deltaT == 0)
        ):
            chosen = self._allocate(self.budget(t))
        if t >= self.final:
            for layer in self.layers.values():
                zero_where(layer.E, ~layer.mask[:, None])
                if chosen:
                    layer.forget()
        return chosen

    def _observe(self) -> None:
        """One update of the moving averages."""
        self._check_averages()
        owners = [(layer, name) for layer in self.layers.values() for name in "AEB"]
        parameters = [getattr(layer, name) for layer, name in owners]
        gradients = [whole(p.grad) for p in parameters if p.grad is not None]
        weights = [whole(parameter) for parameter in parameters]
        norm = nn.utils.get_total_norm(gradients)
        if len(gradients) < len(weights) or norm == 0:
            raise RuntimeError(
                "Importance is |weight · gradient|, and there are no gradients: call step(t) after backward() and before "
                "zero_grad(). A layer that takes no part in the loss belongs in exclude_modules."
            )
        if (
            not norm.isfinite()
        ):  # an overflow in fp16: such a step is skipped by the optimiser, and by us
            return
        sensitivity = [getattr(layer, f"sensitivity_{name}") for layer, name in owners]
        uncertainty = [getattr(layer, f"uncertainty_{name}") for layer, name in owners]
        importance = torch._foreach_mul(weights, gradients)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(sensitivity, importance, 1 - self.config.beta1)
        torch._foreach_sub_(importance, sensitivity)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(uncertainty, importance, 1 - self.config.beta2)

    def _check_averages(self) -> None:
        if any(layer.sensitivity_A.shape != layer.A.shape for layer in self.layers.values()):
            raise RuntimeError(
                "The last allocation of this adapter has been made, and its averages are gone: a second schedule needs a model injected "
                "anew. To train on with the ranks as they are, prune_triplets(model) and leave the allocator out."
            )

    def _allocate(self, budget: int) -> dict[str, int]:
        """Keeps the λ of the `budget` best triplets of all layers and sets the others to zero. Among equals the first win."""
        scores = [layer.scores() for layer in self.layers.values()]
        together = torch.cat([score.to(scores[0].device) for score in scores])
        if not together.any():
            raise RuntimeError(
                "The budget is due and no step has been scored: call step(t) for every t from 1 on."
            )
        keep = torch.zeros_like(together, dtype=torch.bool)
        keep[together.argsort(descending=True, stable=True)[:budget]] = True
        for layer, part in zip(
            self.layers.values(),
            keep.split([layer.r for layer in self.layers.values()]),
            strict=True,
        ):
            layer.mask.copy_(part)
            zero_where(layer.E, ~layer.mask[:, None])
        return kept_triplets(self.model)

    def on_train_begin(  # type: ignore[override]  # the trainer gives the model by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: object,
    ) -> None:
        """Raises ValueError for another model than the allocator's, or a run shorter than the schedule."""
        super().on_train_begin(args, state, control, model)
        if state.global_step + 1 < self.final:
            self._check_averages()
        if state.max_steps < self.total_step:
            raise ValueError(
                f"The run has {state.max_steps} steps and the schedule total_step={self.total_step}, so the budget "
                f"would not be reached: set total_step={state.max_steps} in AdaLoraConfig, or train longer."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """`step`, at the one point where the weights are new and the gradients still there; ranks go into the trainer's log."""
        if chosen := self.step(state.global_step + 1):
            log: list[Any] = state.log_history
            log.append({"step": state.global_step + 1, "ranks": chosen})


def kept_triplets(model: nn.Module) -> dict[str, int]:
    """How many triplets each module keeps."""
    layers = layers_of(model, AdaLoRALinear)
    return {name: int(layer.mask.sum()) for name, layer in layers.items()}


@torch.no_grad()
def prune_triplets(model: nn.Module) -> nn.Module:
    """Take the masked triplets out for good, in place: fewer parameters, the same function; a layer may end with rank 0.

    The parameters are new ones, so an optimiser that knew the old ones has to be made anew. `export_peft` then writes a
    plain LoRA adapter of these ranks.

    Raises:
        ValueError: more triplets are left than the target, or a masked one is in use. Nothing is changed then.
    """
    check_not_sharded(model, "pruning")
    config, layers = config_of(model), layers_of(model, AdaLoRALinear)
    kept, target = sum(kept_triplets(model).values()), config.target_r * len(layers)
    if kept > target:
        raise ValueError(
            f"{kept} triplets are kept and the target is {target}: the allocation has not run, or not to step "
            f"{(config.total_step or 0) - config.tfinal}. Train with callbacks=[RankAllocator(model)], or call its step(t) after each step."
        )
    if any(layer.E[~layer.mask].any() for layer in layers.values()):
        raise ValueError(
            "A masked λ is not zero: a step was taken without the allocator. Call allocator.step(t) after every step."
        )
    for layer in layers.values():
        keep = layer.mask
        layer.load_tensors(
            layer.tensors()
            | {"A": layer.A[keep], "E": layer.E[keep], "B": layer.B[:, keep], "mask": keep[keep]}
        )
    return model
