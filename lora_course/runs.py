"""What a training run is: described beside its checkpoints, and compared before one of them goes on.

A run is its adapter (layer, configuration, arguments), its method, its schedule and its rows. Where it computes
(device, precision, number of processes at the same global batch) and what it logs and saves is no part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments

from lora_course.descriptions import UNKNOWN, describe_adapter, describe_modules, differences
from lora_course.files import read_json, replace_file
from lora_course.resumed import describe_ends, describe_optimizer, numbers_in, plain

COMPLETE = "complete.json"
"""Written into a checkpoint's folder when all else is in it."""
OPTIMIZER = "optimizer.pt"
"""Where Trainer keeps the optimiser's state in a checkpoint."""
SCHEDULE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "seed",
    "data_seed", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
"""Fields of `TrainingArguments` that decide which weights come out."""

INDIFFERENT = ("dataset_num_proc", "precompute_ref_batch_size", "activation_offloading")
"""Fields of TRL's arguments that change time or memory alone."""

SAMPLE = 64
"""Rows that a fingerprint reads."""


def describe_run(trainer: Any, method: dict[str, Any]) -> dict[str, Any]:
    """`adapter`, `trainer`, `method`, `callbacks`, both losses, `schedule`, `arguments`, `rows` of a trainer, as JSON holds them.

    method: what the trainer's class adds. A callback adds what its method `settings()` returns, if it has one.
    """
    loss = getattr(trainer, "compute_loss_func", None)
    given = {
        "callbacks": trainer.callback_handler.callbacks,
        "auxiliary_loss": getattr(trainer, "auxiliary_loss", None),
        # a trainer's own loss, such as DistillationTrainer's, is its method
        "compute_loss_func": None if getattr(loss, "__self__", None) is trainer else loss,
        "data_collator": getattr(trainer, "_collator_given", None),
    }
    return {
        "adapter": describe_adapter(trainer.model),
        "modules": describe_modules(trainer.model),
        "trainer": type(trainer).__name__,
        "method": method,
        **describe_arguments(given),
        "schedule": describe_schedule(trainer.args),
        "arguments": describe_own(trainer.args),
        "rows": fingerprint(trainer.train_dataset),
        "ends": describe_ends(trainer),
        "optimizer": describe_optimizer(trainer),
    }


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    """`found` as JSON holds it. Raises ValueError where it has no form for it: at the first checkpoint it would be too late."""
    try:
        return json.loads(json.dumps(found))
    except TypeError as error:
        raise ValueError(
            f"This run can't be described ({error}): give layer arguments and settings of callbacks and methods as numbers, "
            "strings, lists and dictionaries."
        ) from None


def describe_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """`callbacks` (those with settings), `auxiliary_loss` and `compute_loss_func` of what a trainer is given."""
    return {
        "callbacks": {
            type(callback).__name__: callback.settings()
            for callback in given.get("callbacks") or ()
            if callable(getattr(callback, "settings", None))
        },
        "auxiliary_loss": name_of(given.get("auxiliary_loss")),
        "compute_loss_func": name_of(given.get("compute_loss_func")),
        "data_collator": name_of(given.get("data_collator")),
    }


