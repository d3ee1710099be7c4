"""Training of injected models: the precision that pays on a device, sane arguments, and a Trainer for adapters."""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
    trainer,
)
from transformers.trainer_utils import TrainOutput

from lora_course.checkpoint import restore_adapter, save_adapter
from lora_course.injection import adapter_layers

COMPLETE = "complete.json"  # written into a checkpoint's folder when all else is in it
TRAINER_STATE = "trainer_state.json"
PREPARED = (
    "forward",
    "_original_forward",
    "_is_accelerate_prepared",
)  # what accelerate sets on a model it wraps


def compute_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """The dtype in which matrix products are fastest on a device without losing training: bf16 where the hardware has it
    (GPUs from Ampere on; CPUs with AVX512-BF16 or AMX), fp16 on older GPUs, fp32 on other CPUs, which only emulate bf16.

    device: the GPU where there is one, else the CPU, by default.
    """
    kind = _device_type(device)
    if kind == "cuda":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return torch.bfloat16 if native else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if kind == "cpu" and fast else torch.float32


def training_arguments(
    output_dir: str | Path, device: str | torch.device | None = None, **overrides: Any
) -> TrainingArguments:
    """`TrainingArguments` that suit an adapter: seeded data and dropout, the loss logged at every step, nothing reported to
    a service, autocast in `compute_dtype(device)`, AdamW at 2e-4 (arXiv 2305.14314) after 5% of warm-up, small
    checkpoints every 100 steps and at the end, of which two are kept.

    device: where to train, as in `compute_dtype`. overrides: any field of `TrainingArguments`.
    """
    kind, dtype = _device_type(device), compute_dtype(device)
    defaults: dict[str, Any] = {
        "seed": 0,
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # or a loss of NaN is logged as the mean of those before it
        "learning_rate": 2e-4,
        "warmup_steps": 0.05,
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 2,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": kind == "cpu",
        "dataloader_pin_memory": kind == "cuda",
    }
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **overrides})


