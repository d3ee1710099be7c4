"""Continual learning: tasks one after another, and what is left of the first when the last is done.

    R[i, j] = score on task j after i tasks, i = 0 … T, j = 1 … T            row 0: before any task
    ACC = 1/T Σⱼ R[T, j]        BWT = 1/(T−1) Σ_{j<T} (R[T, j] − R[j, j])        FWT = 1/(T−1) Σ_{j>1} (R[j−1, j] − R[0, j])

Source of the three: GEM, arXiv 1706.08840; its b̄, the score of an untrained model, is row 0 here. They are
written for scores of which more is better. `metrics` turns the signs of BWT and FWT for scores of which less
is better, such as bits a byte or the loss: a negative BWT is forgetting either way. ACC stays what it is, the
mean score.

`learn` takes the tasks through one strategy: `Sequential` (one adapter trained on and on), `Replay` (with
rows of earlier tasks mixed in), `Orthogonal` (O-LoRA: earlier adapters frozen, the new one pushed into
another subspace), `Isolated` (one adapter a task). It can be killed at any time; the same call goes on where
it was.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments, default_data_collator

from lora_course.checkpoint import restore_adapter, save_adapter
from lora_course.injection import adapter_layers, disabled, injection_of
from lora_course.lora import AdapterState, LoRALinear, register
from lora_course.states import adapter_state, use_adapter
from lora_course.training import AdapterTrainer

Rows = Sequence[Mapping[str, Any]]
"""Rows for a causal LM: `input_ids`, `labels`, …, each a tensor or a list of numbers; a `datasets.Dataset` is one."""
RECORD = "continual.json"
TRAINED_WITH = (
    "seed", "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps",
)  # fmt: skip
"""The training arguments that a record holds, so that results of different settings can't end up in one matrix."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a sequence.

    name: unlike the others'. train: its rows. evaluate: a function of the model that gives a score, or
    held-out rows, of which `mean_loss` is the score (nats a token, less is better).
    """

    name: str
    train: Rows
    evaluate: Callable[[nn.Module], float] | Rows


@dataclasses.dataclass(frozen=True)
class Results:
    """`names`: of the T tasks, in order. `matrix`: R, `[T + 1, T]` float64; row 0 is before any task."""

    names: list[str]
    matrix: Tensor


# ------------------------------------------------------------------------------------------------- memory


class Reservoir:
    """A uniform sample of all rows it was ever offered, in no more than `budget_bytes` bytes.

    Each row draws a number from U(0, 1); the rows of the smallest numbers are kept, as many as fit. Rows of
    equal size are then kept with equal probability whenever they came, as in Vitter's reservoir. Where sizes
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
            row = _kept(rows[i])
            place = bisect.bisect(self.numbers, number)
            self.numbers.insert(place, number)
            self.rows.insert(place, row)
            self.sources.insert(place, source)
            self.nbytes += _size(row)
            while self.nbytes > self.budget_bytes:
                self.limit = self.numbers.pop()
                self.sources.pop()
                self.nbytes -= _size(self.rows.pop())
        if len(rows) and not self.rows:
            size = _size(_kept(rows[0]))
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
        self.nbytes = sum(map(_size, self.rows))


class Interleaved(Dataset):
    """`rows` and, repeated as often as it takes, `memory`, so that `share` of all is memory; a shuffled batch mixes both."""

    def __init__(self, rows: Rows, memory: Rows, share: float) -> None:
        self.rows, self.memory = rows, memory
        self.replayed = round(len(rows) * share / (1 - share)) if len(memory) else 0

    def __len__(self) -> int:
        return len(self.rows) + self.replayed

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        replayed = index - len(self.rows)
        return _tensors(
            self.rows[index] if replayed < 0 else self.memory[replayed % len(self.memory)]
        )


# --------------------------------------------------------------------------------------------- the layer of O-LoRA


