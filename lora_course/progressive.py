"""Progressive LoRA: training in stages, each with fresh factors on top of what the earlier ones left.

    W_k = W₀ + s Σ_{j<k} B_j A_j        (frozen)          y = W_k x + b + s B_k A_k x        (B_k = 0 at its start)

Two ways to keep the earlier stages. **Stack**: beside the base, as factors that no longer train. **Merge-and-restart**:
inside the base weight. Both compute the same function, both keep the factors, and both are in the end *one* LoRA
adapter of rank Σ r_k, since Σ B_j A_j = [B_0 … B_k] [A_0; …; A_k]. The scale s = α/r is one for all stages, whatever
their ranks.

Sources: ReLoRA, arXiv 2307.05695 (merge, fresh factors, moments partly reset, here cleared, learning rate re-warmed from 0);
Chain of LoRA, arXiv 2401.04151 (the same as a sequence of residual problems).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lora_course.checkpoint import load_adapter, read_extra, restore_adapter, save_adapter
from lora_course.injection import adapter_layers, inject, layers_of, merge, unload
from lora_course.linears import is_4bit
from lora_course.lora import AdapterState, LoRALinear, register
from lora_course.states import core_of, factor_state, split_state
from lora_course.training import AdapterTrainer, training_arguments

Mode = Literal["stack", "merge"]
Schedule = Literal["run", "stage"]
SET_BY_STAGES = (
    "output_dir", "learning_rate", "max_steps", "num_train_epochs", "seed", "data_seed", "warmup_steps", "warmup_ratio",
    "lr_scheduler_type", "lr_scheduler_kwargs",
)  # fmt: skip
"""Fields of `TrainingArguments` that the stages decide."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage as data.

    Args:
        r: rank of the fresh factors, ≥ 1.
        target_modules: as in `LoraConfig`; a stage may have other targets than the one before.
        learning_rate: at the end of its warm-up, where the schedule has not decayed yet.
        steps: optimiser steps, ≥ 1.
        warmup: steps over which the learning rate rises from 0; below 1, a share of `steps`.

    Raises:
        ValueError: one of them out of its range.
    """

    r: int
    target_modules: str | Sequence[str] = "all-linear"
    learning_rate: float = 2e-4
    steps: int = 100
    warmup: float = 0.1

    def __post_init__(self) -> None:
        for name in ("r", "steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: a stage needs a whole number of 1 or more; leave an empty stage out."
                )
        if not self.learning_rate > 0:
            raise ValueError(
                f"learning_rate={self.learning_rate!r}: a stage needs a positive rate; it starts from 0 by its warm-up anyway."
            )
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"warmup={self.warmup!r}: a number of steps from 0 to {self.steps} is expected, or a share of them below 1."
            )
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules)))

    @property
    def warmup_steps(self) -> int:
        """The warm-up in whole steps, rounded up."""
        return math.ceil(self.warmup * self.steps if self.warmup < 1 else self.warmup)


@register
class StackedLoRALinear(LoRALinear):
    """A linear layer with frozen LoRA stages and one that trains: `y = base(x) + s · Σ_j B_j A_j x + s · B A dropout(x)`.

    It starts as a `LoRALinear` of one stage. `freeze` puts the trained factors to the frozen ones and `start` makes fresh
    ones, of any rank; the scaling s stays. Dropout is for what trains: a frozen stage acts as if it were merged.

    Args:
        keep_original: the first `merge` copies the base weight to the CPU's memory, so that `unmerge` gives it back to
            the bit. Without, it subtracts, which is exact to rounding only.
        others: as for `LoRALinear`; `use_rslora` is refused, as its scale changes with the rank.

    Attributes:
        A, B: `[r, in]` and `[out, r]`, of the stage that trains; r = 0 where it does not touch this layer.
        frozen_A, frozen_B: buffers `[R, in]`, `[out, R]`: the earlier stages, one after the other.
        ranks: buffer `[number of earlier stages]`, their ranks here, 0 included.
        folded: the base weight holds the frozen stages (merge-and-restart). Merged, it holds the one that trains too.
    """

    supported_fields = LoRALinear.supported_fields - {"use_rslora", "init_lora_weights"}

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        keep_original: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, **fields)
        self.register_buffer("frozen_A", self.A.new_empty(0, self.in_features))
        self.register_buffer("frozen_B", self.B.new_empty(self.out_features, 0))
        self.register_buffer("ranks", torch.empty(0, dtype=torch.long))
        self.keep_original = keep_original
        self.original: Tensor | None = None
        self.folded = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` → `[..., out]`, in the base's type.

        Raises:
            RuntimeError: the layer is switched off while the base weight holds stages.
        """
        y = self.base_layer(x)
        if self.merged:
            return y
        if not self.enabled:
            if self.folded:
                raise RuntimeError(
                    "The base holds earlier stages: switching the adapter off would not remove them. Call merge(model) and unmerge(model) first."
                )
            return y
        A, B = self.A, self.B
        if len(self.frozen_A) and not self.folded:
            if (
                isinstance(self.lora_dropout, nn.Dropout) and self.lora_dropout.training
            ):  # what is frozen is not dropped
                frozen = F.linear(
                    F.linear(x.to(y.dtype), self.frozen_A.to(y.dtype)), self.frozen_B.to(y.dtype)
                )
                y = torch.add(y, frozen.to(y.dtype), alpha=self.scaling)
            else:
                A, B, _ = self.factors()
        return self.add_update(y, x, A, B, self.scaling) if len(A) else y

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`([A_0; …; A_k], [B_0 … B_k], s)`: the one LoRA layer of the summed rank that computes the same update."""
        return (
            torch.cat([self.frozen_A, self.A]),
            torch.cat([self.frozen_B, self.B], 1),
            self.scaling,
        )

    def stages(self) -> list[tuple[Tensor, Tensor]]:
        """`(A_j, B_j)` of every stage in order, the one that trains last."""
        ranks = self.ranks.tolist()
        return [
            *zip(self.frozen_A.split(ranks), self.frozen_B.split(ranks, 1), strict=True),
            (self.A, self.B),
        ]

    @torch.no_grad()
    def freeze(self) -> None:
        """Make the stage that trains the last of the frozen ones. The function stays (to rounding); the rank is 0 until `start`.

        Raises:
            RuntimeError: earlier stages are in the base and this one is not: merge it first.
        """
        if self.folded and not self.merged and self.r:
            raise RuntimeError(
                "The earlier stages are merged into the base and this one is not: call merge(model), then freeze."
            )
        self.frozen_A, self.frozen_B, _ = (
            t.clone() if torch.is_tensor(t) else t for t in self.factors()
        )
        self.ranks = torch.cat([self.ranks, self.ranks.new_tensor([self.r])])
        self.merged = False  # nothing trains: what the base holds are frozen stages
        self.start(0)

    @torch.no_grad()
    def start(self, r: int, generator: torch.Generator | None = None) -> None:
        """Replace the factors that train by fresh ones of rank r ≥ 0: `A` Kaiming-uniform, `B` zero, new parameters.

        New parameters, so that no optimiser holds moments for them. They are drawn on the CPU: equal on every device.

        Raises:
            RuntimeError: the layer is merged.
        """
        if self.merged:
            raise RuntimeError(
                "This layer is merged: fresh factors would make the base's share of the old ones untraceable. Call freeze() first."
            )
        A = torch.empty(r, self.in_features)
        if r:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(A.to(self.A.device), self.A.requires_grad)
        self.B = nn.Parameter(
            torch.zeros(self.out_features, r, device=self.B.device), self.B.requires_grad
        )
        self.r, self.lora_alpha = r, self.scaling * r

    @torch.no_grad()
    def merge(self) -> None:
        """Add to the base weight, in fp32 and stage by stage, what is not in it yet. Raises as `LoRALinear.merge`."""
        self.check_merge("this layer")
        if self.keep_original and self.original is None:
            self.original = self.base_layer.weight.detach().to("cpu", copy=True)
        for A, B in self.stages()[-1:] if self.folded else self.stages():
            if A.shape[0]:
                self._add_to_base(self.scaling * (B @ A))
        self.merged = self.folded = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all stages out of the base weight: to the bit with `keep_original`, else to rounding."""
        if not self.merged:
            raise RuntimeError(
                "This layer is not merged: there is nothing to take back. Call merge() first."
            )
        if self.original is not None:
            self.base_layer.weight.copy_(self.original)
        else:
            self._add_to_base(-self.delta_weight())
        self.merged = self.folded = False

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        """As `LoRALinear`; and frozen stages that fit, and are those in the base where it holds some."""
        super().check_tensors(name, tensors)
        A, B, ranks = tensors["frozen_A"], tensors["frozen_B"], tensors["ranks"]
        if A.shape != (int(ranks.sum()), self.in_features) or B.shape != (
            self.out_features,
            A.shape[0],
        ):
            raise ValueError(
                f"The frozen stages for {name!r} are A {list(A.shape)}, B {list(B.shape)} of ranks {ranks.tolist()}; A [Σ ranks, "
                f"{self.in_features}] and B [{self.out_features}, Σ ranks] are expected: it was made for another base model."
            )
        same = (
            A.shape == self.frozen_A.shape
            and torch.equal(A.to(self.frozen_A), self.frozen_A)
            and torch.equal(B.to(self.frozen_B), self.frozen_B)
        )
        if self.folded and not same:
            raise ValueError(
                f"The base weight of {name!r} holds other stages than this adapter's: load the base again."
            )

    def extra_repr(self) -> str:
        return f"frozen={self.ranks.tolist()}, {super().extra_repr()}, folded={self.folded}"


