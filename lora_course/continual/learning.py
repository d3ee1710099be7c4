"""Tasks one after another under a strategy: trained, scored, and gone on with after a kill."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments

from lora_course.continual.memory import Rows
from lora_course.continual.scoring import mean_loss
from lora_course.continual.strategies import Sequential
from lora_course.descriptions import describe_adapter, describe_modules
from lora_course.files import make_folder, read_json, replace_file
from lora_course.processes import from_first, one_writer
from lora_course.refused import check_rows
from lora_course.runs import check_same_run, describe_arguments, describe_schedule, fingerprint
from lora_course.training import AdapterTrainer

RECORD = "continual.json"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a sequence.

    name: unlike the others'. train: its rows. evaluate: a function of the model that gives a score, or
    held-out rows, of which `mean_loss` is the score (nats a token, less is better).
    """

    name: str
    train: Rows
    evaluate: Callable[[nn.Module], float] | Rows


@dataclasses.dataclass(frozen=True)
class Results:
    """`names`: of the T tasks, in order. `matrix`: R, `[T + 1, T]` float64; row 0 is before any task."""

    names: list[str]
    matrix: Tensor


def learn(
    model: nn.Module,
    tasks: Sequence[Task],
    strategy: Sequential,
    args: TrainingArguments,
    overwrite: bool = False,
    **trainer: Any,
) -> Results:
    """Train `model` on one task after another and score it on all of them before, between and after.

    Called again with the same arguments after a kill, it goes on: between tasks always, within one from its
    last checkpoint (`args.save_steps`), to the same weights and the same R. Called with tasks added at the
    end, it learns those and fills their column in earlier rows too. Each task starts with a new optimiser and
    the schedule of `args`.

    Args:
        model: injected with `strategy.layer`; changed in place. It ends as after the last task, in eval mode.
        tasks: in the order of learning.
        strategy: it holds what the method keeps, such as `Replay.memory`.
        args: from `training_arguments`; `args.output_dir` will hold `continual.json` (R and the settings) and `stage-i`, the
            adapter and memory after i tasks: JSON and safetensors. Checkpoints within a task go when it is done.
        overwrite: delete what `args.output_dir` holds of another run, and start anew.
        trainer: passed on to `AdapterTrainer`, such as `data_collator` or `callbacks`.

    Raises:
        ValueError: no adapter, another layer, tasks without or of equal names; a folder that holds something else: another
            adapter, strategy, schedule, or other rows under a task's name.
    """
    _check(model, tasks, strategy)
    for rows in strategy.trained_together([task.train for task in tasks]):
        check_rows(rows, model, args.train_batch_size, trainer.get("data_collator"))
    folder, names = Path(str(args.output_dir)), [task.name for task in tasks]
    asked = {
        "adapter": describe_adapter(model),
        "modules": describe_modules(model),
        "strategy": strategy.settings(),
        "schedule": describe_schedule(args),
        "trainer": describe_arguments(trainer),
        "rows": {task.name: fingerprint(task.train) for task in tasks},
        "evaluate": {task.name: fingerprint(task.evaluate) for task in tasks},
    }
    if overwrite:
        from_first(lambda: _remove_another_run(folder, names, asked))
    record = from_first(lambda: _open_record(folder, names, asked))
    stages = [folder / f"stage-{i}" for i in range(len(tasks) + 1)]
    record["matrix"] += [{} for _ in stages[len(record["matrix"]) :]]
    for i, stage in enumerate(stages):
        row = record["matrix"][i]
        missing = [j for j, name in enumerate(names) if name not in row]
        if i >= record["stages"]:
            if i:
                # From files even if the model is as it was saved: an interrupted run and another take the same path.
                strategy.load(model, stages[:i])
                _train_on(model, tasks[i - 1], i - 1, strategy, args, trainer)
            else:
                strategy.begin()
            record["stages"] = i + 1
            with one_writer() as mine:
                if mine:
                    strategy.save(model, stage)
                    _write_record(folder, record)
                    shutil.rmtree(folder / f"training-{i}", ignore_errors=True)
        elif missing:
            strategy.load(model, stages[: i + 1])
        for j in missing:
            with strategy.serving(model.eval(), j):
                row[names[j]] = score_task(model, tasks[j], trainer.get("data_collator"))
        with one_writer() as mine:
            if mine and missing:
                _write_record(folder, record)
    strategy.load(model.eval(), stages)
    return load_results(folder)


