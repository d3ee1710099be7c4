"""A second study of chapter 3.2: what the first one's merging is worth at smaller weights and without a cut, and a short distillation.

    python tools/studies/distillation_merge.py     about 8 minutes on one core; goes on where it was stopped

The first study (`distillation.py`) merges at three weights and finds the smallest best: the grid goes on below it here. "cut" is
its arm, the sum of the teachers' updates at the student's rank; "whole" is the sum at full rank. The weight is chosen by the mean bits a
byte on validation text; only the chosen one's runs are scored on the test text. "pair/0" is small enough for the chapter to
repeat: two of the teachers, and one student of both. Writes lora_course/data/studies/3_2_merge.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import distillation as first
import torch

from lora_course import lora
from lora_course.distillation import DistillationConfig, DistillationTrainer, Teachers
from lora_course.lab import study
from lora_course.states import concatenate, truncate
from lora_course.training import training_arguments

SETTINGS = {
    "weights": [0.0625, 0.125, 0.1875, 0.25, 0.5], "seeds": [0, 1, 2],
    "pair": {"domains": ["bible", "python"], "seed": 0, "steps": 16, "learning_rate": 1.6e-2, "batch": 8},
}  # fmt: skip
SOURCES = [Path(__file__), *first.SOURCES]


def summed(weight: float, seed: int, cut: bool) -> lora.AdapterState:
    """The sum of the teachers' updates, each times `weight`."""
    states = list(first.teacher_states(seed).values())
    whole = concatenate(states, [weight] * len(states))
    return truncate(whole, first.SETTINGS["student"]["r"]) if cut else whole


def pair() -> dict[str, Any]:
    """Two teachers into one student, each row's own teacher its own; test text."""
    how, settings = SETTINGS["pair"], first.SETTINGS
    states = {domain: first.teacher_states(how["seed"])[domain] for domain in how["domains"]}
    count = how["steps"] * how["batch"] // len(states)
    parts = [
        first.rows(domain).select(range(count)).add_column("domain", [i] * count)
        for i, domain in enumerate(states)
    ]
    rows = datasets.concatenate_datasets(parts).with_format("torch")
    model = first.injected(settings["student"]["r"], how["seed"])
    teachers, config = (
        Teachers(model, states, torch.eye(len(states))),
        DistillationConfig(alpha=settings["alpha"]),
    )
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(
            folder, learning_rate=how["learning_rate"], seed=how["seed"], max_steps=how["steps"], warmup_steps=0.1,
            lr_scheduler_type="linear", per_device_train_batch_size=how["batch"], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model, args, teachers=teachers, config=config, train_dataset=rows
        )
        trainer.train()
    own = {
        domain: first.score_state(state, "test", [domain])[domain]
        for domain, state in states.items()
    }
    divergences = [entry["divergence"] for entry in trainer.history]
    return first.result(
        first.score(model, "test", how["domains"]), own_teacher=own, divergences=divergences
    )


def main() -> None:
    results = study.Study(study.STUDIES / "3_2_merge.json", SOURCES, SETTINGS)
    start = time.perf_counter()

    def run(key: str, function: Callable[[], dict[str, Any]]) -> float:
        found = results.run(key, function)["bits_per_byte"]
        print(
            f"{(time.perf_counter() - start) / 60:5.1f} min  {key:32} {found:.4f} bits a byte",
            flush=True,
        )
        return found

    run("pair/0/test", pair)
    for arm in ("cut", "whole"):

        def scored(
            weight: float, seed: int, split: str, cut: bool = arm == "cut"
        ) -> dict[str, Any]:
            return first.result(first.score_state(summed(weight, seed, cut), split))

        def validated(
            weight: float, arm: str = arm, scored: Callable[..., dict[str, Any]] = scored
        ) -> float:
            keys = {seed: f"{arm}/{weight:g}/{seed}/validation" for seed in SETTINGS["seeds"]}
            return statistics.fmean(
                run(key, lambda s=seed: scored(weight, s, "validation"))
                for seed, key in keys.items()
            )

        best = min(SETTINGS["weights"], key=validated)
        for seed in SETTINGS["seeds"]:
            run(
                f"{arm}/{best:g}/{seed}/test",
                lambda s=seed, scored=scored, best=best: scored(best, s, "test"),
            )


if __name__ == "__main__":
    main()
