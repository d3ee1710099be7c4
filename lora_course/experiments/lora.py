"""The study of chapter 0.1: LoRA by target, by rank and by scale, against full fine-tuning, with one rule for every learning rate.

A block of nano has 8 · 4,672 parameters with LoRA of rank 8 on all linear layers; 21 · 1,792 on attention only (0.7% more) and
13 · 2,880 on the MLP only (0.2% more). "scale" is s: 2 by α = 2r, or by a rule that gives 2 at r = 8.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

import datasets
from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback, Trainer

from lora_course.arguments import device_of, training_arguments
from lora_course.experiments import Arm, Runs, Study, Trained, Witness
from lora_course.experiments.arms import NANO, adapted, base_of, bits_of, recipe, train_as
from lora_course.experiments.rates import compete_all

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ARMS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear", "r": 8, "scale": "alpha = 2r"},
    "full": {"target_modules": None, "r": None, "scale": None},
    "mlp": {"target_modules": MLP, "r": 13, "scale": "alpha = 2r"},
    "attention": {"target_modules": ATTENTION, "r": 21, "scale": "alpha = 2r"},
    "r64": {"target_modules": "all-linear", "r": 64, "scale": "alpha = 2r"},
    "r64-rslora": {"target_modules": "all-linear", "r": 64, "scale": "rslora"},
    "r64-alpha16": {"target_modules": "all-linear", "r": 64, "scale": "alpha = 16"},
    "r16": {"target_modules": "all-linear", "r": 16, "scale": "alpha = 2r"},
    "r16-rslora": {"target_modules": "all-linear", "r": 16, "scale": "rslora"},
    "r2": {"target_modules": "all-linear", "r": 2, "scale": "alpha = 2r"},
}
SETTINGS = NANO | {
    "own_domain": "glosses", "steps": 60, "batch": 8, "score_bytes": {"domain": 40_000, "own_domain": 20_000}, "search_seeds": [0],
    "arms": ARMS, "learning_rates": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2], "first": [4e-3, 8e-3, 1.6e-2],
}  # fmt: skip


def config(arm: str) -> LoraConfig:
    """The adapter of an arm; "full" has none."""
    r, scale, targets = (ARMS[arm][key] for key in ("r", "scale", "target_modules"))
    alpha = {"alpha = 2r": 2 * r, "alpha = 16": 16, "rslora": 2 * math.sqrt(8)}[scale]
    return LoraConfig(r=r, lora_alpha=alpha, use_rslora=scale == "rslora", target_modules=targets)


def full() -> Arm:
    """Every weight is trained, by transformers' own trainer: `AdapterTrainer` refuses what its checkpoints would not hold."""
    model = base_of(SETTINGS).train().requires_grad_(True)

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            fields = recipe(SETTINGS, learning_rate, seed)
            trainer = Trainer(
                model, training_arguments(folder, device_of(model), **fields), train_dataset=rows
            )
            trainer.remove_callback(PrinterCallback)  # or it prints each step
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return Arm(model, fit=fit)


def trained(arm: str, rate: float, seed: int) -> Trained:
    made = full() if arm == "full" else Arm(adapted(SETTINGS, seed, config(arm)))
    return train_as(SETTINGS, made, rate, seed)


def bits(model: nn.Module, split: str) -> dict[str, float]:
    """Bits a byte on a sample of a split: of the text that was learned, and of the base's own domain."""
    found = {}
    for name, domain in (("bits_per_byte", "domain"), ("own_domain", "own_domain")):
        size = {"score_bytes": SETTINGS["score_bytes"][domain]}
        found[name] = bits_of(SETTINGS | size, model, split, SETTINGS[domain])
    return found


def score(found: Trained, split: str) -> dict[str, Any]:
    values = bits(found.model, split) | {"parameters": found.arm.parameters(found.model)}
    return values | {"losses": found.curve} if split == "test" else values


def body(runs: Runs) -> None:
    arms = runs.arms(list(ARMS))
    runs.expect(2)
    for split in ("validation", "test"):
        runs(f"base/{split}", lambda s: bits(base_of(SETTINGS), s), split)
    compete_all(runs, SETTINGS, arms, trained, score, splits=("test", "validation"))


TOLERANCES = {"bits_per_byte": 0.005, "own_domain": 0.02, "parameters": 0}
WITNESS = Witness(("r2/0.016/0/test",), TOLERANCES, chapter="0_1_lora")
STUDY = Study("0_1_lora", SETTINGS, body, WITNESS)