def inject_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    scaling: float = 2.0,
    lora_dropout: float = 0.0,
    keep_original: bool = False,
) -> nn.Module:
    """Wrap every layer that some stage targets in an empty `StackedLoRALinear` (rank 0), in place; `begin_stage` is next.

    scaling: s = α/r, for all stages: a stage of rank r has α = s·r.
    Raises as `inject`, for the first stage that does not fit, before anything is changed.
    """
    targets: set[str] = set()
    for stage in stages:
        targets |= set(
            adapter_layers(inject(model, LoraConfig(r=1, target_modules=_modules(stage))))
        )
        unload(model)
    config = LoraConfig(
        r=1,
        lora_alpha=scaling,
        lora_dropout=lora_dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
    )
    inject(model, config, StackedLoRALinear, keep_original=keep_original)
    for layer in adapter_layers(model).values():
        layer.start(0)
    return model


def begin_stage(model: nn.Module, stage: Stage, seed: int = 0) -> nn.Module:
    """Freeze what trained so far and give the stage's targets fresh factors, the same for the same seed.

    The function stays as it was, to rounding. Make a new optimiser afterwards: these are new parameters. In
    merge-and-restart call `merge(model)` before this one.

    Raises:
        ValueError: the model is not injected with `StackedLoRALinear`, or lacks the stage's targets.
    """
    layers = layers_of(model, StackedLoRALinear)
    probe = LoraConfig(target_modules=_modules(stage))
    targets = {name for name in layers if check_target_module_exists(probe, name)}
    if str(stage.target_modules).lower() == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        targets = {name for name, layer in layers.items() if layer is not head}
    if not targets:
        raise ValueError(
            f"target_modules={stage.target_modules!r} matches no layer that inject_stages has prepared: give it all stages at once."
        )
    if any(layer.r for layer in layers.values()):
        for layer in layers.values():
            layer.freeze()
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        layer.start(stage.r if name in targets else 0, generator)
    return model


