"""What a training step of LoRA's neighbours in PEFT costs beside PEFT's own LoRA: bytes, which are counted, and time.

Base, batch, length, rank and scale are those of `neighbours`, in fp32. "bytes/NAME" are one step's, the same in every run;
"times" are steps that take turns, and only their ratios within a round mean anything.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_course import lab
from lora_course.experiments import Runs, Study, Witness, comparison, neighbours
from lora_course.experiments import peft_methods as peft
from lora_course.experiments.fused_costs import saved_bytes
from lora_course.experiments.timing import race
from lora_course.injection import trainable_parameters

OF_THE_RULE = ("model", "batch", "length", "steps", "train_bytes", "r", "scaling", "loraplus_lr_ratio", "vera_r")  # fmt: skip
SETTINGS: dict[str, Any] = {key: neighbours.SETTINGS[key] for key in OF_THE_RULE} | {
    "domain": "shakespeare", "seed": 0, "learning_rate": 1e-4, "rounds": 15,
}  # fmt: skip
METHODS: dict[str, Callable[..., Any]] = {
    "lora": peft.from_loras_start,
    "rslora": comparison.METHODS["rslora"].make,
    "dora": comparison.METHODS["dora"].make,
    **{name: method.make for name, method in neighbours.NEIGHBOURS.items()},
}


def begun(name: str) -> tuple[nn.Module, Optimizer, torch.Tensor]:
    """A method's model, what steps it, and the token ids of a batch; after what its start asks for."""
    arm: peft.PeftArm = METHODS[name](SETTINGS, SETTINGS["seed"])
    rows = comparison.ordered_rows(SETTINGS["domain"], SETTINGS["seed"], SETTINGS)
    if arm.begin:
        arm.begin(rows)
    trained = [p for p in arm.model.parameters() if p.requires_grad]
    make = arm.optimizer or (lambda _, rate: torch.optim.AdamW(trained, lr=rate))
    optimizer = make(arm.model, SETTINGS["learning_rate"])
    return arm.model.train(), optimizer, rows[: SETTINGS["batch"]]["input_ids"]


def step(model: nn.Module, optimizer: Optimizer, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def counted(name: str) -> dict[str, int]:
    """Of one step: numbers trained, and bytes.

    model: weights and buffers, the adapter's too.    saved: kept from the forward pass for the backward pass.
    peak: the most that the first step allocates on top of the model, gradients and the optimiser's state included.
    optimizer: the state that stays after it.
    """
    model, optimizer, ids = begun(name)
    trained, held = trainable_parameters(model), lab.tensor_bytes(model)
    saved = saved_bytes(model, lambda: model(input_ids=ids, labels=ids, use_cache=False))
    peak = lab.peak_memory(lambda: step(model, optimizer, ids))[1]
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    kept = sum(tensor.nbytes for tensor in state)
    return {"trained": trained, "model": held, "saved": saved, "peak": peak, "optimizer": kept}


def timed() -> dict[str, Any]:
    """Processor seconds of plain LoRA's step, and those of each method over LoRA's, by round."""
    arms = {name: functools.partial(step, *begun(name)) for name in METHODS}
    seconds = race(arms, SETTINGS["rounds"])
    ratios = {
        name: [round(s / plain, 4) for s, plain in zip(times, seconds["lora"], strict=True)]
        for name, times in seconds.items()
    }
    return {"lora_seconds": seconds["lora"], "ratios": ratios}


def body(runs: Runs) -> None:
    torch.set_num_threads(1)
    runs.expect(len(METHODS) + 1)
    for name in METHODS:
        runs(f"bytes/{name}", counted, name)
    runs("times", timed)


def times_loras(record: Mapping[str, Any], name: str, what: str) -> float:
    """A method's bytes of `what` as a multiple of plain LoRA's; "time" is the median over the rounds."""
    runs = record["runs"]
    if what == "time":
        return statistics.median(runs["times"]["ratios"][name])
    return runs[f"bytes/{name}"][what] / runs["bytes/lora"][what]


WITNESS = Witness(
    ("bytes/lora", "bytes/dora", "bytes/lora_fa"),
    dict.fromkeys(("trained", "model", "saved", "peak", "optimizer"), 0),
    "Bytes are counted, the same in every run; times are not compared",
)
STUDY = Study("5_1_costs", SETTINGS, body, WITNESS)