def load_results(output_dir: str | Path) -> Results:
    """What `learn` has measured so far; cells that are still to come are NaN."""
    record = read_json(Path(output_dir) / RECORD)
    rows = [[row.get(name, float("nan")) for name in record["tasks"]] for row in record["matrix"]]
    return Results(record["tasks"], torch.tensor(rows, dtype=torch.float64))


def metrics(matrix: Tensor, higher_is_better: bool = False) -> dict[str, float]:
    """ACC, BWT and FWT of R `[T + 1, T]`, row 0 before any task (see the head of `lora_course.continual`). Positive BWT, FWT: better.

    Raises ValueError for another shape, fewer than two tasks, or a cell that is not measured.
    """
    tasks = matrix.shape[-1]
    if (
        matrix.ndim != 2
        or matrix.shape[0] != tasks + 1
        or tasks < 2
        or not torch.isfinite(matrix).all()
    ):
        raise ValueError(
            f"The matrix is {list(matrix.shape)}: [T + 1, T] is expected, T of 2 or more, and every cell finite."
        )
    sign = 1 if higher_is_better else -1
    start, learned = matrix[0], matrix[1:]
    diagonal, ahead = learned.diagonal(), learned.diagonal(1)
    return {
        "ACC": learned[-1].mean().item(),
        "BWT": sign * (learned[-1] - diagonal)[:-1].mean().item(),
        "FWT": sign * (ahead - start[1:]).mean().item(),
    }


def score_task(
    model: nn.Module, task: Task, data_collator: Callable[..., Any] | None = None
) -> float:
    """The task's score of the model as it stands. data_collator: as for `mean_loss`."""
    if callable(task.evaluate):
        return float(task.evaluate(model))
    return mean_loss(model, task.evaluate, data_collator=data_collator)


def _train_on(
    model: nn.Module,
    task: Task,
    index: int,
    strategy: Sequential,
    args: TrainingArguments,
    arguments: dict[str, Any],
) -> None:
    own = copy.copy(args)
    own.output_dir = str(Path(str(args.output_dir)) / f"training-{index + 1}")
    strategy.before_task(model, index, args.seed)
    rows = strategy.training_rows(task.train)
    trainer = AdapterTrainer(
        model, own, train_dataset=rows, auxiliary_loss=strategy.penalty, **arguments
    )
    trainer.remove_callback(PrinterCallback)  # R is what comes out
    trainer.train(resume_from_checkpoint=True)
    strategy.after_task(model, index, task.train)


def _check(model: nn.Module, tasks: Sequence[Task], strategy: Sequential) -> None:
    strategy.check(model)
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names) or not all(len(task.train) for task in tasks):
        raise ValueError(
            f"tasks={names}: one or more are expected, each of another name and with rows to train on."
        )


def _open_record(folder: Path, names: list[str], asked: dict[str, Any]) -> dict[str, Any]:
    path = folder / RECORD
    if not path.exists():
        if found := sorted(
            path.name for pattern in ("stage-*", "training-*") for path in folder.glob(pattern)
        ):
            raise ValueError(
                f"{folder} holds {found[:3]} but no {RECORD}: give a new output_dir, or empty this one."
            )
        make_folder(folder)
        record = {"tasks": names, "run": asked, "stages": 0, "matrix": []}
        _write_record(folder, record)
        return record
    record = read_json(path)
    _check_same(path, record, names, asked)
    return record | {"tasks": names, "run": asked}


def _check_same(
    path: Path, record: dict[str, Any], names: list[str], asked: dict[str, Any]
) -> None:
    """Raise ValueError unless the record is of this run, or of one with fewer tasks at its end."""
    if names[: len(record["tasks"])] != record["tasks"]:
        raise ValueError(
            f"{path} is of the tasks {record['tasks']}, asked for are {names}: tasks may be added at the end. "
            "Give another output_dir, or overwrite=True to start anew in this one."
        )
    found, known = record.get("run", {}), record["tasks"]
    named = {
        key: {name: asked[key][name] for name in known}
        for key in ("rows", "evaluate")
        if key in found
    }
    check_same_run(path, found, asked | {"evaluate": None} | named)


def _remove_another_run(folder: Path, names: list[str], asked: dict[str, Any]) -> None:
    path = folder / RECORD
    if not path.exists():
        return
    try:
        _check_same(path, read_json(path), names, asked)
    except ValueError:
        path.unlink()
        for pattern in ("stage-*", "training-*"):
            for found in folder.glob(pattern):
                shutil.rmtree(found)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    replace_file(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
