"""A training through all stages, which goes on after a kill."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback

from lora_course.arguments import device_of, training_arguments
from lora_course.checkpoint import load_adapter, read_extra, restore_adapter, save_adapter
from lora_course.injection import adapter_layers, merge, unload
from lora_course.linears import is_4bit
from lora_course.processes import from_first, one_writer
from lora_course.progressive.stages import Stage, begin_stage, inject_stages
from lora_course.refused import check_rows
from lora_course.runs import check_same_run, describe_arguments, describe_schedule, fingerprint
from lora_course.training import AdapterTrainer

Mode = Literal["stack", "merge"]
Schedule = Literal["run", "stage"]
SET_BY_STAGES = (
    "output_dir", "learning_rate", "max_steps", "num_train_epochs", "seed", "data_seed", "warmup_steps", "warmup_ratio",
    "lr_scheduler_type", "lr_scheduler_kwargs",
)  # fmt: skip
"""Fields of `TrainingArguments` that the stages decide."""


def multiplier(stages: Sequence[Stage], index: int, step: int, schedule: Schedule = "run") -> float:
    """What a stage's learning rate is multiplied by at its optimiser step `step` (from 0): warm-up times linear decay.

    "run": one decay over the steps of all stages, a line where ReLoRA's jagged schedule has a cosine: with t the step in
    the whole run, T its length, w the warm-ups, `min(1, step/w_index) · min(1, (T − t)/(T − w_0))`. "stage": each stage
    decays to 0 by itself.
    With one stage both are transformers' linear schedule.
    """
    stage = stages[index]
    first, before, total = (
        stages[0],
        sum(s.steps for s in stages[:index]),
        sum(s.steps for s in stages),
    )
    if schedule == "stage":
        first, before, total = stage, 0, stage.steps
    warm = min(1.0, step / stage.warmup_steps) if stage.warmup_steps else 1.0
    return warm * max(0.0, min(1.0, (total - before - step) / max(1, total - first.warmup_steps)))


class StageTrainer(AdapterTrainer):
    """`AdapterTrainer` with the learning rate of one stage of several; all else, resuming included, is as there."""

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        stages: Sequence[Stage],
        index: int,
        schedule: Schedule,
        **arguments: Any,
    ) -> None:
        super().__init__(model, args, **arguments)
        self.stages, self.index, self.schedule = stages, index, schedule

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        chosen: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(
            chosen,
            lambda step: multiplier(self.stages, self.index, step, self.schedule),
        )
        return self.lr_scheduler


def train_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    dataset: datasets.Dataset | Sequence[datasets.Dataset],
    output_dir: str | Path,
    mode: Mode = "stack",
    *,
    scaling: float = 2.0,
    schedule: Schedule = "run",
    seed: int = 0,
    lora_dropout: float = 0.0,
    keep_original: bool = False,
    trainer: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Train `model` through all stages, in place. Killed at any point, the same command goes on to the same weights.

    Each stage has an optimiser of its own, so no moment of the stage before is left, and a learning rate that starts at
    0. Its factors come from `seed + 1000 · index`, and so does the order of its rows.

    Args:
        model: the plain base, as loaded; after a kill too. "stack" never writes to it.
        dataset: one for all stages, or one for each.
        output_dir: gets `start/` (the plan), `stage-0/`, `stage-1/`, …: stage k's folder holds stages 0 to k. Checkpoints
            within a stage lie in `stage-k/checkpoints/` until it is finished.
        mode: "stack" keeps the earlier stages as frozen factors beside the base. "merge" adds each to the base weight
            when it ends; at the end the model is merged, and `unmerge` takes all stages out again.
        scaling: s = α/r of every stage.    schedule: see `multiplier`.
        keep_original: for "merge", see `StackedLoRALinear`. Costs a copy of every target's weight.
        trainer: arguments of `AdapterTrainer` (`callbacks`, `data_collator`, `auxiliary_loss`, …).
        overwrite: delete what `output_dir` holds of another plan, and start anew.
        arguments: fields of `TrainingArguments` that hold in all stages (`per_device_train_batch_size`, `save_steps`,
            `gradient_checkpointing`, …) and `device`, by default the model's.

    Returns:
        For each stage what its folder keeps: `{"stage", "mode", "history": [{"step", "loss"}, …]}`.

    Raises:
        ValueError: an unknown mode or schedule, no stage, datasets that don't match, a field that the stages decide, a
            folder of another plan, schedule or rows; and as `inject`. TypeError: "merge" on a 4-bit base. Nothing has been changed then.

    Warns:
        UserWarning: "merge" on a half-precision base, or a folder begun on other base weights.
    """
    stages, folder, given = list(stages), Path(output_dir), dict(trainer or {})
    rows = _check_plan(stages, dataset, mode, schedule, arguments)
    args = training_arguments(folder, **{"device": device_of(model), **arguments})
    for part in rows:
        check_rows(part, model, args.train_batch_size, given.get("data_collator"))
    plan = {
        "mode": mode, "scaling": scaling, "schedule": schedule, "seed": seed, "lora_dropout": lora_dropout,
        "stages": {f"{index}": dataclasses.asdict(stage) for index, stage in enumerate(stages)},
        "arguments": {k: v for k, v in describe_schedule(args).items() if k not in (*SET_BY_STAGES, "length")},
        "trainer": describe_arguments(given),
        "rows": {f"{index}": fingerprint(part) for index, part in enumerate(rows)},
    }  # fmt: skip
    started = from_first(lambda: _is_started(folder, plan, overwrite))
    inject_stages(model, stages, scaling, lora_dropout, keep_original)
    try:
        if mode == "merge":
            _check_mergeable(model)
        if started:
            restore_adapter(model, folder / "start")  # warns of another base
        with one_writer() as mine:
            if mine and not started:
                save_adapter(model, folder / "start", plan)
    except Exception:
        unload(model)
        raise
    finished = _finished_stages(folder)
    if finished:
        restore_adapter(model, finished[-1])
        if mode == "merge":
            merge(model)  # stage by stage: the very weights that an uninterrupted run has here
    for index in range(len(finished), len(stages)):
        stage, stage_seed = stages[index], seed + 1000 * index
        begin_stage(model, stage, stage_seed)
        args = training_arguments(
            folder / f"stage-{index}" / "checkpoints",
            learning_rate=stage.learning_rate,
            max_steps=stage.steps,
            seed=stage_seed,
            **{"device": device_of(model), **arguments},
        )
        run = StageTrainer(model, args, stages, index, schedule, train_dataset=rows[index], **given)
        run.remove_callback(PrinterCallback)  # the history is what comes out
        run.train(resume_from_checkpoint=True)
        if mode == "merge":
            merge(model)
        extra = {"stage": index, "mode": mode, "history": run.history}
        with one_writer() as mine:
            if mine:
                save_adapter(model, folder / f"stage-{index}", extra)
                shutil.rmtree(str(args.output_dir))
    return [read_extra(path) for path in _finished_stages(folder)]