def multiplier(stages: Sequence[Stage], index: int, step: int, schedule: Schedule = "run") -> float:
    """What a stage's learning rate is multiplied by at its optimiser step `step` (from 0): warm-up times linear decay.

    "run": one decay over the steps of all stages, a line where ReLoRA's jagged schedule has a cosine: with t the step in
    the whole run, T its length, w the warm-ups, `min(1, step/w_index) · min(1, (T − t)/(T − w_0))`. "stage": each stage
    decays to 0 by itself.
    With one stage both are transformers' linear schedule.
    """
    stage = stages[index]
    first, before, total = (
        stages[0],
        sum(s.steps for s in stages[:index]),
        sum(s.steps for s in stages),
    )
    if schedule == "stage":
        first, before, total = stage, 0, stage.steps
    warm = min(1.0, step / stage.warmup_steps) if stage.warmup_steps else 1.0
    return warm * max(0.0, min(1.0, (total - before - step) / max(1, total - first.warmup_steps)))


class StageTrainer(AdapterTrainer):
    """`AdapterTrainer` with the learning rate of one stage of several; all else, resuming included, is as there."""

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        stages: Sequence[Stage],
        index: int,
        schedule: Schedule,
        **arguments: Any,
    ) -> None:
        super().__init__(model, args, **arguments)
        self.stages, self.index, self.schedule = stages, index, schedule

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: multiplier(self.stages, self.index, step, self.schedule),
        )
        return self.lr_scheduler