@register
class OrthogonalLoRALinear(LoRALinear):
    """A LoRA layer that keeps the adapters of earlier tasks beside the one that is trained (O-LoRA, arXiv 2310.14152).

        y = base(x) + (Σ_{i<t} sᵢ Bᵢ Aᵢ + s · B_t A_t) dropout(x)

    Buffers: past_A `[Σ rᵢ, in]`, past_B `[out, Σ rᵢ]`, fp32, sᵢ within past_B. They are no parameters: no
    optimiser sees them.
    """

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, **arguments: Any) -> None:
        super().__init__(base_layer, r, lora_alpha, **arguments)
        self.register_buffer("past_A", self.A.detach()[:0].clone())
        self.register_buffer("past_B", self.B.detach()[:, :0].clone())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """All adapters as one: A `[Σ rᵢ + r, in]`, B `[out, Σ rᵢ + r]`, scaling 1."""
        return (
            torch.cat([self.past_A, self.A]),
            torch.cat([self.past_B, self.scaling * self.B], 1),
            1.0,
        )

    @torch.no_grad()
    def freeze(self) -> None:
        """Put the trained adapter behind the past ones; what it adds to the output stays until A and B change."""
        self.past_A = torch.cat([self.past_A, self.A])
        self.past_B = torch.cat([self.past_B, self.scaling * self.B], 1)

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        """As `LoRALinear`, and that the past factors fit as well."""
        super().check_tensors(name, tensors)
        A, B = tensors["past_A"], tensors["past_B"]
        if A.shape[1:] != (self.in_features,) or B.shape != (self.out_features, A.shape[0]):
            raise ValueError(
                f"The past factors for {name!r} are A {list(A.shape)} and B {list(B.shape)}; this layer needs "
                f"A [R, {self.in_features}] and B [{self.out_features}, R]: they were made for another base model."
            )


def overlap(model: nn.Module, squared: bool = False) -> Tensor:
    """Σ over layers, past tasks i and entries of |Aᵢ A_tᵀ|, or of its square; 0 iff each new row is orthogonal to all past ones.

    The paper squares the entries; its code (cmnfriend/O-LoRA) takes their absolute values, and so does this.
    Both are zero together, but the absolute value keeps its pull as an entry gets small and the square does
    not.
    """
    layers = [
        layer for layer in adapter_layers(model).values() if isinstance(layer, OrthogonalLoRALinear)
    ]
    products = [layer.past_A @ layer.A.t() for layer in layers if len(layer.past_A)]
    sums = [(product.square() if squared else product.abs()).sum() for product in products]
    return (
        torch.stack([part.to(sums[0].device) for part in sums]).sum() if sums else torch.zeros(())
    )


# --------------------------------------------------------------------------------------------------- strategies


class Sequential:
    """One adapter, trained on each task where the last one left it. Also the interface: the others change what they need.

    A loop by hand calls, for each task: `begin`, a training on `rows(task.train)` with `penalty` added to the
    loss, `end`.
    """

    layer: type[LoRALinear] = LoRALinear
    """What the model must be injected with."""

    def begin(self, model: nn.Module, index: int, seed: int) -> None:
        """Prepare the adapter for task number `index`, counted from 0."""

    def rows(self, train: Rows) -> Rows:
        """What to train on, given the new task's rows."""
        return train

    def penalty(self, model: nn.Module) -> Tensor:
        """What to add to the loss, once an optimiser step."""
        return torch.zeros(())

    def end(self, model: nn.Module, index: int, train: Rows) -> None:
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
        chosen = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}
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

    def rows(self, train: Rows) -> Rows:
        return Interleaved(train, self.memory.rows, self.share)

    def end(self, model: nn.Module, index: int, train: Rows) -> None:
        self.memory.add(train, index)

    def save(self, model: nn.Module, stage: Path) -> None:
        super().save(model, stage)
        self.memory.save(stage / "memory.safetensors")

    def load(self, model: nn.Module, stages: Sequence[Path]) -> None:
        super().load(model, stages)
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

    def begin(self, model: nn.Module, index: int, seed: int) -> None:
        if index:
            for layer in adapter_layers(model).values():
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

    def begin(self, model: nn.Module, index: int, seed: int) -> None:
        if index:
            restart(model, seed + index)

    def end(self, model: nn.Module, index: int, train: Rows) -> None:
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


