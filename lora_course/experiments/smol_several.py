"""Two tasks at once on a chat model of 135M parameters: experts, merging, distillation and continual learning.

The tasks are the past of English verbs and the plural of German nouns. All arms read the same rows of each task,
equally many, once; "router" and the students read a part of them again. Each arm that trains has its own search for the rate on
validation words, by the mean bits an answer token of the tasks, with seed 0; the chosen rate gets every seed and answers test words.
What was trained on one task lies under build/studies/, to be taken up again.

    specialists   LoRA of rank 8 a task, each asked its own task       joint       one LoRA of rank 16, on all rows, shuffled
    router        the specialists, frozen, behind trained routers      average     the specialists as one adapter, untrained
    student       LoRA of rank 8 on half of all rows                   distilled   the same, taught by the specialists as well
    sequential    LoRA of rank 8, one task after the other, as above   replay      the same, with old rows in every batch
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_course import continual
from lora_course.arguments import training_arguments
from lora_course.distillation import DistillationConfig, DistillationTrainer, Teachers
from lora_course.experiments import Kept, Runs, Study, Witness, compete, run_key
from lora_course.experiments.arms import Arm, adapted, base_of, config_of, train
from lora_course.experiments.beginning import first_losses
from lora_course.experiments.task_scores import answer_bits, task_rows_of, task_score
from lora_course.experts import mix_experts
from lora_course.lora import AdapterState
from lora_course.states import concatenate, factor_state, use_adapter

TASKS = ["past", "plural"]
SETTINGS: dict[str, Any] = {
    "model": "smol", "tasks": TASKS, "steps": 30, "batch": 12, "length": 42, "r": 8, "scaling": 2.0,
    "words": {"validation": 80, "test": 150}, "new_tokens": 22, "seeds": [0, 1, 2], "search_seeds": [0],
    "first": [1e-3, 2e-3, 4e-3], "router": {"steps": 20, "first": [1e-2, 3e-2, 1e-1]}, "alpha": 0.5,
    "merge_weights": [0.5, 0.75, 1.0], "memory": 65_536, "share": 0.5,
}  # fmt: skip
TRAINED = Path(__file__).resolve().parents[2] / "build" / "studies" / "smol_several"


def mixed_rows(seed: int, steps: int) -> datasets.Dataset:
    """The first rows that the specialists of this seed read, equally many of each task, shuffled; `domain` says which task."""
    count = steps * SETTINGS["batch"] // len(TASKS)
    parts = [
        task_rows_of(SETTINGS, task, seed).select(range(count)).add_column("domain", [i] * count)
        for i, task in enumerate(TASKS)
    ]
    return datasets.concatenate_datasets(parts).shuffle(seed=seed).with_format("torch")


def fit(arm: Arm, rows: datasets.Dataset, rate: float, seed: int, steps: int) -> nn.Module:
    sequential: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    return train(arm, rows, rate, seed, steps, SETTINGS["batch"], **sequential).model


def fresh(seed: int, r: int = SETTINGS["r"]) -> nn.Module:
    return adapted(SETTINGS, seed, config_of(r))


@functools.cache
def plain() -> nn.Module:
    """The base with plain LoRA, to put a state into."""
    return fresh(0)


def specialists(rate: float, seed: int) -> dict[str, AdapterState]:
    """One adapter a task."""
    states = {}
    for task in TASKS:
        path = TRAINED / f"{task}-{rate:g}-{seed}.safetensors"
        if not path.exists():
            rows = task_rows_of(SETTINGS, task, seed)
            model = fit(Arm(fresh(seed)), rows, rate, seed, SETTINGS["steps"])
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(factor_state(model), path)
        states[task] = load_file(path)
    return states


def joint(rate: float, seed: int) -> nn.Module:
    steps = SETTINGS["steps"] * len(TASKS)
    arm = Arm(fresh(seed, SETTINGS["r"] * len(TASKS)))
    return fit(arm, mixed_rows(seed, steps), rate, seed, steps)


def router(of: float, rate: float, seed: int) -> nn.Module:
    """of: the rate at which the specialists were trained."""
    model, steps = base_of(SETTINGS), SETTINGS["router"]["steps"]
    torch.manual_seed(seed)
    mix_experts(model, list(specialists(of, seed).values()))
    return fit(Arm(model), mixed_rows(seed, steps), rate, seed, steps)


def student(rate: float, seed: int) -> nn.Module:
    steps = SETTINGS["steps"]
    return fit(Arm(fresh(seed)), mixed_rows(seed, steps), rate, seed, steps)


def distilled(of: float, rate: float, seed: int) -> nn.Module:
    """The student, whose rows are each taught by their own task's specialist too."""
    model, steps = fresh(seed), SETTINGS["steps"]
    teachers = Teachers(model, specialists(of, seed), torch.eye(len(TASKS)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder, learning_rate=rate, seed=seed, max_steps=steps, warmup_steps=0.1, lr_scheduler_type="linear",
            per_device_train_batch_size=SETTINGS["batch"], save_strategy="no", disable_tqdm=True,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        config = DistillationConfig(alpha=SETTINGS["alpha"])
        DistillationTrainer(
            model,
            arguments,
            teachers=teachers,
            config=config,
            train_dataset=mixed_rows(seed, steps),
        ).train()
    return model


STRATEGIES: dict[str, Callable[[int], continual.Sequential]] = {
    "sequential": lambda seed: continual.Sequential(),
    "replay": lambda seed: continual.Replay(SETTINGS["memory"], SETTINGS["share"], seed),
}


def in_sequence(name: str, rate: float, seed: int) -> tuple[nn.Module, list[list[float]]]:
    """The model after the last task, and R in bits an answer token on test words."""
    strategy = STRATEGIES[name](seed)
    model = fresh(seed)
    tasks = [
        continual.Task(
            task,
            task_rows_of(SETTINGS, task, seed),
            functools.partial(lambda task, model: answer_bits(SETTINGS, task, model, "test"), task),
        )
        for task in TASKS
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder, "cpu", learning_rate=rate, seed=seed, max_steps=SETTINGS["steps"], disable_tqdm=True, warmup_steps=0.1,
            per_device_train_batch_size=SETTINGS["batch"], lr_scheduler_type="linear", save_strategy="no",
        )  # fmt: skip
        results = continual.learn(model, tasks, strategy, arguments)
    return model, results.matrix.tolist()


# Scores ---------------------------------------------------------------------------------------------------------------


def score(found: Any, split: str) -> dict[str, Any]:
    """found: one model for all tasks, that and R, or a state a task."""
    model, matrix = found if isinstance(found, tuple) else (found, None)
    asked = {}
    for task in TASKS:
        served = use_adapter(plain(), model[task]) if isinstance(model, dict) else model
        if split == "validation":
            asked[task] = {"bits_per_token": answer_bits(SETTINGS, task, served, split)}
        else:
            asked[task] = task_score(SETTINGS, task, served)
    mean = statistics.fmean(one["bits_per_token"] for one in asked.values())
    return {"bits_per_token": mean, "tasks": asked} | ({"matrix": matrix} if matrix else {})


def merged_score(of: float, seed: int, weight: float, split: str) -> dict[str, Any]:
    states = list(specialists(of, seed).values())
    return score(use_adapter(plain(), concatenate(states, [weight] * len(states))), split)


def body(runs: Runs) -> None:
    bits: Callable[[Any], float] = lambda run: run["bits_per_token"]  # noqa: E731
    wanted = runs.arms(
        ["specialists", "joint", "average", "router", "student", "distilled", *STRATEGIES]
    )
    searched = len(SETTINGS["first"]) + len(runs.seeds)
    runs.expect(2 + searched * len({"specialists", *wanted}))

    def compare(arm: str, trained: Callable[..., Any], first: list[float]) -> float:
        return compete(runs, arm, Kept(trained), score, first, SETTINGS["search_seeds"], value=bits)

    runs("joint/beginning", beginning)
    runs("base/test", lambda: score(base_of(SETTINGS), "test"))
    of = compare("specialists", specialists, SETTINGS["first"])  # the rate that others build on
    arms: dict[str, Callable[..., Any]] = {
        "joint": joint,
        "router": functools.partial(router, of),
        "student": student,
        "distilled": functools.partial(distilled, of),
        **{name: functools.partial(in_sequence, name) for name in STRATEGIES},
    }
    for arm in wanted:
        if arm in arms:
            first = SETTINGS["router"]["first"] if arm == "router" else SETTINGS["first"]
            compare(arm, arms[arm], first)
        elif arm == "average":
            merge(runs, of)


def merge(runs: Runs, of: float) -> None:
    """The weight is searched, as rates are, with the first seed on validation words."""
    found = {}
    for weight in SETTINGS["merge_weights"]:
        compute = functools.partial(merged_score, of, 0, weight, "validation")
        found[weight] = runs(run_key("average", weight, 0, "validation"), compute)["bits_per_token"]
    best = min(found, key=found.__getitem__)
    for seed in runs.seeds:
        compute = functools.partial(merged_score, of, seed, best, "test")
        runs(run_key("average", best, seed, "test"), compute)


def beginning() -> dict[str, Any]:
    """The first steps of `joint` at the middle rate, with the first seed: what the witness repeats."""
    steps = SETTINGS["steps"] * len(TASKS)
    arm = Arm(fresh(0, SETTINGS["r"] * len(TASKS)))
    rate = SETTINGS["first"][1]
    return {"losses": first_losses(arm, mixed_rows(0, steps), rate, 0, steps, SETTINGS["batch"])}


WITNESS = Witness(
    ("joint/beginning",),
    {"losses": 0.1},
    "Without instructions for bf16 such losses came out up to 0.06 apart; over these steps they fall by more than one",
)
STUDY = Study("smol_several", SETTINGS, body, WITNESS)