def train_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    dataset: datasets.Dataset | Sequence[datasets.Dataset],
    output_dir: str | Path,
    mode: Mode = "stack",
    *,
    scaling: float = 2.0,
    schedule: Schedule = "run",
    seed: int = 0,
    lora_dropout: float = 0.0,
    keep_original: bool = False,
    trainer: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Train `model` through all stages, in place. Killed at any point, the same command goes on to the same weights.

    Each stage has an optimiser of its own, so no moment of the stage before is left, and a learning rate that starts at
    0. Its factors come from `seed + 1000 · index`, and so does the order of its rows.

    Args:
        model: the plain base, as loaded; after a kill too. "stack" never writes to it.
        dataset: one for all stages, or one for each.
        output_dir: gets `start/` (the plan), `stage-0/`, `stage-1/`, …: stage k's folder holds stages 0 to k. Checkpoints
            within a stage lie in `stage-k/checkpoints/` until it is finished.
        mode: "stack" keeps the earlier stages as frozen factors beside the base. "merge" adds each to the base weight
            when it ends; at the end the model is merged, and `unmerge` takes all stages out again.
        scaling: s = α/r of every stage.    schedule: see `multiplier`.
        keep_original: for "merge", see `StackedLoRALinear`. Costs a copy of every target's weight.
        trainer: arguments of `AdapterTrainer` (`callbacks`, `data_collator`, `auxiliary_loss`, …).
        arguments: fields of `TrainingArguments` that hold in all stages (`per_device_train_batch_size`, `save_steps`,
            `gradient_checkpointing`, …) and `device`.

    Returns:
        For each stage what its folder keeps: `{"stage", "mode", "history": [{"step", "loss"}, …]}`.

    Raises:
        ValueError: an unknown mode or schedule, no stage, datasets that don't match, a field that the stages decide, a
            folder of another plan; and as `inject`. TypeError: "merge" on a 4-bit base. Nothing has been changed then.

    Warns:
        UserWarning: "merge" on a half-precision base, or a folder begun on other base weights.
    """
    stages, folder = list(stages), Path(output_dir)
    rows = _check(stages, dataset, mode, schedule, arguments)
    plan = json.loads(json.dumps({
        "mode": mode, "stages": [dataclasses.asdict(stage) for stage in stages], "scaling": scaling, "schedule": schedule,
        "seed": seed, "lora_dropout": lora_dropout, "rows": [len(part) for part in rows],
    }))  # fmt: skip
    started = (folder / "start" / "adapter.json").is_file()
    if started and (old := read_extra(folder / "start")) != plan:
        differing = sorted(key for key in plan if plan[key] != old.get(key))
        raise ValueError(
            f"{folder} was begun with another {', '.join(differing)}: {', '.join(str(old.get(key)) for key in differing)}. "
            "Repeat the command that began it, or choose another output_dir."
        )
    inject_stages(model, stages, scaling, lora_dropout, keep_original)
    try:
        if mode == "merge":
            _check_mergeable(model)
        if started:
            restore_adapter(model, folder / "start")  # warns of another base
    except Exception:
        unload(model)
        raise
    if not started:
        save_adapter(model, folder / "start", plan)
    finished = _finished(folder)
    if finished:
        restore_adapter(model, finished[-1])
        if mode == "merge":
            merge(
                model
            )  # stage by stage, and so the very weights that an uninterrupted run has here
    for index in range(len(finished), len(stages)):
        stage, stage_seed = stages[index], seed + 1000 * index
        begin_stage(model, stage, stage_seed)
        args = training_arguments(
            folder / f"stage-{index}" / "checkpoints",
            learning_rate=stage.learning_rate,
            max_steps=stage.steps,
            seed=stage_seed,
            **arguments,
        )
        running = StageTrainer(
            model, args, stages, index, schedule, train_dataset=rows[index], **(trainer or {})
        )
        running.train(resume_from_checkpoint=True)
        if mode == "merge":
            merge(model)
        save_adapter(
            model,
            folder / f"stage-{index}",
            {"stage": index, "mode": mode, "history": running.history},
        )
        shutil.rmtree(args.output_dir)
    return [read_extra(path) for path in _finished(folder)]


def load_stage(model: nn.Module, output_dir: str | Path, stage: int | None = None) -> nn.Module:
    """Inject into the plain `model` the stages 0 to `stage` (the last finished one by default) of a `train_stages` folder.

    The base is not written to, in either mode: the stages act beside it. `checkpoint.export_peft` then writes them as one
    LoRA adapter. Raises FileNotFoundError for a stage that is not finished, and as `checkpoint.load_adapter`.
    """
    finished = _finished(Path(output_dir))
    index = len(finished) - 1 if stage is None else stage
    if not 0 <= index < len(finished):
        raise FileNotFoundError(
            f"{output_dir} has no finished stage {stage}; finished are {list(range(len(finished)))}. Run train_stages again to go on."
        )
    return load_adapter(model, finished[index])


def stage_states(model: nn.Module) -> list[AdapterState]:
    """Each stage of a stacked `model` as a plain LoRA state, in order: to be weighed, left out or concatenated again."""
    states: list[AdapterState] = []
    for name, layer in adapter_layers(model).items():
        for index, (A, B) in enumerate(layer.stages()):
            if index == len(states):
                states.append({})
            if A.shape[0]:
                scaling = torch.tensor(layer.scaling, dtype=torch.float64)
                states[index] |= {
                    f"{name}.A": A.detach().clone(),
                    f"{name}.B": B.detach().clone(),
                    f"{name}.scaling": scaling,
                }
    return states


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """The singular values of each module's accumulated update ΔW, largest first: `[min(Σr, in, out)]`, in float64.

    From the factors: ΔW = s B A has those of R_B R_Aᵀ, where Q_B R_B = s B and Q_A R_A = Aᵀ. No `[out, in]` matrix is
    formed, and nothing is subtracted from a trained weight: what the base was does not matter.
    """
    values = {}
    for name, tensors in split_state(factor_state(model)).items():
        if tensors["A"].shape[0]:
            _, core, _ = core_of(tensors["A"], tensors["B"], float(tensors["scaling"]))
            values[name] = torch.linalg.svdvals(core)
    return values


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007): from 1 to their number."""
    shares = values[values > 0] / values.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def _modules(stage: Stage) -> str | list[str]:
    return (
        stage.target_modules
        if isinstance(stage.target_modules, str)
        else list(stage.target_modules)
    )


