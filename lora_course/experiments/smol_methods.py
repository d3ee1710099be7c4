"""What the studies on SmolLM2-135M train: each method as an arm, at the scale and the number of parameters of LoRA of rank 8."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from transformers import PrinterCallback, Trainer

from lora_course import progressive
from lora_course.adalora import (
    AdaLoRALinear,
    RankAllocator,
    kept_triplets,
    prune_triplets,
    regularizer,
)
from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
from lora_course.arguments import training_arguments
from lora_course.experiments.arms import Arm, adapted, base_of, config_of
from lora_course.hierarchical import NestedLoRALinear
from lora_course.injection import adapter_layers, inject
from lora_course.lab import study
from lora_course.qlora import quantize_model
from lora_course.quantized import QuantizedLoRALinear
from lora_course.sparse import (
    GatedLoRALinear,
    GateSparsity,
    SparseDeltaLinear,
    open_gates,
    prune_gates,
)

Settings = Mapping[str, Any]


def lora(settings: Settings, seed: int, r: int | None = None) -> Arm:
    return Arm(adapted(settings, seed, config_of(r or settings["r"])))


def qlora(settings: Settings, seed: int) -> Arm:
    """LoRA on the base in NF4 with double quantisation."""
    model = quantize_model(base_of(settings))
    torch.manual_seed(seed)
    return Arm(inject(model, config_of(settings["r"])))


def in_peft(settings: Settings, seed: int, **fields: Any) -> Arm:
    """PEFT's layer in transformers' Trainer, starting from the `A`s that the course's LoRA draws with this seed."""
    drawn = {name: layer.A for name, layer in adapter_layers(lora(settings, seed).model).items()}
    config = config_of(settings["r"], task_type="CAUSAL_LM", **fields)
    model: Any = get_peft_model(base_of(settings), config)
    with torch.no_grad():
        for name, A in drawn.items():
            model.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(A)

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(folder, **recipe(settings, learning_rate, seed))
            trainer = Trainer(model, arguments, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return Arm(model, fit=fit)


def recipe(settings: Settings, learning_rate: float, seed: int) -> dict[str, Any]:
    """Fields of `TrainingArguments`: those of `lab.study.fit`, and the rows in the order in which they come."""
    return {
        "learning_rate": learning_rate, "seed": seed, "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["batch"], "warmup_steps": 0.1, "lr_scheduler_type": "linear",
        "save_strategy": "no", "train_sampling_strategy": "sequential", "disable_tqdm": True,
    }  # fmt: skip


def adalora(settings: Settings, seed: int) -> Arm:
    """From 1.5 r triplets a layer down to r on average, within the first third to two thirds of the steps."""
    r, steps = settings["r"], settings["steps"]
    config = AdaLoraConfig(
        init_r=r * 3 // 2, target_r=r, lora_alpha=3 * r, target_modules="all-linear", orth_reg_weight=0.5,
        tinit=steps // 10, tfinal=steps // 3, deltaT=2, total_step=steps,
    )  # fmt: skip
    model = adapted(settings, seed, config, layer=AdaLoRALinear)

    def finish(model: nn.Module) -> dict[str, Any]:
        prune_triplets(model)
        return {"ranks": spread(kept_triplets(model))}

    return Arm(model, [RankAllocator(model)], regularizer, finish=finish)


def gates(settings: Settings, seed: int) -> Arm:
    """From 1.5 r components a layer down to about r. All steps together take `settings["gate_threshold"]` off a gate, at every
    rate alike: of gates drawn from N(0, 1) a third lies within 0.43 of zero."""
    model = adapted(settings, seed, config_of(settings["r"] * 3 // 2), layer=GatedLoRALinear)

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        fields = recipe(settings, learning_rate, seed)
        steps, batch = fields.pop("max_steps"), fields.pop("per_device_train_batch_size")
        penalty = settings["gate_threshold"] / (
            learning_rate * steps / 2
        )  # a schedule's mean is 1/2
        sparsity = GateSparsity(model, penalty)
        return study.fit(model, rows, steps=steps, batch=batch, callbacks=[sparsity], **fields)

    def finish(model: nn.Module) -> dict[str, Any]:
        prune_gates(model)
        return {"ranks": spread(open_gates(model))}

    return Arm(model, fit=fit, finish=finish)


def adaptive(settings: Settings, seed: int) -> Arm:
    """From r/4 up to r on average: half of the layers by two ranks at a time, from a fifth of the steps on."""
    r, steps = settings["r"], settings["steps"]
    model = adapted(settings, seed, config_of(r // 4), layer=GrowingLoRALinear)
    layers = adapter_layers(model)
    schedule = GrowthSchedule(
        len(layers) * r, start=steps // 5, every=steps // 10, top=len(layers) // 2, add=2, max_r=2 * r, seed=seed
    )  # fmt: skip

    def finish(model: nn.Module) -> dict[str, Any]:
        return {"ranks": spread({name: layer.r for name, layer in adapter_layers(model).items()})}

    return Arm(model, [RankGrower(model, schedule)], finish=finish)


def staged(settings: Settings, seed: int) -> Arm:
    """Two stages of half the rank and half the steps, the first frozen under the second."""
    model, stages = base_of(settings), 2
    steps, share = settings["steps"] // stages, settings["steps"] * settings["batch"] // stages

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        stage = progressive.Stage(
            settings["r"] // stages, "all-linear", learning_rate, steps, warmup=0.1
        )
        common = {
            key: value
            for key, value in recipe(settings, learning_rate, seed).items()
            if key not in progressive.SET_BY_STAGES
        }
        parts = [rows.select(range(k * share, (k + 1) * share)) for k in range(stages)]
        with tempfile.TemporaryDirectory() as folder:
            results = progressive.train_stages(
                model, [stage] * stages, parts, folder, scaling=2.0, seed=seed, **common
            )
        return [entry["loss"] for result in results for entry in result["history"]]

    def parameters(model: nn.Module) -> int:
        pairs = [layer.factors() for layer in adapter_layers(model).values()]
        return sum(A.numel() + B.numel() for A, B, _ in pairs)

    return Arm(model, fit=fit, parameters=parameters)


def delta(settings: Settings, seed: int) -> Arm:
    """As many single weights of ΔW as LoRA has numbers, at random places."""
    return Arm(adapted(settings, seed, config_of(settings["r"]), layer=SparseDeltaLinear))


def nested(settings: Settings, seed: int) -> Arm:
    """Trained for the ranks r, r/2, r/4 and 1 at once."""
    return Arm(
        adapted(
            settings, seed, config_of(settings["r"]), layer=NestedLoRALinear, ranks=tuple(settings["cuts"]),
            weighting="matryoshka",
        )
    )  # fmt: skip


def quantized(settings: Settings, seed: int, bits: int) -> Arm:
    """Factors trained as they are stored, in few bits."""
    config = config_of(settings["r"])
    return Arm(adapted(settings, seed, config, layer=QuantizedLoRALinear, bits=bits))


METHODS: dict[str, Callable[[Settings, int], Arm]] = {
    "lora": lora,
    "qlora": qlora,
    "adalora": adalora,
    "lora-2": functools.partial(lora, r=2),
    "nested": nested,
    "factors-4bit": functools.partial(quantized, bits=4),
    "factors-2bit": functools.partial(quantized, bits=2),
    "gates": gates,
    "adaptive": adaptive,
    "progressive": staged,
    "delta": delta,
    "dora": functools.partial(in_peft, use_dora=True),
    "rslora": functools.partial(in_peft, use_rslora=True),
}


def spread(found: Mapping[str, int]) -> dict[str, float]:
    """The mean of the ranks in the layers, by the layer's name, and the smallest and the largest of all."""
    kinds: dict[str, list[int]] = {}
    for name, rank in found.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    means = {kind: round(sum(values) / len(values), 2) for kind, values in kinds.items()}
    return means | {"least": min(found.values()), "most": max(found.values())}
