"""Gates on the ranks of an adapter, made sparse by proximal gradient descent, and pruned (SoRA, arXiv 2311.11696).

    ΔW = s · B diag(g) A,      after each step  g ← sign(g) · max(|g| − η λ, 0)

A rank is open as long as its gate is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_course.callbacks import ModelCallback
from lora_course.injection import layers_of
from lora_course.linears import check_not_sharded
from lora_course.lora import AdapterState, LoRALinear, register
from lora_course.runs import name_of


@register
class GatedLoRALinear(LoRALinear):
    """A frozen linear layer plus a gated update: `y = base(x) + scaling · B (g ∘ (A dropout(x)))`.

    A rank whose gate is zero takes no part. Its row of `A` and column of `B` then get no gradient; its gate does, so that it
    can open again. Arguments are those of `LoRALinear`, and:

    Args:
        gate_init: "normal" (standard normal, as in the code of arXiv 2311.11696) or "ones" (the layer starts as plain LoRA).

    Attributes:
        A: `[r, in]`.    gate: g, `[r]`.    B: `[out, r]`.    All fp32.
        scaling: s = α/r of the injection, whatever is pruned later.

    Raises:
        ValueError: another `gate_init`, and as `LoRALinear`.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        gate_init: str = "normal",
        **fields: Any,
    ) -> None:
        if gate_init not in ("normal", "ones"):
            raise ValueError(f"gate_init={gate_init!r}: 'normal' or 'ones' is expected.")
        super().__init__(base_layer, r, lora_alpha, **fields)
        gate = torch.ones if gate_init == "ones" else torch.randn
        self.gate = nn.Parameter(gate(r, device=self.A.device))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`(diag(g) A, B, scaling)`: the plain LoRA layer that computes the same update."""
        return self.gate[:, None] * self.A, self.B, self.scaling

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        super().check_tensors(name, tensors)
        r = tensors["A"].shape[0]
        if tensors["gate"].shape != (r,):
            raise ValueError(
                f"The adapter's gate for {name!r} is {list(tensors['gate'].shape)}; [{r}] is expected beside its A."
            )


class GateSparsity(ModelCallback):
    """Soft-thresholds the gates after each optimiser step: one step of proximal gradient descent on L + λ Σ|g|.

        g ← sign(g) · max(|g| − η λ, 0),      η: the learning rate of this step

    With Adam one step moves a gate by no more than about η. So λ is compared with a number of about 1, whatever the size of
    the gradient: λ ≪ 1 takes gates whose gradient has no steady sign, and from λ ≈ 1 on every gate goes, sooner or later.

    In a loop: `optimizer.step(); sparsity.step(optimizer, t)`, t from 1 on. With a Trainer: `callbacks=[sparsity]`, which does
    the same. There is no state, so a resumed run goes on as it was.

    Args:
        model: injected with `GatedLoRALinear`.
        penalty: λ ≥ 0, or a function of the step t that gives it, such as a ramp.

    Raises:
        ValueError: a model without gates, a penalty that is negative or no number.
    """

    def __init__(self, model: nn.Module, penalty: float | Callable[[int], float]) -> None:
        layers_of(model, GatedLoRALinear)
        super().__init__(model)
        self.penalty = penalty
        self.penalty_at(1)

    def settings(self) -> dict[str, Any]:
        """The penalty, or what its function is called."""
        return {"penalty": name_of(self.penalty) if callable(self.penalty) else float(self.penalty)}

    def penalty_at(self, t: int) -> float:
        """λ at step t."""
        value = self.penalty(t) if callable(self.penalty) else self.penalty
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(
                f"penalty={value!r} at step {t}: λ must be a finite number of 0 or more."
            )
        return value

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, t: int = 1) -> int:
        """To be called after the optimiser's step t. Returns how many gates are open, in the whole model.

        A step that the optimiser skipped, after an overflow in fp16, is skipped here too.

        Raises:
            ValueError: the gates are not among the optimiser's parameters.
        """
        self.check_model()
        layers = layers_of(self.model, GatedLoRALinear)
        rates = {
            id(parameter): group["lr"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if missing := [name for name, layer in layers.items() if id(layer.gate) not in rates]:
            raise ValueError(
                f"The optimiser does not train the gate of {missing[0]!r} ({len(missing)} in all): make it from the parameters of "
                "this model, and anew after prune_gates(model)."
            )
        if not getattr(optimizer, "step_was_skipped", False):
            for layer in layers.values():
                layer.gate.copy_(
                    soft_threshold(layer.gate, float(rates[id(layer.gate)]) * self.penalty_at(t))
                )
        return sum(open_gates(self.model).values())

    def on_optimizer_step(  # type: ignore[override]  # the trainer gives the optimiser by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **_: object,
    ) -> None:
        """`step`, right after the optimiser's and before the scheduler changes the rate."""
        self.step(optimizer, state.global_step + 1)


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """sign(x) · max(|x| − threshold, 0), elementwise: the proximal operator of threshold · |x|. Zeros are exact."""
    return F.softshrink(x, threshold)


def open_gates(model: nn.Module) -> dict[str, int]:
    """How many gates are open in each module."""
    layers = layers_of(model, GatedLoRALinear)
    counts = torch.stack([(layer.gate != 0).sum().cpu() for layer in layers.values()])
    return dict(zip(layers, counts.tolist(), strict=True))


@torch.no_grad()
def prune_gates(model: nn.Module) -> nn.Module:
    """Take the ranks out whose gate is zero, in place: fewer parameters, the same function; a layer may end with rank 0.

    The parameters are new ones, so an optimiser that knew the old ones has to be made anew. `export_peft` then writes a
    plain LoRA adapter of these ranks.
    """
    check_not_sharded(model, "pruning")
    for layer in layers_of(model, GatedLoRALinear).values():
        is_open = layer.gate != 0
        layer.load_tensors(
            layer.tensors()
            | {"A": layer.A[is_open], "gate": layer.gate[is_open], "B": layer.B[:, is_open]}
        )
    return model
