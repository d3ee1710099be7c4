"""Many adapters in one batch, ours and PEFT's: a forward pass of 16 short prompts whose rows are spread over them."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.bases import config, randomized, sharing_weights
from benchmarks.step import Arm
from lora_course.injection import inject
from lora_course.serving import load_adapters, row_adapters
from lora_course.states import factor_state

ROWS = 16


def prompts(base: nn.Module, size: str) -> torch.Tensor:
    length = 16 if size != "quick" else 4
    generator = torch.Generator().manual_seed(1)
    return torch.randint(base.config.vocab_size, (ROWS, length), generator=generator)


def names(count: int) -> list[str]:
    """Of the adapter of each row."""
    return [str(i % count) for i in range(ROWS)]


def tasks(base: nn.Module, size: str, r: int, count: int) -> Arm:
    states = {
        str(i): factor_state(randomized(inject(sharing_weights(base), config(r)), seed=i))
        for i in range(count)
    }
    model = load_adapters(sharing_weights(base), states)
    arm = Arm(model, prompts(base, size), training=False)
    plain = arm.run

    def run() -> None:
        with row_adapters(model, names(count)):
            plain()

    arm.run = run
    return arm


def peft_tasks(base: nn.Module, size: str, r: int, count: int) -> Arm:
    model = get_peft_model(sharing_weights(base), config(r), adapter_name="0")
    for i in range(1, count):
        model.add_adapter(str(i), config(r))
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            nn.init.normal_(parameter, std=0.02)
    forward = {"adapter_names": names(count)}
    return Arm(model, prompts(base, size), training=False, forward=forward)
