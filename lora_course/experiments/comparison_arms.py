"""Of the comparison of chapter 5.1: its settings, and how each method makes its arm."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from transformers import PrinterCallback, Trainer

from lora_course import progressive
from lora_course.adalora import AdaLoRALinear, RankAllocator, prune_triplets, regularizer
from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
from lora_course.arguments import training_arguments
from lora_course.experiments import Arm, adapted, base_of, config_of
from lora_course.hierarchical import NestedLoRALinear
from lora_course.injection import adapter_layers, inject
from lora_course.qlora import quantize_model
from lora_course.quantized import QuantizedLoRALinear, save_quantized
from lora_course.sparse import GatedLoRALinear, GateSparsity, SparseDeltaLinear, prune_gates

SETTINGS: dict[str, Any] = {
    "model": "nano", "own_domain": "glosses", "steps": 32, "batch": 4, "length": 128, "train_bytes": 1_000_000,
    "score_bytes": {"validation": 10_000, "test": 20_000, "own_domain": 10_000}, "seeds": [0, 1, 2, 3, 4], "search_seeds": [0],
    "learning_rates": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128, 0.256], "first": [4e-3, 8e-3, 1.6e-2],
    "r": 8, "scaling": 2.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the comparison.

    make: seed → the arm, with its factors drawn.    chapter: where it is taught.
    note: what it has in another way than plain LoRA, as the table says it.
    """

    title: str
    make: Callable[[int], Arm]
    chapter: str
    note: str


def recipe(learning_rate: float, seed: int) -> dict[str, Any]:
    """Fields of `TrainingArguments` that all methods share: those of `lab.study.fit`, and the rows in the order they come."""
    return {
        "learning_rate": learning_rate, "seed": seed, "max_steps": SETTINGS["steps"],
        "per_device_train_batch_size": SETTINGS["batch"], "warmup_steps": 0.1, "lr_scheduler_type": "linear",
        "save_strategy": "no", "train_sampling_strategy": "sequential", "disable_tqdm": True,
    }  # fmt: skip


def injected(seed: int, r: int = SETTINGS["r"], **layer: Any) -> nn.Module:
    """The base with an adapter on all linear layers, at the comparison's scale."""
    return adapted(SETTINGS, seed, config_of(r, SETTINGS["scaling"]), **layer)


def make_lora(seed: int) -> Arm:
    return Arm(injected(seed))


def make_qlora(seed: int) -> Arm:
    model = quantize_model(base_of(SETTINGS))
    torch.manual_seed(seed)
    return Arm(inject(model, config_of(SETTINGS["r"], SETTINGS["scaling"])))


