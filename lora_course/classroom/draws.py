"""Inputs of a check: one call's arguments, and what draws them afresh."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_course.lora import LoRALinear


@dataclass(frozen=True)
class Case:
    """Arguments of one call, and what to say if this is the first that goes wrong."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    hint: str = ""
    note: Any = None
    largest: int | None = None


def case(
    *positional: Any, hint: str = "", note: Any = None, largest: int | None = None, **keywords: Any
) -> Case:
    """One call: its arguments as one would write them. The module's text says what `hint`, `note` and `largest` are."""
    return Case(positional, keywords, hint, note, largest)


class Draw:
    """Fresh random inputs of a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self.random.randint(low, high)

    def sizes(self, count: int, low: int, high: int) -> list[int]:
        """`count` whole numbers that all differ, both ends included, in random order."""
        return self.random.sample(range(low, high + 1), count)

    def number(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * (high - low) + low

    def order(self, n: int) -> Tensor:
        """A random order of 0 … n − 1."""
        return torch.randperm(n, generator=self.generator)

    def choice(self, values: Sequence[Any]) -> Any:
        return self.random.choice(values)

    def lora(
        self, inputs: int, outputs: int, r: int, *, bias: bool = True, layer=LoRALinear, **arguments
    ) -> LoRALinear:
        """A layer on an `nn.Linear`, all its parameters normal; `lora_alpha` is drawn unless given, and is not r."""
        arguments.setdefault("lora_alpha", self.choice([a for a in range(2, 30) if a != r]))
        made = layer(nn.Linear(inputs, outputs, bias=bias), r=r, **arguments)
        for parameter in made.parameters():
            parameter.data.copy_(self.normal(*parameter.shape))
        return made