class AdapterTrainer(Trainer):
    """`transformers.Trainer` for a model that `inject` has been called on, with a plain or a 4-bit base.

    Its loss is L = Σ over the step's tokens −log p / their number, plus `auxiliary_loss(model)` once an optimiser step,
    whatever `gradient_accumulation_steps` is: of M micro-batches each adds 1/M of it. Evaluation leaves it out.

    A checkpoint holds the adapter, optimiser, scheduler, random states and the trainer's state, never the base.
    `train(resume_from_checkpoint=True)` goes on from the last complete one to the weights that an uninterrupted run
    reaches, and starts afresh where there is none, so that one command serves for the first run and for each repetition.

    After `train` the model is given back as it came: without autocast around its `forward`, its cache switched on again.

    model, args, train_dataset, …: as for `Trainer`; args are best made by `training_arguments`.
    auxiliary_loss: called with the model at each micro-batch after its forward pass; returns a scalar tensor.
    Raises ValueError for a model without adapters, or with merged ones.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        auxiliary_loss: Callable[[nn.Module], Tensor] | None = None,
        **arguments: Any,
    ) -> None:
        merged = [name for name, layer in adapter_layers(model).items() if layer.merged]
        if merged:
            raise ValueError(
                f"{merged[0]!r} is merged, so its factors would get no gradient: call unmerge(model) before training"
            )
        if args.parallel_mode.value == "not_distributed":
            args._n_gpu = 1  # several GPUs in one process mean DataParallel, which copies the model at every step
        use_cache = model.config.use_cache
        # Trainer refuses a 4-bit base unless it takes its adapters for PEFT's; saving a model looks at the mark too.
        model._hf_peft_config_loaded = True
        try:
            super().__init__(model, args, **arguments)
        finally:
            del model._hf_peft_config_loaded
        model.config.use_cache = use_cache
        self.auxiliary_loss = auxiliary_loss
        self.remove_callback(
            PrinterCallback if args.disable_tqdm else trainer.DEFAULT_PROGRESS_CALLBACK
        )
        if not args.disable_tqdm:
            self.add_callback(Progress())

    @property
    def history(self) -> list[dict[str, float]]:
        """The training loss, auxiliary part included, at each logged step: `{"step": …, "loss": …}`; whole after resuming."""
        return [
            {"step": entry["step"], "loss": entry["loss"]}
            for entry in self.state.log_history
            if "loss" in entry
        ]

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, **arguments: Any
    ) -> TrainOutput:
        """Trains, from the seed in the arguments on. resume_from_checkpoint: True (the last complete checkpoint in
        `output_dir`, if there is one), or a checkpoint's folder. A run that was finished is not trained further.

        Raises FileNotFoundError for a folder that holds no complete checkpoint.
        """
        set_seed(self.args.seed)
        folder = None
        if resume_from_checkpoint is True:
            folder = last_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            if not (folder / COMPLETE).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no complete checkpoint of AdapterTrainer ({COMPLETE} is missing)"
                )
        if folder is not None and (finished := self._finished(folder)):
            return finished
        before = {name: vars(self.model)[name] for name in PREPARED if name in vars(self.model)}
        use_cache = self.model.config.use_cache
        self.model.config.use_cache = self.args.use_cache
        try:
            return super().train(
                resume_from_checkpoint=str(folder) if folder else None, **arguments
            )
        finally:
            for name in PREPARED:
                vars(self.model).pop(name, None)
            vars(self.model).update(before)
            self.model.config.use_cache = use_cache

    def _finished(self, folder: Path) -> TrainOutput | None:
        """Takes over a checkpoint that is at its last step; from there Trainer would train one step too many."""
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
        if (
            state.global_step
            < self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        ):
            return None
        self._load_from_checkpoint(str(folder))
        self.state = state
        losses = [entry["loss"] for entry in self.history]
        return TrainOutput(state.global_step, sum(losses) / max(1, len(losses)), {})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Trainer's loss of a micro-batch, with this micro-batch's share of the auxiliary loss in training."""
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if self.auxiliary_loss is not None and model.training:
            # A loss per token of the whole step is summed over the micro-batches; any other Trainer divides itself.
            summed = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
            share = self.current_gradient_accumulation_steps if summed else 1
            loss = loss + self.auxiliary_loss(self.model).to(loss.device) / share
        return (loss, outputs) if return_outputs else loss

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        (folder / COMPLETE).unlink(missing_ok=True)
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # older checkpoints go only when this one is complete
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            self._mark_complete(folder)
            self._rotate(folder.parent, limit)

    def _mark_complete(self, folder: Path) -> None:
        unfinished = folder / f"{COMPLETE}.unfinished"
        unfinished.write_text(json.dumps({"step": self.state.global_step, "written": time.time()}))
        os.replace(unfinished, folder / COMPLETE)

    def _rotate(self, folder: Path, limit: int | None) -> None:
        """Deletes the oldest complete checkpoints until `limit` are left; the best one stays. None or 0: keeps all."""
        checkpoints = sorted(folder.glob(f"checkpoint-*/{COMPLETE}"), key=_written)
        for mark in checkpoints[:-limit] if limit else []:
            if str(mark.parent) != self.state.best_model_checkpoint:
                mark.unlink()  # first, as a kill may cut the deletion short
                shutil.rmtree(mark.parent)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        restore_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        restore_adapter(self.model, self.state.best_model_checkpoint)


class Progress(TrainerCallback):
    """A bar on the error stream with the loss behind it, in terminals and notebooks alike."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        shown = state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            file=sys.stderr,
            mininterval=0.5,
            disable=not shown,
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.close()


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint in `output_dir` that was written last; None if there is none.

    The last by time, not by step: an earlier, longer run may have left its own. One that was cut short, by a kill while it
    was written, is passed over with a warning.
    """
    folders = sorted(path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir())
    for path in folders:
        if not (path / COMPLETE).is_file():
            warnings.warn(f"{path} was not written to its end: it is ignored", stacklevel=3)
    marks = [path / COMPLETE for path in folders if (path / COMPLETE).is_file()]
    return max(marks, key=_written).parent if marks else None


def _written(mark: Path) -> float:
    return json.loads(mark.read_text())["written"]


def _device_type(device: str | torch.device | None) -> str:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
