"""The methods that PEFT has, each as an arm in transformers' own Trainer: (settings, seed) → a model about to be trained.

As near to the parameters of LoRA of rank `settings["r"]` on all linear layers as the form allows, and at its scale where the
form has one. What is LoRA in its form starts from the `A`s that the course's LoRA draws with the seed.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch
from peft import (
    BeftConfig,
    EvaConfig,
    LoHaConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.optim import AdamW, Optimizer
from transformers import PrinterCallback, Trainer

from lora_course.arguments import training_arguments
from lora_course.experiments.arms import Arm, base_of, config_of
from lora_course.experiments.methods import Settings, in_order, lora
from lora_course.injection import adapter_layers

OptimizerOf = Callable[[Any, float], Optimizer]
Begin = Callable[[datasets.Dataset], object]
ALL: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclasses.dataclass
class PeftArm(Arm):
    """An arm in transformers' own Trainer.

    optimizer: (model, learning rate) → what steps in AdamW's place.    begin: is given the rows before the first step.
    """

    optimizer: OptimizerOf | None = None
    begin: Begin | None = None


def in_trainer(
    settings: Settings, model: Any, optimizer: OptimizerOf | None = None, begin: Begin | None = None
) -> PeftArm:
    """A model of PEFT as an arm."""

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        if begin:
            begin(rows)
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(folder, **in_order(settings, learning_rate, seed))
            own = optimizer(model, learning_rate) if optimizer else None
            trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(own, None))
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    save = lambda _, folder: model.save_pretrained(folder)  # noqa: E731
    return PeftArm(model, fit=fit, save=save, optimizer=optimizer, begin=begin)


def from_loras_start(
    settings: Settings, seed: int, optimizer: OptimizerOf | None = None, **fields: Any
) -> PeftArm:
    """LoRA in PEFT, or what differs from it by fields of `LoraConfig` or by the optimiser: with `B` = 0 and the course's `A`."""
    drawn = {name: layer.A for name, layer in adapter_layers(lora(settings, seed).model).items()}
    config = config_of(settings["r"], settings["scaling"], task_type="CAUSAL_LM", **fields)
    model: Any = get_peft_model(base_of(settings), config)
    with torch.no_grad():
        for name, A in drawn.items():
            model.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(A)
    return in_trainer(settings, model, optimizer)


def lora_plus(settings: Settings, seed: int) -> PeftArm:
    """`B` at `settings["loraplus_lr_ratio"]` times the rate of `A`; the rate that is searched is that of `A`."""

    def optimizer(model: Any, learning_rate: float) -> Optimizer:
        ratio = settings["loraplus_lr_ratio"]
        return create_loraplus_optimizer(model, AdamW, lr=learning_rate, loraplus_lr_ratio=ratio)

    return from_loras_start(settings, seed, optimizer)


def lora_fa(settings: Settings, seed: int) -> PeftArm:
    """`A` frozen; `B`'s gradient is corrected for it. The served adapter has both, and so LoRA's size."""
    r, alpha = settings["r"], settings["scaling"] * settings["r"]

    def optimizer(model: Any, learning_rate: float) -> Optimizer:
        return create_lorafa_optimizer(model, r=r, lora_alpha=alpha, lr=learning_rate)

    arm = from_loras_start(settings, seed, optimizer)
    served = sum(p.numel() for p in arm.model.parameters() if p.requires_grad)
    arm.parameters = lambda model: served
    return arm


def drawn(settings: Settings, seed: int, config: PeftConfig) -> PeftArm:
    """With a start that PEFT draws with the seed, or computes from the weights."""
    model = base_of(settings)
    torch.manual_seed(seed)
    return in_trainer(settings, get_peft_model(model, config))


def decomposed(settings: Settings, seed: int, start: str) -> PeftArm:
    """LoRA that starts from a decomposition of each weight, which is taken off the base: "pissa" or "olora"."""
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_lora_weights": start}
    return drawn(settings, seed, config_of(settings["r"], settings["scaling"], **fields))


def eva(settings: Settings, seed: int) -> PeftArm:
    """`A` from the singular directions of each layer's inputs on the training rows, and ranks by them, r on average."""
    fields: dict[str, Any] = {"init_lora_weights": "eva", "eva_config": EvaConfig()}
    config = config_of(settings["r"], settings["scaling"], task_type="CAUSAL_LM", **fields)
    model: Any = get_peft_model(base_of(settings), config, low_cpu_mem_usage=True)

    def begin(rows: datasets.Dataset) -> None:
        batches = [{"input_ids": ids} for ids in rows[:]["input_ids"].split(settings["batch"])]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)

    return in_trainer(settings, model, begin=begin)


def oft(settings: Settings, seed: int) -> PeftArm:
    """Blocks of 4 r: an [out, in] layer has in (4 r − 1) / 2 numbers, LoRA r (in + out)."""
    return drawn(settings, seed, OFTConfig(oft_block_size=4 * settings["r"], **ALL))


def vera(settings: Settings, seed: int) -> PeftArm:
    """Far below LoRA's size: with as many numbers the shared frozen matrices would be many times the base."""
    return drawn(settings, seed, VeraConfig(r=settings["vera_r"], projection_prng_key=seed, **ALL))


def loha(settings: Settings, seed: int) -> PeftArm:
    """ΔW = s (B₁A₁) ∘ (B₂A₂): two pairs of half of LoRA's rank."""
    r = settings["r"] // 2
    return drawn(settings, seed, LoHaConfig(r=r, alpha=settings["scaling"] * r, **ALL))


def beft(settings: Settings, seed: int) -> PeftArm:
    """A bias for each output, and nothing else."""
    return drawn(settings, seed, BeftConfig(**ALL))
