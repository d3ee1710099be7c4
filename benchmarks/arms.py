"""The arms by their names: the base, plain LoRA in several states, and the course's layers; `theirs` has PEFT's."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn

from benchmarks import serving, theirs
from benchmarks.bases import NATIVE_BF16, base, batch_of, config, randomized, sharing_weights
from benchmarks.step import Arm
from lora_course import (
    adalora,
    adaptive,
    experts,
    fused,
    hierarchical,
    lora,
    progressive,
    quantized,
    sparse,
)
from lora_course.injection import adapter_layers, inject, merge, unload

LAYERS: dict[str, tuple[type[lora.LoRALinear], dict[str, Any]]] = {
    "LoRA": (lora.LoRALinear, {}),
    "fused LoRA": (fused.FusedLoRALinear, {}),
    "masked factors": (sparse.SparseLoRALinear, {"sparsity": 0.5}),
    "ΔW mask": (sparse.SparseDeltaLinear, {}),
    "nested": (hierarchical.NestedLoRALinear, {"weighting": "matryoshka"}),
    "4-bit factors": (quantized.QuantizedLoRALinear, {"bits": 4}),
    "experts": (experts.ExpertsLinear, {}),
}


def make(name: str, size: str, precision: str = "fp32", r: int = 8, count: int = 8) -> Arm:
    """An arm by its name, around the base. count: of experts, or of tasks in a batch."""
    rows, length = batch_of(size, precision)
    model = base(size, precision)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    common: dict[str, Any] = {"ids": ids, "autocast": precision != "fp32" and NATIVE_BF16}
    torch.manual_seed(2)
    if name in LAYERS:
        layer, arguments = LAYERS[name]
        arguments = {"num_experts": count} if name == "experts" else arguments
        return Arm(inject(sharing_weights(model), config(r), layer=layer, **arguments), **common)
    if name in CHANGED:
        return CHANGED[name](model, common, r)
    return {
        "base": lambda: Arm(sharing_weights(model), training=False, **common),
        "frozen base": lambda: frozen_base(model, common),
        "unmerged": lambda: Arm(trained_lora(sharing_weights(model), r), training=False, **common),
        "merged": lambda: Arm(merged(model, r), training=False, **common),
        "merged and unloaded": lambda: Arm(unload(merged(model, r)), training=False, **common),
        "frozen experts": lambda: frozen_experts(model, common, r, count),
        "AdaLoRA": lambda: adalora_arm(model, common),
        "PEFT LoRA": lambda: theirs.lora(model, common, r),
        "PEFT DoRA": lambda: theirs.lora(model, common, r, use_dora=True),
        "PEFT AdaLoRA": lambda: theirs.adalora(model, common),
        "X-LoRA": lambda: theirs.xlora(model, common, r, count),
        "tasks": lambda: serving.tasks(model, size, r, count),
        "PEFT tasks": lambda: serving.peft_tasks(model, size, r, count),
    }[name]()


def frozen_base(model: nn.Module, common: dict[str, Any]) -> Arm:
    """Forward and backward: what every adapter's step contains."""
    frozen = sharing_weights(model).requires_grad_(False)
    first = frozen.model.layers[0].self_attn
    for linear in (first.q_proj, first.k_proj, first.v_proj):
        # from here on down no gradient of an input is needed
        linear.register_forward_hook(lambda module, inputs, y: y.requires_grad_())
    return Arm(frozen, **common)


def trained_lora(model: nn.Module, r: int) -> nn.Module:
    return randomized(inject(model, config(r)))


def merged(model: nn.Module, r: int) -> nn.Module:
    """Into weights of its own."""
    return merge(trained_lora(copy.deepcopy(model), r))


def adalora_arm(model: nn.Module, common: dict[str, Any]) -> Arm:
    ours = inject(
        sharing_weights(model), copy.deepcopy(theirs.ADALORA), layer=adalora.AdaLoRALinear
    )
    allocator, steps = adalora.RankAllocator(ours), itertools.count(2)
    after = lambda: allocator.step(next(steps))  # noqa: E731
    return Arm(ours, auxiliary_loss=adalora.regularizer, after=after, **common)


def frozen_experts(model: nn.Module, common: dict[str, Any], r: int, count: int) -> Arm:
    how = {"layer": experts.ExpertsLinear, "num_experts": count}
    return Arm(experts.freeze_experts(inject(sharing_weights(model), config(r), **how)), **common)


def second_stage(model: nn.Module, common: dict[str, Any], r: int) -> Arm:
    """Progressive LoRA when half the rank is frozen."""
    half = max(1, r // 2)
    ours = inject(sharing_weights(model), config(half), layer=progressive.StackedLoRALinear)
    for layer in adapter_layers(ours).values():
        layer.freeze()
        layer.start(half)
    return Arm(ours, **common)


def grown_twice(model: nn.Module, common: dict[str, Any], r: int) -> Arm:
    ours = inject(sharing_weights(model), config(max(1, r // 2)), layer=adaptive.GrowingLoRALinear)
    for layer in adapter_layers(ours).values():
        for step in (1, 2):
            layer.grow(max(1, r // 4), step)
    return Arm(ours, **common)


def gates(model: nn.Module, common: dict[str, Any], r: int) -> Arm:
    ours = inject(sharing_weights(model), config(r), layer=sparse.GatedLoRALinear)
    sparsity = sparse.GateSparsity(ours, 1e-3)
    arm = Arm(ours, **common)
    arm.after = lambda: sparsity.step(arm.optimizer)
    return arm


CHANGED = {"progressive": second_stage, "adaptive": grown_twice, "gates": gates}
"""Arms that are more than a layer put into the base."""
