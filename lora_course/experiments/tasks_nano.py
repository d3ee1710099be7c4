"""What plain LoRA of rank 8 makes of nano on three tasks with right answers, beside rules and tables learnt from the same words.

Each task has its own number of steps and its own search for the rate, on validation words by bits an answer token, with seed 0. The
chosen rate gets every seed, and its models answer all test words, greedily.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from lora_course.experiments import Kept, Runs, Study, Trained, Witness, compete
from lora_course.experiments.arms import Arm, adapted, base_of, config_of, train
from lora_course.experiments.task_scores import (
    answer_bits,
    own_text_bits,
    task_rows_of,
    task_score,
)
from lora_course.lab.baselines import score_baselines

SETTINGS: dict[str, Any] = {
    "model": "nano", "r": 8, "scaling": 2.0, "length": 44, "words": {"validation": 400, "test": 1_000}, "new_tokens": 28,
    "own_text": "glosses", "own_bytes": 20_000, "seeds": [0, 1, 2], "search_seeds": [0], "first": [2.5e-3, 5e-3, 1e-2],
    "tasks": {
        "pronunciation": {"steps": 400, "batch": 64}, "plural": {"steps": 150, "batch": 64}, "past": {"steps": 120, "batch": 32},
    },
}  # fmt: skip


def trained(task: str, rate: float, seed: int) -> Trained:
    plan = SETTINGS | SETTINGS["tasks"][task]
    arm = Arm(adapted(SETTINGS, seed, config_of(SETTINGS["r"])))
    rows = task_rows_of(plan, task, seed)
    return train(
        arm, rows, rate, seed, plan["steps"], plan["batch"], train_sampling_strategy="sequential"
    )


def score(task: str, found: Trained, split: str) -> dict[str, Any]:
    if split == "validation":
        return {"bits_per_token": answer_bits(SETTINGS, task, found.model, split)}
    result = task_score(SETTINGS, task, found.model)
    result |= {"own_text": own_text_bits(SETTINGS, found.model), "seconds": found.seconds}
    return result | {"losses": found.curve[::4]}


def base_score(task: str) -> dict[str, Any]:
    model: torch.nn.Module = base_of(SETTINGS)
    return task_score(SETTINGS, task, model) | {"own_text": own_text_bits(SETTINGS, model)}


def body(runs: Runs) -> None:
    names = runs.arms(list(SETTINGS["tasks"]))
    runs.expect(len(names) * (2 + len(SETTINGS["first"]) + len(runs.seeds)))
    for task in names:
        runs(f"baselines/{task}", functools.partial(score_baselines, task))
        runs(f"base/{task}", functools.partial(base_score, task))
        compete(
            runs, task, Kept(functools.partial(trained, task)), functools.partial(score, task),
            SETTINGS["first"], SETTINGS["search_seeds"], value=lambda run: run["bits_per_token"],
        )  # fmt: skip


WITNESS = Witness(
    ("past/0.005/0/validation",),
    {"bits_per_token": 0.03},
    "Products in bf16 and in fp32 give trainings of 120 steps that differ",
)
STUDY = Study(
    "tasks_nano",
    SETTINGS,
    body,
    WITNESS,
)