@torch.no_grad()
def restart(model: nn.Module, seed: int) -> None:
    """Start the adapter anew, in place: A drawn as at injection, from `seed`, and B zero. The optimiser must be a new one."""
    start = injection_of(model).config.init_lora_weights
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in adapter_layers(model).values():
            fresh = LoRALinear(layer.base_layer, layer.r, layer.lora_alpha, init_lora_weights=start)
            layer.A.copy_(fresh.A)
            layer.B.copy_(fresh.B)


# ------------------------------------------------------------------------------------------------------- learning


def learn(
    model: nn.Module,
    tasks: Sequence[Task],
    strategy: Sequential,
    args: TrainingArguments,
    **trainer: Any,
) -> Results:
    """Train `model` on one task after another and score it on all of them before, between and after.

    Called again with the same arguments after a kill, it goes on: between tasks always, within one from its
    last checkpoint (`args.save_steps`), to the same weights and the same R. Called with tasks added at the
    end, it learns those and fills their column in earlier rows too. Each task starts with a new optimiser and
    the schedule of `args`.

    Args:
        model: injected with `strategy.layer`; changed in place. It ends as after the last task, in eval mode.
        tasks: in the order of learning.
        strategy: it holds what the method keeps, such as `Replay.memory`.
        args: from `training_arguments`; `args.output_dir` will hold `continual.json` (R and the settings) and `stage-i`, the
            adapter and memory after i tasks: JSON and safetensors. Checkpoints within a task go when it is done.
        trainer: passed on to `AdapterTrainer`, such as `data_collator` or `callbacks`.

    Raises:
        ValueError: no adapter, another layer, tasks without or of equal names; a folder that holds something else.
    """
    _check(model, tasks, strategy)
    folder, names = Path(args.output_dir), [task.name for task in tasks]
    settings = {**strategy.settings(), **{name: getattr(args, name) for name in TRAINED_WITH}}
    record = _open(folder, names, settings)
    stages = [folder / f"stage-{i}" for i in range(len(tasks) + 1)]
    record["matrix"] += [{} for _ in stages[len(record["matrix"]) :]]
    for i, stage in enumerate(stages):
        row = record["matrix"][i]
        missing = [j for j, name in enumerate(names) if name not in row]
        if i >= record["stages"]:
            if i:
                # From files even if the model is as it was saved: an interrupted run and another take the same path.
                strategy.load(model, stages[:i])
                _train(model, tasks[i - 1], i - 1, strategy, args, trainer)
            strategy.save(model, stage)
            record["stages"] = i + 1
            _write(folder, record)
            shutil.rmtree(folder / f"training-{i}", ignore_errors=True)
        elif missing:
            strategy.load(model, stages[: i + 1])
        for j in missing:
            with strategy.serving(model.eval(), j):
                row[names[j]] = score(model, tasks[j])
        if missing:
            _write(folder, record)
    strategy.load(model.eval(), stages)
    return load_results(folder)


def load_results(output_dir: str | Path) -> Results:
    """What `learn` has measured so far; cells that are still to come are NaN."""
    record = json.loads((Path(output_dir) / RECORD).read_text())
    rows = [[row.get(name, float("nan")) for name in record["tasks"]] for row in record["matrix"]]
    return Results(record["tasks"], torch.tensor(rows, dtype=torch.float64))


