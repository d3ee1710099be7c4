"""What several processes train in the tests: `accelerate launch -m tests.distributed FOLDER NAME…`, and the same in one.

Each function takes an output folder and gives what a run has decided and measured. The global batch is four rows, however many
processes share it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from torch import nn
from transformers import TrainerCallback

from lora_course import processes
from lora_course.adalora import AdaLoRALinear, RankAllocator, kept_triplets, regularizer
from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower, rank_history
from lora_course.arguments import training_arguments
from lora_course.continual import Orthogonal, Replay, Task, learn
from lora_course.distillation import DistillationTrainer, Teachers
from lora_course.experts import ExpertsLinear, balance_loss
from lora_course.hierarchical import NestedLoRALinear, RankSampler
from lora_course.injection import inject
from lora_course.progressive import Stage, train_stages
from lora_course.sparse import GatedLoRALinear, GateSparsity, open_gates
from lora_course.states import adapter_state, factor_state
from lora_course.training import AdapterTrainer
from tests.distillation.models import rows
from tests.models import config, qwen, randomize
from tests.processes import shot

STEPS, SAVE = 8, 4
Result = dict[str, Any]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def settings(**overrides: Any) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", 1))
    return {
        "device": "cpu", "per_device_train_batch_size": 4 // world, "save_steps": SAVE, "bf16": False, "disable_tqdm": True,
        "learning_rate": 5e-3, "warmup_steps": 2, **overrides,
    }  # fmt: skip


def injected(layer: Any = None, seed: int = 1, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    fields = config(r=4, lora_alpha=8, target_modules=TARGETS)
    return randomize(inject(qwen(), fields, **({"layer": layer} if layer else {}), **arguments))


def fit(
    folder: Path,
    model: nn.Module,
    auxiliary: Any = None,
    trainer: type[AdapterTrainer] = AdapterTrainer,
    callbacks: list[TrainerCallback] | None = None,
    overrides: dict[str, Any] | None = None,
    **arguments: Any,
) -> Result:
    args = training_arguments(folder, **settings(max_steps=STEPS, **overrides or {}))
    made = trainer(
        model,
        args,
        train_dataset=rows(),
        auxiliary_loss=auxiliary,
        callbacks=[*(callbacks or []), Shot()],
        **arguments,
    )
    made.train(resume_from_checkpoint=True)
    curves = {
        key: [entry[key] for entry in made.history]
        for key in ("loss", "divergence", "task")
        if key in made.history[0]
    }
    return {"curves": curves, "state": adapter_state(model), "decisions": None}


class Shot(TrainerCallback):
    """Kills the last process after the optimiser's step that the environment names, if it does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == int(os.environ.get("SHOT_AT", 0)) and not processes.is_first():
            shot()


def lora(folder: Path) -> Result:
    return fit(folder, injected(), overrides={"per_device_train_batch_size": 2 // processes_here(), "gradient_accumulation_steps": 2})  # fmt: skip


def processes_here() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def adalora(folder: Path) -> Result:
    torch.manual_seed(1)
    fields = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=STEPS, target_modules=TARGETS
    )
    model = randomize(inject(qwen(), fields, AdaLoRALinear))
    found = fit(
        folder, model, functools.partial(call_regularizer), callbacks=[RankAllocator(model)]
    )
    return found | {"decisions": kept_triplets(model)}


def call_regularizer(model: nn.Module) -> torch.Tensor:
    return regularizer(model)


def experts(folder: Path) -> Result:
    model = injected(ExpertsLinear, num_experts=3, top_k=2)
    return fit(folder, model, functools.partial(balance_loss, weight=0.5))


def gates(folder: Path) -> Result:
    model = injected(GatedLoRALinear)
    found = fit(folder, model, callbacks=[GateSparsity(model, 8.0)])
    return found | {"decisions": open_gates(model)}


def nested(folder: Path) -> Result:
    model = injected(NestedLoRALinear, ranks=[1, 2, 4])
    return fit(folder, model, callbacks=[RankSampler(model)])


def growth(folder: Path) -> Result:
    model = injected(GrowingLoRALinear)
    schedule = GrowthSchedule(budget=32, start=2, every=3, top=2, add=2)
    found = fit(folder, model, callbacks=[RankGrower(model, schedule)])
    return found | {"decisions": rank_history(model)}


def distillation(folder: Path) -> Result:
    teachers = {name: factor_state(injected(seed=seed)) for name, seed in (("a", 3), ("b", 4))}
    model = injected()
    made = Teachers(model, teachers, [[0.3, 0.7], [1.0, 0.0]])
    return fit(folder, model, trainer=DistillationTrainer, teachers=made)


def stages(folder: Path, mode: str = "stack") -> Result:
    plan = [Stage(3, ["q_proj", "down_proj"], 1e-2, 4), Stage(2, ["q_proj", "v_proj"], 5e-3, 4)]
    fields = settings(save_steps=2)
    model = qwen()
    for name in ("learning_rate", "warmup_steps"):
        del fields[name]
    records = train_stages(model, plan, rows(), folder, mode, trainer={"callbacks": [Shot()]}, **fields)  # fmt: skip
    losses = [entry["loss"] for record in records for entry in record["history"]]
    return {"curves": {"loss": losses}, "state": adapter_state(model), "decisions": None}


def continual(folder: Path, strategy: Any) -> Result:
    model = injected(strategy.layer)
    data = rows().remove_columns("domain")
    tasks = [
        Task("first", data.select(range(12)), data.select(range(4))),
        Task("second", data.select(range(12, 24)), data.select(range(12, 16))),
    ]
    args = training_arguments(folder, **settings(max_steps=4, save_steps=2))
    matrix = learn(model, tasks, strategy, args, callbacks=[Shot()]).matrix
    return {
        "curves": {"R": matrix.flatten().tolist()},
        "state": adapter_state(model),
        "decisions": None,
    }


CASES: dict[str, Callable[[Path], Result]] = {
    "lora": lora,
    "adalora": adalora,
    "experts": experts,
    "gates": gates,
    "nested": nested,
    "growth": growth,
    "distillation": distillation,
    "stack": stages,
    "merge": functools.partial(stages, mode="merge"),
    "replay": lambda folder: continual(folder, Replay(4000)),
    "orthogonal": lambda folder: continual(folder, Orthogonal()),
}


def main(folder: str, *names: str) -> None:
    """names: of cases, each in a folder of its own: "lora", or "killed/lora"."""
    rank = int(os.environ.get("RANK", 0))
    for name in names:
        result = CASES[Path(name).name](Path(folder) / name)
        torch.save(result, Path(folder) / f"{name}-{rank}.pt")
        processes.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
