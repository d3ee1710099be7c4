"""The course's own methods, each as an arm: (settings, seed) → a model about to be trained, with its factors drawn.

Each ends with about as many parameters as LoRA of rank `settings["r"]` on all linear layers, at the scale `settings["scaling"]`,
after `settings["steps"]` steps. Those that PEFT has are in `peft_methods`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from peft import AdaLoraConfig, LoraConfig
from torch import nn

from lora_course import progressive
from lora_course.adalora import (
    AdaLoRALinear,
    RankAllocator,
    kept_triplets,
    prune_triplets,
    regularizer,
)
from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
from lora_course.experiments.arms import Arm, adapted, base_of, config_of, recipe
from lora_course.hierarchical import NestedLoRALinear
from lora_course.injection import adapter_layers, inject
from lora_course.lab import study
from lora_course.qlora import quantize_model
from lora_course.quantized import QuantizedLoRALinear, save_quantized
from lora_course.sparse import (
    GatedLoRALinear,
    GateSparsity,
    SparseDeltaLinear,
    open_gates,
    prune_gates,
)

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of a comparison.

    make: (settings, seed) → the arm.    chapter: where it is taught.
    note: what it has in another way than plain LoRA, as the table says it.
    """

    title: str
    make: Callable[[Settings, int], Arm]
    chapter: str
    note: str


def in_order(settings: Settings, learning_rate: float, seed: int) -> dict[str, Any]:
    """Fields of `TrainingArguments` that all methods share: the course's recipe, and the rows in the order they come."""
    return recipe(settings, learning_rate, seed, train_sampling_strategy="sequential")


def config(settings: Settings, r: int | None = None) -> LoraConfig:
    """On all linear layers, at the settings' scale, whatever the rank."""
    return config_of(r or settings["r"], settings["scaling"])


def lora(settings: Settings, seed: int, r: int | None = None) -> Arm:
    return Arm(adapted(settings, seed, config(settings, r)))


def qlora(settings: Settings, seed: int) -> Arm:
    """LoRA on the base in NF4 with double quantisation."""
    model = quantize_model(base_of(settings))
    torch.manual_seed(seed)
    return Arm(inject(model, config(settings)))


def adalora(settings: Settings, seed: int) -> Arm:
    """From 1.5 r triplets a layer down to r on average, within the first third to two thirds of the steps."""
    r, steps = settings["r"], settings["steps"]
    start = r * 3 // 2
    schedule = AdaLoraConfig(
        init_r=start, target_r=r, lora_alpha=settings["scaling"] * start, target_modules="all-linear", orth_reg_weight=0.5,
        tinit=steps // 10, tfinal=steps // 3, deltaT=2, total_step=steps,
    )  # fmt: skip
    model = adapted(settings, seed, schedule, layer=AdaLoRALinear)

    def finish(model: nn.Module) -> dict[str, Any]:
        prune_triplets(model)
        return {"ranks": rank_summary(kept_triplets(model))}

    return Arm(model, [RankAllocator(model)], regularizer, finish=finish)


def gates(settings: Settings, seed: int, penalty: float | None = None) -> Arm:
    """From 1.5 r components a layer down to about r; how many are left is for the training to say.

    penalty: of `GateSparsity`. By default such a one that all steps together take `settings["gate_threshold"]` off a gate, at
    every rate alike: of gates drawn from N(0, 1) a third lies within 0.43 of zero.
    """
    model = adapted(settings, seed, config(settings, settings["r"] * 3 // 2), layer=GatedLoRALinear)

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        fields = in_order(settings, learning_rate, seed)
        steps, batch = fields.pop("max_steps"), fields.pop("per_device_train_batch_size")
        moved = learning_rate * steps / 2  # a schedule's mean is 1/2
        sparsity = GateSparsity(model, penalty or settings["gate_threshold"] / moved)
        return study.fit(model, rows, steps=steps, batch=batch, callbacks=[sparsity], **fields)

    def finish(model: nn.Module) -> dict[str, Any]:
        prune_gates(model)
        return {"ranks": rank_summary(open_gates(model))}

    return Arm(model, fit=fit, finish=finish)


def adaptive(settings: Settings, seed: int) -> Arm:
    """From r/4 up to r on average: half of the layers by two ranks at a time, from a fifth of the steps on."""
    r, steps = settings["r"], settings["steps"]
    model = adapted(settings, seed, config(settings, r // 4), layer=GrowingLoRALinear)
    layers = adapter_layers(model)
    schedule = GrowthSchedule(
        len(layers) * r, start=steps // 5, every=steps // 10, top=len(layers) // 2, add=2, max_r=2 * r, seed=seed
    )  # fmt: skip

    def finish(model: nn.Module) -> dict[str, Any]:
        ranks = {name: layer.r for name, layer in adapter_layers(model).items()}
        return {"ranks": rank_summary(ranks)}

    return Arm(model, [RankGrower(model, schedule)], finish=finish)


def in_stages(settings: Settings, seed: int) -> Arm:
    """Two stages of half the rank and half the steps, the first frozen under the second."""
    model, stages = base_of(settings), 2
    steps, share = settings["steps"] // stages, settings["steps"] * settings["batch"] // stages

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        r, fields = settings["r"] // stages, in_order(settings, learning_rate, seed)
        plan = [progressive.Stage(r, "all-linear", learning_rate, steps, warmup=0.1)] * stages
        common = {key: fields[key] for key in fields if key not in progressive.SET_BY_STAGES}
        common |= {"scaling": settings["scaling"], "seed": seed}
        parts = [rows.select(range(k * share, (k + 1) * share)) for k in range(stages)]
        with tempfile.TemporaryDirectory() as folder:
            results = progressive.train_stages(model, plan, parts, folder, **common)
        return [entry["loss"] for result in results for entry in result["history"]]

    def parameters(model: nn.Module) -> int:
        pairs = [layer.factors() for layer in adapter_layers(model).values()]
        return sum(A.numel() + B.numel() for A, B, _ in pairs)

    return Arm(model, fit=fit, parameters=parameters)


def delta(settings: Settings, seed: int) -> Arm:
    """As many single weights of ΔW as LoRA has numbers, at random places."""
    return Arm(adapted(settings, seed, config(settings), layer=SparseDeltaLinear))


def nested(settings: Settings, seed: int, ranks: Sequence[int]) -> Arm:
    """Trained for several ranks at once, the largest of them r."""
    how: dict[str, Any] = {"ranks": tuple(ranks), "weighting": "matryoshka"}
    return Arm(adapted(settings, seed, config(settings), layer=NestedLoRALinear, **how))


def quantized(settings: Settings, seed: int, bits: int) -> Arm:
    """Factors trained as they are stored, in few bits."""
    model = adapted(settings, seed, config(settings), layer=QuantizedLoRALinear, bits=bits)
    return Arm(model, save=save_quantized)


def rank_summary(found: Mapping[str, int]) -> dict[str, float]:
    """The mean of the ranks in the layers, by the layer's name, and the smallest and the largest of all."""
    kinds: dict[str, list[int]] = {}
    for name, rank in found.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    means = {kind: round(sum(values) / len(values), 2) for kind, values in kinds.items()}
    return means | {"least": min(found.values()), "most": max(found.values())}