def metrics(matrix: Tensor, higher_is_better: bool = False) -> dict[str, float]:
    """ACC, BWT and FWT of R `[T + 1, T]`, row 0 before any task (see the head of this module). Positive BWT, FWT: better.

    Raises ValueError for another shape, fewer than two tasks, or a cell that is not measured.
    """
    tasks = matrix.shape[-1]
    if (
        matrix.ndim != 2
        or matrix.shape[0] != tasks + 1
        or tasks < 2
        or not torch.isfinite(matrix).all()
    ):
        raise ValueError(
            f"The matrix is {list(matrix.shape)}: [T + 1, T] is expected, T of 2 or more, and every cell finite."
        )
    sign = 1 if higher_is_better else -1
    start, learned = matrix[0], matrix[1:]
    diagonal, ahead = learned.diagonal(), learned.diagonal(1)
    return {
        "ACC": learned[-1].mean().item(),
        "BWT": sign * (learned[-1] - diagonal)[:-1].mean().item(),
        "FWT": sign * (ahead - start[1:]).mean().item(),
    }


def score(model: nn.Module, task: Task) -> float:
    """The task's score of the model as it stands."""
    return (
        float(task.evaluate(model)) if callable(task.evaluate) else mean_loss(model, task.evaluate)
    )


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Rows, batch_size: int = 8) -> float:
    """Mean −log p a token over `rows` of equal length, in nats; labels of −100 don't count. The mode is left as it was."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, tokens = 0.0, 0
    for batch in DataLoader(rows, batch_size, collate_fn=default_data_collator):
        count = int((batch["labels"][:, 1:] != -100).sum())
        batch = {name: value.to(device) for name, value in batch.items()}
        total += model(**batch, use_cache=False).loss.item() * count
        tokens += count
    model.train(was_training)
    return total / tokens


def _train(
    model: nn.Module,
    task: Task,
    index: int,
    strategy: Sequential,
    args: TrainingArguments,
    arguments: dict[str, Any],
) -> None:
    own = copy.copy(args)
    own.output_dir = str(Path(args.output_dir) / f"training-{index + 1}")
    strategy.begin(model, index, args.seed)
    rows = strategy.rows(task.train)
    trainer = AdapterTrainer(
        model, own, train_dataset=rows, auxiliary_loss=strategy.penalty, **arguments
    )
    trainer.train(resume_from_checkpoint=True)
    strategy.end(model, index, task.train)


def _check(model: nn.Module, tasks: Sequence[Task], strategy: Sequential) -> None:
    for name, layer in adapter_layers(model).items():
        if not isinstance(layer, strategy.layer):
            wanted = strategy.layer.__name__
            raise ValueError(
                f"{type(strategy).__name__} needs {wanted}, and {name!r} is a {type(layer).__name__}: inject(model, config, {wanted})."
            )
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names) or not all(len(task.train) for task in tasks):
        raise ValueError(
            f"tasks={names}: one or more are expected, each of another name and with rows to train on."
        )


def _open(folder: Path, names: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    path = folder / RECORD
    if not path.exists():
        if found := sorted(
            path.name for pattern in ("stage-*", "training-*") for path in folder.glob(pattern)
        ):
            raise ValueError(
                f"{folder} holds {found[:3]} but no {RECORD}: give a new output_dir, or empty this one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        record = {"tasks": names, "settings": settings, "stages": 0, "matrix": []}
        _write(folder, record)
        return record
    record = json.loads(path.read_text())
    if record["settings"] != settings or names[: len(record["tasks"])] != record["tasks"]:
        raise ValueError(
            f"{path} is of the tasks {record['tasks']} with {record['settings']}; asked for are {names} with {settings}. "
            "Tasks may be added at the end; for anything else give a new output_dir."
        )
    return record | {"tasks": names}


def _write(folder: Path, record: dict[str, Any]) -> None:
    unfinished = folder / f"{RECORD}.unfinished"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, folder / RECORD)


def _tensors(row: Mapping[str, Any]) -> dict[str, Tensor]:
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


def _kept(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A copy of a row as memory holds it: whole numbers as int32."""
    return {n: t if t.is_floating_point() else t.to(torch.int32) for n, t in _tensors(row).items()}


def _size(row: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in row.values())
