"""What makes a resumed run the uninterrupted one, and a repeated run the first: what else decides its weights, and what goes on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler


def describe_ends(trainer: Any) -> dict[str, Any] | None:
    """What decides which step's weights come out: by which score the best are chosen, and what stops early. None: the last."""
    args, callbacks = trainer.args, trainer.callback_handler.callbacks
    stoppers = [c for c in callbacks if isinstance(c, EarlyStoppingCallback)]
    if not (args.load_best_model_at_end or stoppers):
        return None
    return {
        "best": bool(args.load_best_model_at_end),
        "metric": [args.metric_for_best_model, args.greater_is_better],
        "evaluated": [plain(args.eval_strategy), args.eval_steps],
        "stopped": [stopper.state()["args"] for stopper in stoppers],
    }


def describe_optimizer(trainer: Any) -> dict[str, Any] | None:
    """Class and groups' settings of an optimiser that was given; None where the arguments say all."""
    if not getattr(trainer, "_optimizer_given", False):
        return None
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's wrapper
    groups = [
        {k: plain(v) for k, v in group.items() if k not in ("params", "param_names", "initial_lr")}
        | {"lr": plain(group.get("initial_lr", group["lr"]))}  # a scheduler has changed the other
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "groups": groups}


def restore_callbacks(callbacks: list[Any], stored: Any) -> None:
    """Callbacks count on from where they were when the checkpoint was written: early stopping's patience does."""
    for name, found in stored.items():
        alike = [
            c for c in callbacks if type(c).__name__ == name and isinstance(c, ExportableState)
        ]
        for callback, state in zip(
            alike, found if isinstance(found, list) else [found], strict=False
        ):
            vars(callback).update(state.get("attributes", {}))


def output_of(mark: Mapping[str, Any], history: list[dict[str, float]]) -> list[Any]:
    """Loss and metrics that a finished training returned; the mean of its history where a kill came before they were written."""
    losses = [entry["loss"] for entry in history]
    return mark.get("output") or [sum(losses) / max(1, len(losses)), {}]


def order_by_epoch(sampler: Any, args: TrainingArguments) -> Any:
    """A sampler that groups by length, drawing from seed and epoch; Trainer's draws from the global random numbers, which
    are others where an epoch is resumed. Any other sampler as it is."""
    if isinstance(sampler, LengthGroupedSampler):
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler.generator = generator = torch.Generator().manual_seed(seed)
        sampler.set_epoch = lambda epoch: generator.manual_seed(seed + epoch)  # type: ignore[attr-defined]
    return sampler


def warn_of_no_length(rows: Any, folder: Path | None) -> None:
    """Warn where a run goes on from `folder` with rows that have no length: how many passes it has made can't be told."""
    if folder is not None and not hasattr(rows, "__len__"):
        warnings.warn(
            "train_dataset has no length: the rows that are passed over are those of its first pass, so that after a later one the "
            "resumed run sees others than an uninterrupted one.",
            stacklevel=3,
        )


def numbers_in(function: Any) -> list[float]:
    """The fractions in a function's text and the numbers in its defaults and closure, such as a coefficient."""
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *cells]
    fractions = [value for value in code.co_consts if isinstance(value, float)]
    return fractions + [value for value in given if isinstance(value, int | float)]


def plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    value = getattr(value, "value", value)
    return value if isinstance(value, str | int | float | bool | dict | list | None) else str(value)
