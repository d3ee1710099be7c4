"""Four ways to take an adapter through tasks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_course.checkpoint import restore_adapter, save_adapter
from lora_course.continual.memory import Interleaved, Reservoir, Rows, memory_row, row_bytes
from lora_course.continual.orthogonal import OrthogonalLoRALinear, overlap
from lora_course.injection import adapter_layers, disabled, injection_of, layers_of
from lora_course.lora import AdapterState, LoRALinear
from lora_course.runs import fingerprint, sample_of
from lora_course.states import adapter_state, use_adapter


class Sequential:
    """One adapter, trained on each task where the last one left it. Also the interface: the others change what they need.

    A loop by hand calls, for each task: `before_task`, a training on `training_rows(task.train)` with `penalty` added to the
    loss, `after_task`.
    """

    layer: type[LoRALinear] = LoRALinear
    """What the model must be injected with."""

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where this strategy can't take the model's adapter through tasks."""
        layers_of(model, self.layer)

    def trained_together(self, tasks: Sequence[Rows]) -> list[Rows]:
        """Whose rows may meet in a batch, given each task's: looked at before any work. Here a task's own."""
        return list(tasks)

    def begin(self) -> None:
        """Forget what an earlier run left: called where a run starts."""

    def before_task(self, model: nn.Module, index: int, seed: int) -> None:
        """Prepare the adapter for task number `index`, counted from 0."""

    def training_rows(self, train: Rows) -> Rows:
        """What to train on, given the new task's rows."""
        return train

    def penalty(self, model: nn.Module) -> Tensor:
        """What to add to the loss, once an optimiser step."""
        return torch.zeros(())

    def after_task(self, model: nn.Module, index: int, train: Rows) -> None:
        """Keep what later tasks will need."""

    @contextmanager
    def serving(self, model: nn.Module, index: int) -> Iterator[nn.Module]:
        """Within the block the model is as it serves task `index`."""
        yield model

    def save(self, model: nn.Module, stage: Path) -> None:
        """Write the state after a task into the folder `stage`."""
        save_adapter(model, stage)

    def load(self, model: nn.Module, stages: Sequence[Path]) -> None:
        """Go back to what `save` wrote into the last of `stages`, the folders of all stages up to it."""
        restore_adapter(model, stages[-1])

    def settings(self) -> dict[str, Any]:
        """What was chosen, for the record."""
        chosen: dict[str, Any] = {}
        if dataclasses.is_dataclass(self):
            chosen = dataclasses.asdict(self)
        return {"strategy": type(self).__name__, **chosen}


@dataclasses.dataclass
class Replay(Sequential):
    """Sequential, with rows of earlier tasks mixed into the training on the new one.

    budget_bytes: of the `Reservoir` of earlier rows. share: of the rows trained on, how many come from
    memory, in [0, 1). With the number of steps fixed, the new task then gets 1 − share of the rows that it
    would get alone.
    """

    budget_bytes: int
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(
                f"share={self.share}: a share of 0 or more and less than 1 is expected; 0.5 is half memory, half new."
            )
        self.memory = Reservoir(self.budget_bytes, self.seed)
        self.given: Reservoir | None = None

    def trained_together(self, tasks: Sequence[Rows]) -> list[Rows]:
        """Each task's, and those of all. Raises ValueError where memory could keep none, or rows have other columns than others."""
        before = (self.given or self.memory).rows
        together = [row for rows in (*tasks, before) for row in sample_of(rows)]
        for rows in tasks:
            sizes = [row_bytes(memory_row(row)) for row in sample_of(rows)]
            if sizes and min(sizes) > self.budget_bytes:
                raise ValueError(
                    f"budget_bytes={self.budget_bytes} holds no row: one takes about {min(sizes):,} bytes."
                )
        if len(columns := {tuple(sorted(row)) for row in together}) > 1:
            raise ValueError(
                f"Rows of different tasks have the columns {sorted(map(list, columns))}, and replay puts them into one batch: give all the same."
            )
        return [*tasks, together]

    def settings(self) -> dict[str, Any]:
        """As chosen, and which rows memory held before the first run."""
        before = (self.given or self.memory).rows
        return super().settings() | ({"given": fingerprint(before)} if before else {})

    def begin(self) -> None:
        """What was added before the first run stays: rows that an adapter in service was trained on."""
        if self.given:
            self.memory = copy.deepcopy(self.given)
        self._remember_given()

    def _remember_given(self) -> None:
        self.given = self.given or copy.deepcopy(self.memory)

    def training_rows(self, train: Rows) -> Rows:
        return Interleaved(train, self.memory.rows, self.share)

    def after_task(self, model: nn.Module, index: int, train: Rows) -> None:
        self.memory.add(train, index)

    def save(self, model: nn.Module, stage: Path) -> None:
        super().save(model, stage)
        self.memory.save(stage / "memory.safetensors")

    def load(self, model: nn.Module, stages: Sequence[Path]) -> None:
        super().load(model, stages)
        self._remember_given()
        self.memory.load(stages[-1] / "memory.safetensors")


