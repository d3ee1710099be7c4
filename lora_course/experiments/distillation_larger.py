"""Of chapter 3.2, the common case: a larger teacher and a smaller student of one tokenizer, with the teacher raw and fine-tuned.

There is no second size of nano. The smaller model is nano with its first and its last block of four, as DistilBERT was begun from
every second layer of BERT: worse than nano at the start, and with the same 4,096 tokens. The larger one is nano whole. Both
learn Shakespeare with LoRA of rank 8 from the same rows; a fine-tuned teacher is the arm "lora" of chapter 4.3's study, at the
rate found there, and has had 40 steps where the students have 24.

    alone          the small model on the text
    raw            with nano as it is as the teacher, α = 0.5
    tuned          with the fine-tuned nano of the same seed, α = 0.5

Each searches its rate. Expected, before the first run: "tuned" is below "alone" and below "raw" with every seed; of "raw" less
"alone" nothing, since it starts nearer to the text and ends far from it.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from torch import nn

from lora_course.arguments import training_arguments
from lora_course.distillation import DistillationConfig, DistillationTrainer, TeacherModel
from lora_course.experiments import ROUNDING, Runs, Study, Witness
from lora_course.experiments.arms import (
    Arm,
    Trained,
    adapted,
    base_of,
    bits_of,
    config_of,
    rows_of,
    tokenizer_of,
    train,
    train_as,
    values_of,
)
from lora_course.experiments.rates import Kept, compete
from lora_course.injection import inject
from lora_course.lab import study

ARMS: dict[str, dict[str, Any]] = {
    "alone": {}, "raw": {"tuned": False, "alpha": 0.5}, "tuned": {"tuned": True, "alpha": 0.5},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "model": "nano", "domain": "shakespeare", "steps": 24, "batch": 4, "length": 128, "train_bytes": 1_000_000,
    "score_bytes": {"validation": 15_000, "test": 25_000}, "seeds": [0, 1, 2, 3, 4], "search_seeds": [0],
    "learning_rates": [4e-3, 8e-3, 1.6e-2], "teacher": {"r": 8, "steps": 40, "learning_rate": 8e-3}, "student": {"r": 8, "blocks": [0, 3]},
    "arms": ARMS,
}  # fmt: skip


def small() -> nn.Module:
    """nano with the student's blocks alone."""
    model, kept = base_of(SETTINGS), SETTINGS["student"]["blocks"]
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in kept)
    for place, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(kept)
    model.config.layer_types = [model.config.layer_types[i] for i in kept]
    return model


@functools.cache
def teacher(tuned: bool, seed: int) -> nn.Module:
    """nano as it is, or fine-tuned with the seed."""
    if not tuned:
        return base_of(SETTINGS)
    how = SETTINGS["teacher"]
    model = adapted(SETTINGS, seed, config_of(how["r"]))
    rows, steps = rows_of(SETTINGS), how["steps"]
    return train(Arm(model), rows, how["learning_rate"], seed, steps, SETTINGS["batch"]).model


def taught(model: nn.Module, tuned: bool, alpha: float, rate: float, seed: int) -> list[float]:
    """Trains the student beside a teacher, as `lab.study.fit` trains it alone."""
    own = TeacherModel(model, teacher(tuned, seed), len(tokenizer_of(SETTINGS["model"])))
    with tempfile.TemporaryDirectory() as folder:
        how = training_arguments(
            folder, learning_rate=rate, seed=seed, max_steps=SETTINGS["steps"], disable_tqdm=True,
            per_device_train_batch_size=SETTINGS["batch"], **study.RECIPE,
        )  # fmt: skip
        more: dict[str, Any] = {"teachers": own, "config": DistillationConfig(alpha=alpha)}
        trainer = DistillationTrainer(model, how, train_dataset=rows_of(SETTINGS), **more)
        trainer.train()
    return [entry["task"] for entry in trainer.history]


def trained(arm: str, rate: float, seed: int) -> Trained:
    torch.manual_seed(seed)
    model = inject(small(), config_of(SETTINGS["student"]["r"]))
    how = ARMS[arm]
    fit = (lambda rows, rate, seed: taught(model, rate=rate, seed=seed, **how)) if how else None
    return train_as(SETTINGS, Arm(model, fit=fit), rate, seed)


def score(found: Trained, split: str) -> dict[str, Any]:
    return values_of(SETTINGS, found, split)


def scored(model: nn.Module) -> dict[str, float]:
    """On the test text."""
    return {"bits_per_byte": bits_of(SETTINGS, model, "test")}


def body(runs: Runs) -> None:
    rates, searching = SETTINGS["learning_rates"], SETTINGS["search_seeds"]
    runs.expect(2 + len(runs.seeds) + len(ARMS) * (len(rates) * len(searching) + len(runs.seeds)))
    runs("small/test", lambda: scored(small()))
    runs("large/test", lambda: scored(teacher(False, 0)))
    for arm in ARMS:
        compete(runs, arm, Kept(trained, arm), score, rates, searching)
    for seed in runs.seeds:
        runs(f"teacher/{seed}/test", lambda s: scored(teacher(True, s)), seed)


WITNESS = Witness(
    ("small/test", "raw/0.016/0/test"),
    {"bits_per_byte": 0.005},
    ROUNDING + "; with the teacher as it is, as a fine-tuned one has to be trained first",
)
STUDY = Study("3_2_larger", SETTINGS, body, WITNESS)
