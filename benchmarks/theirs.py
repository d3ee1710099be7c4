"""PEFT's arms: LoRA, DoRA, AdaLoRA and X-LoRA on the shared weights of a base."""

from __future__ import annotations

import copy
import itertools
import tempfile
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, XLoraConfig, get_peft_model
from torch import nn

from benchmarks.bases import config, randomized, sharing_weights
from benchmarks.step import Arm
from lora_course.export import export_peft
from lora_course.injection import inject

ADALORA = AdaLoraConfig(
    init_r=12, target_r=8, lora_alpha=24, tinit=1, tfinal=100, total_step=1000, orth_reg_weight=0.5,
    target_modules="all-linear", task_type="CAUSAL_LM",
)  # fmt: skip


def lora(base: nn.Module, common: dict[str, Any], r: int, **fields: Any) -> Arm:
    return Arm(get_peft_model(sharing_weights(base), config(r, **fields)), **common)


def adalora(base: nn.Module, common: dict[str, Any]) -> Arm:
    """Its loss holds the regulariser."""
    model = get_peft_model(sharing_weights(base), copy.deepcopy(ADALORA))
    steps = itertools.count(2)
    return Arm(model, after=lambda: model.base_model.update_and_allocate(next(steps)), **common)


def xlora(base: nn.Module, common: dict[str, Any], r: int, count: int) -> Arm:
    """Its experts are frozen, and it runs only where they are named "0", "1", …"""
    with tempfile.TemporaryDirectory() as folder:
        adapters = {}
        for i in range(count):
            plain = randomized(inject(sharing_weights(base), config(r)))
            adapters[str(i)] = str(export_peft(plain, Path(folder) / str(i)))
        bare = sharing_weights(base)
        bare.config = copy.deepcopy(bare.config)
        bare.config.use_cache = False
        settings = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=bare.config.hidden_size, adapters=adapters, layerwise_scalings=True,
        )  # fmt: skip
        return Arm(get_peft_model(bare, settings), **common)