def _finished(folder: Path) -> list[Path]:
    """Folders of the finished stages, from 0 on. A stage is finished when its adapter.json, written last, is there."""
    found: list[Path] = []
    while (path := folder / f"stage-{len(found)}" / "adapter.json").is_file():
        found.append(path.parent)
    return found


def _check(
    stages: list[Stage],
    dataset: datasets.Dataset | Sequence[datasets.Dataset],
    mode: str,
    schedule: str,
    arguments: dict[str, Any],
) -> list[datasets.Dataset]:
    if mode not in ("stack", "merge"):
        raise ValueError(
            f"mode={mode!r}: 'stack' (earlier stages frozen beside the base) or 'merge' (added to the base) is expected."
        )
    if schedule not in ("run", "stage"):
        raise ValueError(
            f"schedule={schedule!r}: 'run' (one decay over all stages) or 'stage' (one in each) is expected."
        )
    if not stages:
        raise ValueError(
            "No stage is given: stages=[Stage(r=8, learning_rate=2e-4, steps=100), …] is expected."
        )
    if taken := sorted(set(arguments) & set(SET_BY_STAGES)):
        raise ValueError(
            f"{', '.join(taken)}: decided by the stages, seed, schedule and output_dir of train_stages; set it there."
        )
    rows = list(dataset) if isinstance(dataset, list | tuple) else [dataset] * len(stages)
    if len(rows) != len(stages):
        raise ValueError(
            f"{len(rows)} datasets for {len(stages)} stages: give one for all stages, or one for each."
        )
    return rows


def _check_mergeable(model: nn.Module) -> None:
    layers = adapter_layers(model)
    for name, layer in layers.items():
        if is_4bit(layer.base_layer):
            raise TypeError(
                f"The base of {name!r} is 4-bit: mode='merge' would round the sum to 16 values a block at every stage. Use mode='stack', "
                "which computes the same and leaves the base alone, or load the base in fp32."
            )
        layer.check_merge(name)
    halves = {layer.base_layer.weight.dtype for layer in layers.values()} & {
        torch.bfloat16,
        torch.float16,
    }
    if halves:
        warnings.warn(
            f"The base is in {', '.join(map(str, halves))}: each merge rounds the sum to it, and what is smaller than half a "
            "step of a weight is lost. Load the base in fp32, or use mode='stack'.",
            stacklevel=3,
        )
