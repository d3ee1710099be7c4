"""What is kept of earlier tasks' rows, and how it is mixed into training."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset


class Rows(Protocol):
    """Rows for a causal LM: `input_ids`, `labels`, …, each a tensor or a list of numbers; a list of them, or a
    `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Reservoir:
    """A uniform sample of all rows it was ever offered, in no more than `budget_bytes` bytes.

    Each row draws a number from U(0, 1); the rows of the smallest numbers are kept, as many as fit. A row that is larger
    than the whole budget counts as not offered. Rows of equal size are then kept with equal probability whenever they came, as in Vitter's reservoir. Where sizes
    differ, a number that was once dropped shuts out all larger ones: else small and late rows would fill the
    gaps, and the sample lean to them.

    budget_bytes: of the rows' tensors as kept: whole numbers in 4 bytes, floats as they come. seed: of the
    numbers.

    Attributes: rows: copies, never views of what was offered.    sources: for each row the index of its task.
    seen: how many were offered.    nbytes: how much of the budget is used.
    """

    def __init__(self, budget_bytes: int, seed: int = 0) -> None:
        if budget_bytes < 1:
            raise ValueError(
                f"budget_bytes={budget_bytes}: a positive number of bytes is expected."
            )
        self.budget_bytes = budget_bytes
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: list[dict[str, Tensor]] = []
        self.sources: list[int] = []
        self.numbers: list[float] = []
        self.limit, self.seen, self.nbytes = 1.0, 0, 0

    def add(self, rows: Rows, source: int = 0) -> None:
        """Offer each of `rows`. Raises ValueError for a column that holds no numbers, and if not one row fits the budget."""
        numbers = torch.rand(len(rows), generator=self.generator, dtype=torch.float64).tolist()
        self.seen += len(rows)
        for i, number in enumerate(numbers):
            if number >= self.limit:
                continue
            row = memory_row(rows[i])
            if row_bytes(row) > self.budget_bytes:
                continue  # it can't be kept, and would shut out what can
            place = bisect.bisect(self.numbers, number)
            self.numbers.insert(place, number)
            self.rows.insert(place, row)
            self.sources.insert(place, source)
            self.nbytes += row_bytes(row)
            while self.nbytes > self.budget_bytes:
                self.limit = self.numbers.pop()
                self.sources.pop()
                self.nbytes -= row_bytes(self.rows.pop())
        if len(rows) and not self.rows:
            size = row_bytes(memory_row(rows[0]))
            raise ValueError(
                f"budget_bytes={self.budget_bytes} holds no row: one takes about {size:,} bytes."
            )

    def save(self, path: Path) -> None:
        """Everything the memory is, to one safetensors file."""
        tensors = {
            f"{i}.{name}": value for i, row in enumerate(self.rows) for name, value in row.items()
        }
        tensors["numbers"] = torch.tensor([*self.numbers, self.limit], dtype=torch.float64)
        tensors["counts"] = torch.tensor([*self.sources, self.seen], dtype=torch.int64)
        save_file(tensors | {"generator": self.generator.get_state()}, path)

    def load(self, path: Path) -> None:
        """Take over what `save` wrote."""
        tensors = load_file(path)
        *self.numbers, self.limit = tensors.pop("numbers").tolist()
        *self.sources, self.seen = tensors.pop("counts").tolist()
        self.generator.set_state(tensors.pop("generator"))
        self.rows = [{} for _ in self.numbers]
        for key, value in tensors.items():
            place, _, name = key.partition(".")
            self.rows[int(place)][name] = value
        self.nbytes = sum(map(row_bytes, self.rows))


class Interleaved(Dataset):
    """`rows` and, repeated as often as it takes, `memory`, so that `share` of all is memory; a shuffled batch mixes both."""

    def __init__(self, rows: Rows, memory: Rows, share: float) -> None:
        self.rows, self.memory = rows, memory
        self.replayed = round(len(rows) * share / (1 - share)) if len(memory) else 0

    def __len__(self) -> int:
        return len(self.rows) + self.replayed

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        replayed = index - len(self.rows)
        return tensor_row(
            self.rows[index] if replayed < 0 else self.memory[replayed % len(self.memory)]
        )


def tensor_row(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A copy of a row; whole numbers as int64, which embeddings and losses take."""
    copies = {}
    for name, value in row.items():
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"The column {name!r} holds {type(value).__name__}, no numbers: leave it out with remove_columns."
            ) from None
        copies[name] = (
            tensor.clone() if tensor.is_floating_point() else tensor.to(torch.int64, copy=True)
        )
    return copies


def memory_row(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A copy of a row as memory holds it: whole numbers as int32."""
    return {
        n: t if t.is_floating_point() else t.to(torch.int32) for n, t in tensor_row(row).items()
    }


def row_bytes(row: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in row.values())
