"""What is compared: one way to write an arm, one training of it, one search for its learning rate."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from lora_course import lab
from lora_course.checkpoint import save_adapter
from lora_course.experiments.study import Runs
from lora_course.injection import inject, trainable_parameters
from lora_course.lab import study

EXTENSIONS = 8  # doublings or halvings of a rate beyond the first ones, before a search gives up


@dataclasses.dataclass
class Arm:
    """A model about to be trained, and what its method adds to the training.

    fit: (rows, learning rate, seed) → losses (nats a token, one a step); the course's recipe by default.
    finish: called after the training; what is scored and served comes out of it. A dictionary that it returns is `Trained.seen`.
    parameters: how many numbers the served adapter has; by default those that were trained and are still there.
    save: writes the served adapter to a folder; `save_adapter` by default.
    """

    model: nn.Module
    callbacks: Sequence[TrainerCallback] = ()
    auxiliary_loss: Callable[[nn.Module], torch.Tensor] | None = None
    fit: Callable[[datasets.Dataset, float, int], list[float]] | None = None
    finish: Callable[[nn.Module], object] | None = None
    parameters: Callable[[nn.Module], int] = trainable_parameters
    save: Callable[[nn.Module, Path], object] = save_adapter


@dataclasses.dataclass
class Trained:
    """An arm after its training. losses: nats a token at each step.    seconds: of processor time, of the training alone.
    seen: what `Arm.finish` returned, if that is a dictionary."""

    arm: Arm
    losses: list[float]
    seconds: float
    seen: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        return self.arm.model

    @property
    def curve(self) -> list[float]:
        """The losses as a record keeps them."""
        return [round(loss, 4) for loss in self.losses]


def train(
    arm: Arm,
    rows: datasets.Dataset,
    learning_rate: float,
    seed: int,
    steps: int,
    batch: int,
    before_finish: Callable[[], object] | None = None,
    **overrides: Any,
) -> Trained:
    """Trains an arm by `lab.study.fit`, or by its own `fit`, and finishes it.

    rows: as `lab.blocks` makes them, or of `input_ids` and `labels` in another way.
    before_finish: called between training and finishing, such as for a measure of memory.
    overrides: fields of `TrainingArguments`.
    """
    set_seed(seed)
    start = time.process_time()
    if arm.fit:
        losses = arm.fit(rows, learning_rate, seed)
    else:
        losses = study.fit(
            arm.model, rows, learning_rate, seed, steps, batch, callbacks=arm.callbacks,
            auxiliary_loss=arm.auxiliary_loss, **{"disable_tqdm": True} | overrides,
        )  # fmt: skip
    seconds = time.process_time() - start
    if before_finish:
        before_finish()
    seen = arm.finish(arm.model) if arm.finish else None
    return Trained(arm, losses, round(seconds, 2), seen if isinstance(seen, dict) else {})


class Kept:
    """`train(*arguments, rate, seed)` as a function of (rate, seed) that remembers: what is chosen is not trained again for
    the other split."""

    def __init__(self, train: Callable[..., Any], *arguments: Any) -> None:
        self.train = functools.partial(train, *arguments)
        self.made: dict[tuple[float, int], Any] = {}

    def __call__(self, rate: float, seed: int) -> Any:
        if (rate, seed) not in self.made:
            self.made[rate, seed] = self.train(rate, seed)
        return self.made[rate, seed]

    def only(self, rates: Sequence[float]) -> None:
        """Forgets the trainings at other rates: a large model is not held once for each rate."""
        self.made = {key: value for key, value in self.made.items() if key[0] in rates}


def search(
    value: Callable[[float, int], float],
    first: Sequence[float],
    seeds: Sequence[int],
    agree: int | None = None,
    edges: bool = True,
) -> float:
    """The learning rate with the lowest mean of `value` (rate, seed), NaN being the worst.

    All of `first` are tried, neighbours that differ by factors of two; while the best lies at an edge of what was tried, the
    next rate on that side is tried too.

    Args:
        agree: ask so many of the seeds; while fewer than that find the mean's best rate best by themselves, ask the next
            seed too. By default all seeds are asked.
        edges: go on beyond an edge; False for a choice that another study goes on with.

    Raises:
        ValueError: the best is still at the edge after eight more rates.
    """
    rates, count = list(first), agree or len(seeds)

    def lost(rate: float, seed: int) -> float:
        found = value(rate, seed)
        return math.inf if math.isnan(found) else found

    def best_of(seed: int) -> float:
        return min(rates, key=lambda rate: lost(rate, seed))

    while True:
        means = {rate: statistics.fmean(lost(rate, s) for s in seeds[:count]) for rate in rates}
        best = min(means, key=means.__getitem__)
        if edges and best in (min(rates), max(rates)):
            if len(rates) == len(first) + EXTENSIONS:
                raise ValueError(
                    f"the best rate, {best:g}, still lies at the edge of {min(rates):g} to {max(rates):g}: begin the search "
                    "elsewhere, or look at the losses"
                )
            rates.append(best * 2 if best == max(rates) else best / 2)
            continue
        own = sum(best_of(seed) == best for seed in seeds[:count])
        if own >= (agree or 0) or count == len(seeds):
            return best
        count += 1


def compete(
    runs: Runs,
    arm: str,
    trained: Kept,
    score: Callable[[Any, str], Mapping[str, Any]],
    first: Sequence[float],
    search_seeds: Sequence[int],
    *,
    agree: int | None = None,
    value: Callable[[Mapping[str, Any]], float] = lambda found: found["bits_per_byte"],
    seeds: Sequence[int] | None = None,
) -> float:
    """One arm from its search to its tests: `search` on the validation split, then `seeds`, by default those of `runs`, at the
    chosen rate on the test split.

    trained: (rate, seed) → what `score` takes.    score: (trained, split) → the values of a run.
    value: of a run's values the number that is to be low; `lambda found: -found["accuracy"]` for one that is to be high.
    Keys are "arm/rate/seed/split". Returns the chosen rate.
    """
    values: dict[float, dict[int, float]] = {}

    def scored(rate: float, seed: int, split: str) -> Mapping[str, Any]:
        return score(trained(rate, seed), split)

    def validate(rate: float, seed: int) -> float:
        run = runs(run_key(arm, rate, seed, "validation"), scored, rate, seed, "validation")
        values.setdefault(rate, {})[seed] = value(run)
        means = {r: statistics.fmean(found.values()) for r, found in values.items()}
        trained.only([rate, min(means, key=means.__getitem__)])
        return values[rate][seed]

    best = search(validate, first, search_seeds, agree)
    trained.only([best])
    for seed in runs.seeds if seeds is None else seeds:
        runs(run_key(arm, best, seed, "test"), scored, best, seed, "test")
    return best


def run_key(arm: str, rate: float, seed: int, split: str) -> str:
    return f"{arm}/{rate:g}/{seed}/{split}"


# --------------------------------------------------------------------------------- models and text, as the settings say them


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    return lab.load_base(name)[1]


def base_of(settings: Mapping[str, Any]) -> Any:
    """The base, without an adapter: a model of transformers, whose types hide what it can do."""
    return lab.load_base(settings["model"])[0]


def config_of(r: int, scaling: float = 2.0, **fields: Any) -> LoraConfig:
    """LoRA on all linear layers with α = scaling · r."""
    given: dict[str, Any] = {"r": r, "lora_alpha": scaling * r, "target_modules": "all-linear"}
    return LoraConfig(**given | fields)


def adapted(settings: Mapping[str, Any], seed: int, config: LoraConfig, **layer: Any) -> nn.Module:
    """The base with a fresh adapter that the seed draws; layer: the rest of what `inject` takes."""
    model = base_of(settings)
    torch.manual_seed(seed)
    return inject(model, config, **layer)


def rows_of(settings: Mapping[str, Any], domain: str | None = None) -> datasets.Dataset:
    """Training rows of `settings["length"]` tokens from `settings["train_bytes"]` bytes spread over a domain's training text."""
    domain = domain or settings["domain"]
    return _rows(settings["model"], domain, settings["train_bytes"], settings["length"])


@functools.cache
def _rows(model: str, domain: str, train_bytes: int, length: int) -> datasets.Dataset:
    texts = lab.excerpt(lab.load_text(domain, "train"), train_bytes, piece=8192)
    return lab.blocks(tokenizer_of(model), texts, length)


def bits_of(
    settings: Mapping[str, Any], model: nn.Module, split: str, domain: str | None = None
) -> float:
    """Bits a byte on `settings["score_bytes"]` bytes (a number, or one by split) of a split of a domain."""
    size = settings["score_bytes"]
    return lab.bits_per_byte(
        model,
        tokenizer_of(settings["model"]),
        lab.load_text(domain or settings["domain"], split),
        max_bytes=size if isinstance(size, int) else size[split],
    )


def base_score(settings: Mapping[str, Any], split: str) -> dict[str, float]:
    """The run of the untouched base."""
    return {"bits_per_byte": bits_of(settings, base_of(settings), split)}
