"""Recorded studies as chapters read them, and the one training that all of them are made of."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_course.arguments import device_of, training_arguments
from lora_course.lab.precision import check_fp16
from lora_course.training import AdapterTrainer

STUDIES = Path(__file__).resolve().parents[1] / "data" / "studies"
RUN = re.compile(r"(?P<arm>.+)/(?P<rate>[\d.e+-]+)/(?P<seed>\d+)/(?P<split>validation|test)")
RECIPE: dict[str, Any] = {"warmup_steps": 0.1, "lr_scheduler_type": "linear", "save_strategy": "no"}
"""Of every training of the course: 10% warm-up, then linearly to zero; nothing is kept on disk."""


def fit(
    model: nn.Module,
    rows: datasets.Dataset,
    learning_rate: float,
    seed: int,
    steps: int,
    batch: int,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    auxiliary_loss: Callable[[nn.Module], Tensor] | None = None,
    **overrides: Any,
) -> list[float]:
    """Trains the adapter of `model` in place and returns the loss (nats a token) at each step. Nothing is kept on disk.

    The model is trained where it lies. One in fp16 is first tried on a batch (`lab.precision`).

    One recipe for every method of the course: AdamW, 10% warm-up, then linearly to zero; the seed sets the order of the
    rows, so that two methods with one seed see the same batches. callbacks, auxiliary_loss: what a method adds to the
    training, as in `AdapterTrainer`; the losses then contain it. overrides: fields of `TrainingArguments`.
    """
    settings = RECIPE | {
        "learning_rate": learning_rate, "seed": seed, "max_steps": steps, "per_device_train_batch_size": batch,
    }  # fmt: skip
    check_fp16(model, rows[:batch])
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(folder, device_of(model), **settings | overrides)
        trainer = AdapterTrainer(
            model,
            arguments,
            train_dataset=rows,
            callbacks=list(callbacks),
            auxiliary_loss=auxiliary_loss,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.history]


def load_study(name: str) -> dict[str, Any]:
    """A committed record: `study` (its name), `settings`, `runs` (values by key), `made` (date, commit, versions and machine of
    which runs) and `verified` (when its witness last ran again, and how far apart it came out; None before).

    Raises ValueError for an unknown name, listing what there is.
    """
    path = STUDIES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.json")))
        raise ValueError(f"study {name!r} has no record; there are {known}")
    return json.loads(path.read_text(encoding="utf-8"))


def provenance(record: Mapping[str, Any]) -> str:
    """One sentence: when the record was made, and how far off its witness was when that was last run again.

    Of several fields the one that came nearest to its tolerance is told; commits, versions and keys stand in the record.
    """
    dates = sorted({entry["date"] for entry in record["made"] if entry["keys"]})
    if not dates:
        return "Nothing is recorded yet."
    span = f"on {dates[0]}" if len(dates) == 1 else f"from {dates[0]} to {dates[-1]}"
    verified = record["verified"]
    if not verified:
        return f"Recorded {span}; no run was repeated since."
    largest, within = verified["largest"], verified["within"]
    nearest = max(
        largest,
        key=lambda field: largest[field] / within[field] if within[field] else largest[field],
    )
    again = f"Recorded {span}; one run, repeated on {verified['date']},"
    if not verified["holds"]:
        return f"{again} DID NOT HOLD."
    if not largest[nearest]:
        return f"{again} came out the same."
    field = nearest.replace("_per_", " a ").replace("_", " ").replace("ACC", "mean score")
    return f"{again} differs by {largest[nearest]:.2g} in {field} ({within[nearest]:g} allowed)."


def tried_rates(record: Mapping[str, Any], arm: str) -> list[float]:
    """The learning rates that were tried for an arm on validation text, in order."""
    return sorted({rate for rate, _, split in _runs_of(record, arm) if split == "validation"})


def chosen_rate(record: Mapping[str, Any], arm: str) -> float:
    """The learning rate of an arm's runs on test text. Raises KeyError if there are none."""
    for rate, _, split in _runs_of(record, arm):
        if split == "test":
            return rate
    raise KeyError(
        f"{arm}: not in the record; `lora-course study run {record['study']} --arms {arm}` computes it"
    )


def series(record: Mapping[str, Any], arm: str, field: str = "bits_per_byte") -> list[float]:
    """A field of an arm's runs on test text, one value a seed, in the order of the seeds."""
    rate = chosen_rate(record, arm)
    runs = (record["runs"][f"{arm}/{rate:g}/{s}/test"] for s in record["settings"]["seeds"])
    return [run[field] for run in runs]