def describe_schedule(args: TrainingArguments) -> dict[str, Any]:
    """The fields in `SCHEDULE`, the length, and the rows of an optimiser step over all processes."""
    fields = {name: plain(getattr(args, name, None)) for name in SCHEDULE}
    fields["length"] = (
        f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    )
    fields["rows_a_step"] = (
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    return fields


def describe_own(args: TrainingArguments) -> dict[str, Any] | None:
    """The fields that another Trainer's arguments have beside `TrainingArguments`, such as TRL's `beta` and `loss_type`."""
    common = {field.name for field in dataclasses.fields(TrainingArguments)} | set(INDIFFERENT)
    own = {field.name for field in dataclasses.fields(args)} - common
    return {
        name: json.loads(json.dumps(getattr(args, name), default=plain)) for name in sorted(own)
    } or None


def fingerprint(rows: Any) -> str:
    """A hash of the number of rows and of `SAMPLE` of them; `UNKNOWN` for what has no length or changes from call to call."""
    if callable(rows) and not hasattr(rows, "__len__"):
        name = name_of(rows) or UNKNOWN
        return UNKNOWN if " at 0x" in name else name  # an address is another in each process
    if not hasattr(rows, "__len__") or not len(rows):
        return UNKNOWN

    def digest() -> str:
        found = hashlib.sha256(str(len(rows)).encode())
        for row in sample_of(rows):
            found.update(json.dumps(row, default=plain, sort_keys=True).encode())
        return found.hexdigest()[:16]

    first = digest()
    return first if digest() == first else UNKNOWN


def sample_of(rows: Any) -> list[Any]:
    """About `SAMPLE` rows, evenly spread; none of what has no length."""
    if not hasattr(rows, "__len__"):
        return []
    return [rows[index] for index in range(0, len(rows), max(1, len(rows) // SAMPLE))]


def check_same_run(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError, with every difference, where the run in `folder` is another than the one that is asked for."""
    before = {key: asked.get(key) for key in ("modules", "ends")}  # a run may be from before these
    if lines := differences(before | found, asked):
        raise ValueError(
            f"{folder} holds another run: {'; '.join(lines)}. Give another folder, or overwrite=True to start anew in this one."
        )


def folder_to_resume(
    output_dir: Any, resume: str | Path | bool | None, asked: dict[str, Any], overwrite: bool
) -> Path | None:
    """The checkpoint that a run goes on from; None to start. Arguments and errors as `AdapterTrainer.train`.

    asked: the run's description. With `overwrite` the checkpoints of another run in `output_dir` are deleted.
    """
    folder = last_checkpoint(output_dir) if resume is True else Path(resume) if resume else None
    if folder is not None and not (folder / COMPLETE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no complete checkpoint of AdapterTrainer ({COMPLETE} is missing)"
        )
    if overwrite:
        if folder is not None and not is_same_run(folder, asked):
            folder = None
        for mark in Path(output_dir).glob(f"checkpoint-*/{COMPLETE}"):
            if not is_same_run(mark.parent, asked):
                delete_checkpoint(mark)
    if folder is not None:
        check_same_run(folder, read_mark(folder).get("run", asked), asked)
    return folder


def check_optimizer(folder: Path) -> None:
    """Raise FileNotFoundError where a checkpoint that a run is to go on from lacks the optimiser's state."""
    if not (folder / OPTIMIZER).is_file():
        raise FileNotFoundError(
            f"{folder} holds an adapter without its optimiser (save_only_model=True): a run that went on from it would be another. "
            "Start anew in another folder; load_adapter reads what was trained."
        )


def is_same_run(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether a checkpoint was made by the run that is asked for; one from before descriptions is taken for it."""
    try:
        check_same_run(folder, read_mark(folder).get("run", asked), asked)
    except ValueError:
        return False
    return True


def name_of(function: Callable[..., Any] | None) -> str | None:
    """What a function is called, with the arguments that a `partial` fixes; the class of an object that is called."""
    if isinstance(function, functools.partial):
        fixed = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(fixed)})"
    if function is None:
        return None
    name = getattr(function, "__qualname__", type(function).__qualname__)
    held = numbers_in(function) if "<" in name else []  # many functions are called <lambda>
    return f"{name}({', '.join(map(repr, held))})" if held else name


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint in `output_dir` that was written last; None if there is none.

    The last by time, not by step: an earlier, longer run may have left its own. One that was cut short, by a kill while it
    was written, is passed over with a warning.
    """
    folders = sorted(path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir())
    for path in folders:
        if not (path / COMPLETE).is_file():
            warnings.warn(f"{path} was not written to its end: it is ignored", stacklevel=3)
    marks = [path / COMPLETE for path in folders if (path / COMPLETE).is_file()]
    return max(marks, key=written).parent if marks else None


def read_mark(folder: Path) -> dict[str, Any]:
    """What stands in a complete checkpoint: `step`, `written`, `finished`, `run`."""
    return read_json(folder / COMPLETE)


def mark_complete(folder: Path, trainer: Any, output: Any = None) -> None:
    """Marks the checkpoint of a trainer's step as whole. output: what the training gave, at its end."""
    mark = {
        "step": trainer.state.global_step,
        "written": time.time(),
        "finished": output is not None and is_finished(trainer),
        "output": output and [output.training_loss, output.metrics],
        "run": trainer.described,
    }
    replace_file(folder / COMPLETE, json.dumps(mark).encode())


def written(mark: Path) -> float:
    return read_mark(mark.parent)["written"]


def delete_checkpoint(mark: Path) -> None:
    mark.unlink(missing_ok=True)  # first, as a kill may cut the deletion short
    shutil.rmtree(mark.parent, ignore_errors=True)  # another process may be at it


def rotate_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints until `limit` are left; the `best` one stays. None or 0: keep all."""
    checkpoints = sorted(folder.glob(f"checkpoint-*/{COMPLETE}"), key=written)
    for mark in checkpoints[:-limit] if limit else []:
        # By name, as "./out/checkpoint-1" is "out/checkpoint-1", and a moved folder's best one lies here.
        if best is None or mark.parent.name != Path(best).name:
            delete_checkpoint(mark)


def is_finished(trainer: Any) -> bool:
    """Whether a run is at its last step, or was stopped early. What stopped it otherwise (a limit of time) lets it go on."""
    stoppers = [
        callback
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    ]
    return trainer.state.global_step >= trainer.state.max_steps or any(
        stopper.early_stopping_patience_counter >= stopper.early_stopping_patience
        for stopper in stoppers
    )