def load_stage(model: nn.Module, output_dir: str | Path, stage: int | None = None) -> nn.Module:
    """Inject into the plain `model` the stages 0 to `stage` (the last finished one by default) of a `train_stages` folder.

    The base is not written to, in either mode: the stages act beside it. `export.export_peft` then writes them as one
    LoRA adapter. Raises FileNotFoundError for a stage that is not finished, and as `checkpoint.load_adapter`.
    """
    finished = _finished_stages(Path(output_dir))
    index = len(finished) - 1 if stage is None else stage
    if not 0 <= index < len(finished):
        raise FileNotFoundError(
            f"{output_dir} has no finished stage {stage}; finished are {list(range(len(finished)))}. Run train_stages again to go on."
        )
    return load_adapter(model, finished[index])


def _is_started(folder: Path, plan: dict[str, Any], overwrite: bool) -> bool:
    """Whether `folder` holds this plan's start. What it holds of another plan is refused, or deleted."""
    if not (folder / "start" / "adapter.json").is_file():
        return False
    try:
        check_same_run(folder, read_extra(folder / "start"), plan)
    except ValueError:
        if not overwrite:
            raise
        for found in (*folder.glob("stage-*"), folder / "start"):
            shutil.rmtree(found)
        return False
    return True


def _finished_stages(folder: Path) -> list[Path]:
    """Folders of the finished stages, from 0 on. A stage is finished when its adapter.json, written last, is there."""
    found: list[Path] = []
    while (path := folder / f"stage-{len(found)}" / "adapter.json").is_file():
        found.append(path.parent)
    return found


def _check_plan(
    stages: list[Stage],
    dataset: datasets.Dataset | Sequence[datasets.Dataset],
    mode: str,
    schedule: str,
    arguments: dict[str, Any],
) -> list[datasets.Dataset]:
    if mode not in ("stack", "merge"):
        raise ValueError(
            f"mode={mode!r}: 'stack' (earlier stages frozen beside the base) or 'merge' (added to the base) is expected."
        )
    if schedule not in ("run", "stage"):
        raise ValueError(
            f"schedule={schedule!r}: 'run' (one decay over all stages) or 'stage' (one in each) is expected."
        )
    if not stages:
        raise ValueError(
            "No stage is given: stages=[Stage(r=8, learning_rate=2e-4, steps=100), …] is expected."
        )
    if taken := sorted(set(arguments) & set(SET_BY_STAGES)):
        raise ValueError(
            f"{', '.join(taken)}: decided by the stages, seed, schedule and output_dir of train_stages; set it there."
        )
    rows = list(dataset) if isinstance(dataset, list | tuple) else [dataset] * len(stages)
    if len(rows) != len(stages):
        raise ValueError(
            f"{len(rows)} datasets for {len(stages)} stages: give one for all stages, or one for each."
        )
    return rows


def _check_mergeable(model: nn.Module) -> None:
    layers = adapter_layers(model)
    for name, layer in layers.items():
        if is_4bit(layer.base_layer):
            raise TypeError(
                f"The base of {name!r} is 4-bit: mode='merge' would round the sum to 16 values a block at every stage. Use mode='stack', "
                "which computes the same and leaves the base alone, or load the base in fp32."
            )
        layer.check_merge(name)
    halves = {layer.base_layer.weight.dtype for layer in layers.values()} & {
        torch.bfloat16,
        torch.float16,
    }
    if halves:
        warnings.warn(
            f"The base is in {', '.join(map(str, halves))}: each merge rounds the sum to it, and what is smaller than half a "
            "step of a weight is lost. Load the base in fp32, or use mode='stack'.",
            stacklevel=3,
        )