@dataclasses.dataclass
class Orthogonal(Sequential):
    """O-LoRA: past adapters stay, frozen; a new one joins them under the loss L + strength · `overlap(model, squared)`.

    All adapters act at once, so no task id is needed at test. strength is λ; 0.5 is the default of the
    paper's code, which adds it at each micro-batch. Here it counts once an optimiser step.
    """

    strength: float = 0.5
    squared: bool = False
    layer = OrthogonalLoRALinear

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(
                f"strength={self.strength}: λ must be 0 or more; the paper's code has 0.5."
            )

    def before_task(self, model: nn.Module, index: int, seed: int) -> None:
        if index:
            for layer in layers_of(model, OrthogonalLoRALinear).values():
                layer.freeze()
            restart(model, seed + index)

    def penalty(self, model: nn.Module) -> Tensor:
        return self.strength * overlap(model, self.squared)


class Isolated(Sequential):
    """An adapter of its own for each task, and the task's id known at test; a task not learned yet gets the base.

    states: the tasks' adapters in order, for `use_adapter`, or to be merged.
    """

    def __init__(self) -> None:
        self.states: list[AdapterState] = []

    def check(self, model: nn.Module) -> None:
        super().check(model)
        check_restart(model)

    def begin(self) -> None:
        self.states = []

    def before_task(self, model: nn.Module, index: int, seed: int) -> None:
        if index:
            restart(model, seed + index)

    def after_task(self, model: nn.Module, index: int, train: Rows) -> None:
        self.states[index:] = [adapter_state(model)]

    @contextmanager
    def serving(self, model: nn.Module, index: int) -> Iterator[nn.Module]:
        if index >= len(self.states):
            with disabled(model):
                yield model
            return
        before = adapter_state(model)
        use_adapter(model, self.states[index])
        try:
            yield model
        finally:
            use_adapter(model, before)

    def load(self, model: nn.Module, stages: Sequence[Path]) -> None:
        self.states = []
        for stage in stages:
            super().load(model, [stage])
            self.states.append(adapter_state(model))
        del self.states[0]  # stage 0 is before any task


def check_restart(model: nn.Module) -> None:
    """Raise ValueError where a layer keeps more than `restart` draws anew."""
    for name, layer in adapter_layers(model).items():
        if more := sorted(layer.tensors().keys() - {"A", "B", "scaling", "past_A", "past_B", "P"}):
            raise ValueError(
                f"{name!r} is a {type(layer).__name__}, which keeps {more} beside A and B: drawing these anew would not start it anew. "
                "unload(model) and inject again."
            )


@torch.no_grad()
def restart(model: nn.Module, seed: int) -> None:
    """Start the adapter anew, in place: A drawn as at injection, from `seed`, and B zero. The optimiser must be a new one.

    Raises ValueError for layers that keep more, such as gates or stages.
    """
    check_restart(model)
    start = injection_of(model).config.init_lora_weights
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in adapter_layers(model).values():
            fresh = LoRALinear(layer.base_layer, layer.r, layer.lora_alpha, init_lora_weights=start)
            layer.A.copy_(fresh.A)
            layer.B.copy_(fresh.B)
