"""Of the study of chapter 3.2: its settings, its teachers, and what is made of them."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import nn

from lora_course.arguments import training_arguments
from lora_course.distillation import DistillationConfig, DistillationTrainer, Teachers
from lora_course.experiments import domains as several
from lora_course.experiments.arms import adapted, config_of, recipe, rows_of
from lora_course.lab import study
from lora_course.lora import AdapterState
from lora_course.states import concatenate, truncate

# What the teachers' mixture is made of: each row's own teacher, all four equally, or all four's logits equally.
DISTILLED: dict[str, dict[str, Any]] = {
    "by domain": {"by_domain": True},
    "by domain, reverse KL": {"by_domain": True, "divergence": "reverse"},
    "equal weights": {"by_domain": False},
    "equal weights, logits": {"by_domain": False, "mixture": "logits"},
}
SETTINGS: dict[str, Any] = {
    "model": "nano", "domains": ["bible", "shakespeare", "milton", "python"], "train_bytes": 160_000, "score_bytes": 8_000,
    "batch": 8, "length": 128, "seeds": [0, 1, 2, 3, 4], "search_seeds": [0, 1, 2],
    "teacher": {"r": 8, "steps": 24, "learning_rate": 8e-3}, "student": {"r": 4, "steps": 32},
    "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "alpha": 0.5, "temperature": 1.0,
    "distilled": DISTILLED, "temperatures": [2.0, 4.0, 8.0], "merge_weights": [0.25, 0.5, 1.0],
    "steps": 32, "arm_steps": {"merged": 0}, "router_rates": [3e-2, 1e-1, 3e-1, 1.0], "latency": {"batch": 8, "length": 128, "repeats": 15},
}  # fmt: skip
DOMAINS = SETTINGS["domains"]
R, STEPS = SETTINGS["student"]["r"], SETTINGS["student"]["steps"]
Found = tuple[nn.Module, dict[str, Any]]

rows = functools.partial(rows_of, SETTINGS)


def mixed_rows(
    domains: Sequence[str] = DOMAINS, steps: int = STEPS, of: several.RowsOf = rows
) -> datasets.Dataset:
    """What the students read, equally many rows of each domain; by default of those that its teacher reads from."""
    return several.mixed_rows(SETTINGS, domains, steps, of)


@functools.cache
def teacher_states(seed: int) -> dict[str, AdapterState]:
    """One adapter a domain, each trained on its own text."""
    r, steps, rate = (SETTINGS["teacher"][key] for key in ("r", "steps", "learning_rate"))
    return several.one_each(SETTINGS, DOMAINS, r, rate, seed, steps, rows)


def on_data(rate: float, seed: int, rows: datasets.Dataset | None = None) -> Found:
    """A student that sees text alone; by default the mixed text."""
    model, start = adapted(SETTINGS, seed, config_of(R)), time.perf_counter()
    rows = mixed_rows() if rows is None else rows
    losses = study.fit(model, rows, rate, seed, STEPS, SETTINGS["batch"], disable_tqdm=True)
    return model, {"losses": losses, "seconds": time.perf_counter() - start}


def distilled(kind: str, rate: float, seed: int, **settings: Any) -> Found:
    """A student of the four teachers; the recipe is that of `lab.study.fit`."""
    how = dict(DISTILLED[kind])
    weights = torch.eye(len(DOMAINS)) if how.pop("by_domain") else None
    usual: dict[str, Any] = {"alpha": SETTINGS["alpha"], "temperature": SETTINGS["temperature"]}
    config = DistillationConfig(**usual | how | settings)
    return distil(teacher_states(seed), weights, config, rate, seed, STEPS, mixed_rows())


def distil(
    states: dict[str, AdapterState], weights: torch.Tensor | None, config: DistillationConfig, rate: float, seed: int,
    steps: int, rows: datasets.Dataset,
) -> Found:  # fmt: skip
    """Teachers into one student on the rows."""
    model = adapted(SETTINGS, seed, config_of(R))
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(folder, **recipe(SETTINGS, rate, seed, max_steps=steps))
        more: dict[str, Any] = {"teachers": Teachers(model, states, weights), "config": config}
        trainer = DistillationTrainer(model, args, train_dataset=rows, **more)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    named = {"losses": "task", "divergences": "divergence"}
    curves = {name: [entry[key] for entry in trainer.history] for name, key in named.items()}
    return model, curves | {"seconds": seconds}


def merged(weight: float, seed: int, cut: bool = True) -> AdapterState:
    """The sum of the teachers' updates, each times `weight`; cut: to the student's rank."""
    states = list(teacher_states(seed).values())
    whole = concatenate(states, [weight] * len(states))
    return truncate(whole, R) if cut else whole


def with_router(rate: float, seed: int) -> nn.Module:
    """The teachers as frozen experts behind trained routers (chapter 2.1)."""
    states = list(teacher_states(seed).values())
    return several.routed(SETTINGS, states, mixed_rows(), rate, seed, STEPS)
