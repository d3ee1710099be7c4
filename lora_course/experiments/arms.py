"""What is compared: one way to write an arm, one training of it, and the base, text and scores as the settings say them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from lora_course import lab
from lora_course.checkpoint import save_adapter
from lora_course.experiments.study import Runs
from lora_course.injection import inject, trainable_parameters
from lora_course.lab import study
from lora_course.lora import AdapterState
from lora_course.states import split_state, use_adapter

NANO: dict[str, Any] = {
    "model": "nano", "domain": "shakespeare", "length": 128, "train_bytes": 1_000_000, "seeds": [0, 1, 2, 3, 4],
}  # fmt: skip
"""What the settings of most studies have in common."""


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


# ------------------------------------------------------------------------------------ what most studies do with their settings


def recipe(settings: Mapping[str, Any], rate: float, seed: int, **overrides: Any) -> dict[str, Any]:
    """Fields of `TrainingArguments` as `lab.study.fit` sets them, for what is trained by a trainer of its own."""
    plan = {"max_steps": settings["steps"], "per_device_train_batch_size": settings["batch"]}
    common = {"learning_rate": rate, "seed": seed, "disable_tqdm": True}
    return study.RECIPE | common | plan | overrides


def train_as(
    settings: Mapping[str, Any], arm: Arm, rate: float, seed: int, domain: str | None = None
) -> Trained:
    """`train` on the rows of a domain, for the steps and at the batch size that the settings say."""
    rows = rows_of(settings, domain)
    return train(arm, rows, rate, seed, settings["steps"], settings["batch"])


def values_of(settings: Mapping[str, Any], found: Trained, split: str) -> dict[str, Any]:
    """Bits a byte and the number of parameters; with the losses on the test split."""
    bits, parameters = bits_of(settings, found.model, split), found.arm.parameters(found.model)
    values: dict[str, Any] = {"bits_per_byte": bits, "parameters": parameters}
    return values | {"losses": found.curve} if split == "test" else values


def bits_by_domain(
    settings: Mapping[str, Any],
    served: nn.Module | AdapterState,
    split: str,
    domains: Sequence[str] = (),
) -> dict[str, float]:
    """Bits a byte by domain, of some or of all in the settings; of a model, or of the base with a plain adapter's state."""
    model = served if isinstance(served, nn.Module) else serving(settings, served)
    asked = domains or settings["domains"]
    return {domain: bits_of(settings, model, split, domain) for domain in asked}


def serving(settings: Mapping[str, Any], state: AdapterState) -> nn.Module:
    """The base with a plain adapter of this state, whatever its ranks."""
    return use_adapter(adapted(settings, 0, config_of(1)), state)


def components(state: AdapterState, start: int, count: int) -> AdapterState:
    """Of each A so many rows, and of each B as many columns, from `start` on; at the same scale."""
    end = start + count
    cut = {"A": lambda t: t[start:end], "B": lambda t: t[:, start:end], "scaling": lambda t: t}
    return {name: cut[name.rpartition(".")[2]](t).clone() for name, t in state.items()}


def in_peft(
    settings: Mapping[str, Any], states: Mapping[str, AdapterState], config: LoraConfig
) -> Any:
    """The base as a model of PEFT that holds these plain adapters by name, all of them made as `config` says."""
    model: Any = None
    for name, state in states.items():
        own = copy.deepcopy(config)  # PEFT notes in it what it found
        if model is None:
            model = get_peft_model(base_of(settings), own, name)
        else:
            model.add_adapter(name, own)
        for module, tensors in split_state(state).items():
            layer = model.base_model.model.get_submodule(module)
            layer.lora_A[name].weight.data.copy_(tensors["A"])
            layer.lora_B[name].weight.data.copy_(tensors["B"])
    return model


def file_bytes(arm: Arm) -> int:
    """What the served adapter takes on disk: its safetensors file, the header included."""
    with tempfile.TemporaryDirectory() as folder:
        arm.save(arm.model, Path(folder))
        return max(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def base_runs(runs: Runs, settings: Mapping[str, Any]) -> None:
    """The runs of the untouched base, on both splits."""
    for split in ("validation", "test"):
        runs(f"base/{split}", base_score, settings, split)
