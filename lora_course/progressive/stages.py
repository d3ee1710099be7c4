"""Stages of a model: planned, begun, taken apart, measured."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from lora_course.injection import adapter_layers, inject, layers_of, unload
from lora_course.lora import AdapterState
from lora_course.progressive.layer import StackedLoRALinear
from lora_course.states import core_of, factor_state, split_state
from lora_course.targets import output_head


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage as data.

    Args:
        r: rank of the fresh factors, ≥ 1.
        target_modules: as in `LoraConfig`; a stage may have other targets than the one before.
        learning_rate: at the end of its warm-up, where the schedule has not decayed yet.
        steps: optimiser steps, ≥ 1.
        warmup: steps over which the learning rate rises from 0; below 1, a share of `steps`.

    Raises:
        ValueError: one of them out of its range.
    """

    r: int
    target_modules: str | Sequence[str] = "all-linear"
    learning_rate: float = 2e-4
    steps: int = 100
    warmup: float = 0.1

    def __post_init__(self) -> None:
        for name in ("r", "steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: a stage needs a whole number of 1 or more; leave an empty stage out."
                )
        if (
            not isinstance(self.learning_rate, numbers.Real)
            or not 0 < self.learning_rate < math.inf
        ):
            raise ValueError(
                f"learning_rate={self.learning_rate!r}: a stage needs a positive, finite rate; it starts from 0 by its warm-up anyway."
            )
        if not isinstance(self.warmup, numbers.Real) or not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"warmup={self.warmup!r}: a number of steps from 0 to {self.steps} is expected, or a share of them below 1."
            )
        for name in ("learning_rate", "warmup"):  # JSON knows no numbers of numpy
            object.__setattr__(self, name, float(getattr(self, name)))
        if not isinstance(self.target_modules, str):
            given: Any = self.target_modules
            if not isinstance(given, list | tuple | set) or not all(
                isinstance(n, str) for n in given
            ):
                raise TypeError(
                    f"target_modules={given!r}: 'all-linear', an expression or a list of names is expected."
                )
            object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules)))

    @property
    def warmup_steps(self) -> int:
        """The warm-up in whole steps, rounded up."""
        return math.ceil(self.warmup * self.steps if self.warmup < 1 else self.warmup)


def inject_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    scaling: float = 2.0,
    lora_dropout: float = 0.0,
    keep_original: bool = False,
) -> nn.Module:
    """Wrap every layer that some stage targets in an empty `StackedLoRALinear` (rank 0), in place; `begin_stage` is next.

    scaling: s = α/r, for all stages: a stage of rank r has α = s·r.
    Raises as `inject`, for the first stage that does not fit, before anything is changed.
    """
    targets: set[str] = set()
    for stage in stages:
        targets |= set(
            adapter_layers(inject(model, LoraConfig(r=1, target_modules=target_modules_of(stage))))
        )
        unload(model)
    config = LoraConfig(
        r=1,
        lora_alpha=scaling,  # type: ignore[arg-type]  # PEFT says int and takes any number
        lora_dropout=lora_dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
    )
    inject(model, config, StackedLoRALinear, keep_original=keep_original)
    for layer in layers_of(model, StackedLoRALinear).values():
        layer.start(0)
    return model


def begin_stage(model: nn.Module, stage: Stage, seed: int = 0) -> nn.Module:
    """Freeze what trained so far and give the stage's targets fresh factors, the same for the same seed.

    The function stays as it was, to rounding. Make a new optimiser afterwards: these are new parameters. In
    merge-and-restart call `merge(model)` before this one.

    Raises:
        ValueError: the model is not injected with `StackedLoRALinear`, or lacks the stage's targets.
    """
    layers = layers_of(model, StackedLoRALinear)
    probe = LoraConfig(target_modules=target_modules_of(stage))
    targets = {name for name in layers if check_target_module_exists(probe, name)}
    if str(stage.target_modules).lower() == "all-linear":
        head = output_head(model)
        targets = {name for name, layer in layers.items() if layer is not head}
    if not targets:
        raise ValueError(
            f"target_modules={stage.target_modules!r} matches no layer that inject_stages has prepared: give it all stages at once."
        )
    if any(layer.r for layer in layers.values()):
        for layer in layers.values():
            layer.freeze()
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        layer.start(stage.r if name in targets else 0, generator)
    return model


def stage_states(model: nn.Module) -> list[AdapterState]:
    """Each stage of a stacked `model` as a plain LoRA state, in order: to be weighed, left out or concatenated again."""
    states: list[AdapterState] = []
    for name, layer in layers_of(model, StackedLoRALinear).items():
        for index, (A, B) in enumerate(layer.stages()):
            if index == len(states):
                states.append({})
            if A.shape[0]:
                scaling = torch.tensor(layer.scaling, dtype=torch.float64)
                states[index] |= {
                    f"{name}.A": A.detach().clone(),
                    f"{name}.B": B.detach().clone(),
                    f"{name}.scaling": scaling,
                }
    return states


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """The singular values of each module's accumulated update ΔW, largest first: `[min(Σr, in, out)]`, in float64.

    From the factors: ΔW = s B A has those of R_B R_Aᵀ, where Q_B R_B = s B and Q_A R_A = Aᵀ. No `[out, in]` matrix is
    formed, and nothing is subtracted from a trained weight: what the base was does not matter.
    """
    values = {}
    for name, tensors in split_state(factor_state(model)).items():
        if tensors["A"].shape[0]:
            _, core, _ = core_of(tensors["A"], tensors["B"], float(tensors["scaling"]))
            values[name] = torch.linalg.svdvals(core)
    return values


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007): from 1 to their number."""
    shares = values[values > 0] / values.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def target_modules_of(stage: Stage) -> str | list[str]:
    return (
        stage.target_modules
        if isinstance(stage.target_modules, str)
        else list(stage.target_modules)
    )