def budget(record: Mapping[str, Any]) -> pandas.DataFrame:
    """What a record says of its arms: a row for each, with what it trained, on how much, at which rates, with which seeds.

    An arm is what runs under keys "arm/rate/seed/split". Steps, batch and length are the settings' own; where the settings
    give an arm other steps (in `arm_steps`, or in the arm's entry of `trainings`), those; 0 for what trains nothing.
    "agree": of the seeds that searched, how many would have chosen the rate by themselves.
    """
    settings, arms = record["settings"], dict.fromkeys(arm for arm, *_ in _all_runs(record))
    size = settings.get("score_bytes", "")
    tested = size.get("test", size.get("domain")) if isinstance(size, dict) else size
    batch, length = (settings.get(name, "") for name in ("batch", "length"))
    rows: dict[str, dict[str, Any]] = {}
    for arm in arms:
        of_arm, tried = _runs_of(record, arm), tried_rates(record, arm)
        rates = list(dict.fromkeys(rate for rate, _, split in of_arm if split == "test"))
        steps = _steps(settings, arm)
        shared = {
            "steps": steps,
            "rows a step": batch,
            "tokens a row": length,
            "tokens read": f"{steps * batch * length:,}" if batch and length else "",
            "rates tried": ", ".join(f"{rate:g}" for rate in tried),
            "test bytes": f"{tested:,}" if tested else "",
        }
        # what runs on test text at several rates is as many arms, whose keys hold something else in a rate's place
        found_rates: list[float | None] = [*rates]
        for rate in found_rates or [None]:
            name = f"{arm}/{rate:g}" if len(rates) > 1 else arm
            prefix = f"{arm}/" if rate is None else f"{arm}/{rate:g}/"
            runs = [run for key, run in record["runs"].items() if key.startswith(prefix)]
            counted = sorted({run["parameters"] for run in runs if "parameters" in run})
            ends = dict.fromkeys(counted[:1] + counted[-1:])
            seeds = [seed for at, seed, split in of_arm if (at, split) == (rate, "test")]
            chosen = rate if len(rates) == 1 else None
            rows[name] = {"parameters": " to ".join(f"{n:,}" for n in ends)} | shared
            rows[name]["rate"] = "" if chosen is None else f"{chosen:g}"
            rows[name]["agree"] = _agreement(record, arm, tried, chosen)
            rows[name]["seeds"] = ", ".join(map(str, seeds or settings["seeds"]))
    order = ["parameters", "steps", "rows a step", "tokens a row", "tokens read", "rates tried", "rate", "agree", "seeds", "test bytes"]  # fmt: skip
    return pandas.DataFrame.from_dict(rows, orient="index", columns=order)


def _agreement(
    record: Mapping[str, Any], arm: str, tried: Sequence[float], chosen: float | None
) -> str:
    """ "2 of 3": of the seeds that tried all rates, those whose own best is the chosen one."""
    if chosen not in tried:
        return ""
    lost: dict[int, dict[float, float]] = {}
    for rate, seed, split in _runs_of(record, arm):
        value = record["runs"][f"{arm}/{rate:g}/{seed}/{split}"].get("bits_per_byte")
        value = statistics.fmean(value.values()) if isinstance(value, dict) else value
        if split == "validation" and value is not None:
            lost.setdefault(seed, {})[rate] = value
    asked = [by_rate for by_rate in lost.values() if len(by_rate) == len(tried)]
    agree = sum(min(by_rate, key=by_rate.__getitem__) == chosen for by_rate in asked)
    return f"{agree} of {len(asked)}" if asked else ""


def _steps(settings: Mapping[str, Any], arm: str) -> int:
    name = arm.split("/")[0]
    own = settings.get("trainings", {}).get(name, {})
    steps = own.get("steps", settings.get("steps", 0)) if isinstance(own, dict) else 0
    return settings.get("arm_steps", {}).get(name, steps)


def _all_runs(record: Mapping[str, Any]) -> Iterator[tuple[str, float, int, str]]:
    """(arm, rate, seed, split) of the runs whose keys are written so; an arm's name may hold slashes."""
    for key in record["runs"]:
        if found := RUN.fullmatch(key):
            yield found["arm"], float(found["rate"]), int(found["seed"]), found["split"]


def _runs_of(record: Mapping[str, Any], arm: str) -> list[tuple[float, int, str]]:
    return [(rate, seed, split) for name, rate, seed, split in _all_runs(record) if name == arm]