def make_peft(seed: int, **fields: Any) -> Arm:
    """PEFT's layers in transformers' own Trainer, starting from the `A`s that the course's LoRA draws with this seed."""
    drawn = adapter_layers(injected(seed))
    config = config_of(SETTINGS["r"], SETTINGS["scaling"], task_type="CAUSAL_LM", **fields)
    model: Any = get_peft_model(base_of(SETTINGS), config)
    with torch.no_grad():
        for name, layer in drawn.items():
            theirs = model.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.A)

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(folder, **recipe(learning_rate, seed))
            trainer = Trainer(model, arguments, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return Arm(model, fit=fit, save=lambda _, folder: model.save_pretrained(folder))


def make_rslora(seed: int) -> Arm:
    return make_peft(seed, use_rslora=True)


def make_dora(seed: int) -> Arm:
    return make_peft(seed, use_dora=True)


def make_adalora(seed: int) -> Arm:
    r, steps = SETTINGS["r"], SETTINGS["steps"]
    start = r * 3 // 2
    config = AdaLoraConfig(
        init_r=start, target_r=r, lora_alpha=SETTINGS["scaling"] * start, target_modules="all-linear", orth_reg_weight=0.5,
        tinit=steps // 10, tfinal=steps // 3, deltaT=2, total_step=steps,
    )  # fmt: skip
    model = adapted(SETTINGS, seed, config, layer=AdaLoRALinear)
    return Arm(model, [RankAllocator(model)], regularizer, finish=prune_triplets)


def make_adaptive(seed: int) -> Arm:
    r, steps = SETTINGS["r"], SETTINGS["steps"]
    model = injected(seed, r // 4, layer=GrowingLoRALinear)
    layers = len(adapter_layers(model))
    # half of the layers by 2 ranks at a time, from a fifth of the steps on, done after three quarters of them
    when = {"start": steps // 5, "every": steps // 10}
    schedule = GrowthSchedule(layers * r, **when, top=layers // 2, add=2, max_r=2 * r, seed=seed)
    return Arm(model, [RankGrower(model, schedule)])


def make_progressive(seed: int) -> Arm:
    """Two stages of half the rank and half the steps."""
    model, count = base_of(SETTINGS), 2

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        r, steps, share = SETTINGS["r"] // count, SETTINGS["steps"] // count, len(rows) // count
        stages = [progressive.Stage(r, "all-linear", learning_rate, steps, warmup=0.1)] * count
        parts = [rows.select(range(k * share, (k + 1) * share)) for k in range(count)]
        common = recipe(learning_rate, seed).items()
        fields = {key: value for key, value in common if key not in progressive.SET_BY_STAGES}
        with tempfile.TemporaryDirectory() as folder:
            results = progressive.train_stages(
                model, stages, parts, folder, scaling=SETTINGS["scaling"], seed=seed, **fields
            )
        return [entry["loss"] for result in results for entry in result["history"]]

    def parameters(model: nn.Module) -> int:
        factors = [layer.factors() for layer in adapter_layers(model).values()]
        return sum(A.numel() + B.numel() for A, B, _ in factors)

    return Arm(model, fit=fit, parameters=parameters)


def make_gates(seed: int) -> Arm:
    """From rank 12; the penalty under which about 8 were left in a trial. How many are is for the training to say."""
    model = injected(seed, SETTINGS["r"] * 3 // 2, layer=GatedLoRALinear)
    return Arm(model, [GateSparsity(model, penalty=2.5)], finish=prune_gates)


def make_delta(seed: int) -> Arm:
    return Arm(injected(seed, layer=SparseDeltaLinear))


def make_nested(seed: int) -> Arm:
    nested: dict[str, Any] = {
        "layer": NestedLoRALinear,
        "ranks": (1, 2, 4, 8),
        "weighting": "matryoshka",
    }
    return Arm(injected(seed, **nested))


def make_quantized(seed: int) -> Arm:
    return Arm(injected(seed, layer=QuantizedLoRALinear, bits=4), save=save_quantized)


METHODS: dict[str, Method] = {
    "lora": Method("LoRA", make_lora, "0_1_lora", "the reference"),
    "rslora": Method("rsLoRA (PEFT)", make_rslora, "0_1_lora", "the same α, so s = α/√r is √r times LoRA's: at LoRA's own s it would be LoRA"),
    "dora": Method("DoRA (PEFT)", make_dora, "0_1_lora", "a magnitude for each output on top of rank 8"),
    "qlora": Method("QLoRA", make_qlora, "1_1_qlora", "the base in NF4 with double quantisation"),
    "adalora": Method("AdaLoRA", make_adalora, "1_2_adalora", "from rank 12 down to 8 on average"),
    "progressive": Method("progressive", make_progressive, "2_2_progressive", "two stages of rank 4 and half the steps"),
    "adaptive": Method("adaptive", make_adaptive, "3_1_adaptive", "from rank 2 up to 8 on average"),
    "gates": Method("gates", make_gates, "4_1_sparse", "from rank 12 down to what the penalty leaves"),
    "delta": Method("ΔW mask", make_delta, "4_1_sparse", "as many single weights as LoRA has numbers, at random places"),
    "nested": Method("nested", make_nested, "4_2_hierarchical", "trained for the ranks 1, 2, 4 and 8 at once, served at 8"),
    "quantized": Method("4-bit factors", make_quantized, "4_3_quantized", "factors trained and stored in 4 bits"),
}  # fmt: skip
