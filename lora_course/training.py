"""`transformers.Trainer` for adapters: small checkpoints, an auxiliary loss, and runs that go on after a kill.

Several processes: `accelerate launch --num_processes 2 train.py`. With the same rows an optimiser step they train what one
process trains, to rounding, and decide the same; a checkpoint of any number of them goes on in any other number.

With TRL, which prepares chats, masks questions and packs, put `AdapterTrainer` in front:

    class AdapterSFTTrainer(AdapterTrainer, trl.SFTTrainer): ...

    trainer = AdapterSFTTrainer(model, SFTConfig("out", assistant_only_loss=True), train_dataset=chats, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=True)

`class AdapterDPOTrainer(AdapterTrainer, trl.DPOTrainer)` learns from preferences. Its reference is the adapter that the training
starts from, with precompute_ref_log_probs=True or ref_model=copy.deepcopy(model); TRL's own, the base by its name, is refused.

An `SFTTrainer` or a `Trainer` alone trains an injected model too, but writes checkpoints that only `load_adapter` reads: it can't
resume, adds no auxiliary loss, and copies the model to every GPU that one process sees.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
    trainer,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from lora_course import processes, refused
from lora_course.arguments import one_device
from lora_course.callbacks import ModelCallback
from lora_course.checkpoint import restore_adapter, save_adapter
from lora_course.kept import forward_set_on, kept_as_it_is, kept_factors, set_use_cache
from lora_course.lora import AdapterState
from lora_course.progress import Progress
from lora_course.resumed import order_by_epoch, output_of, restore_callbacks, warn_of_no_length
from lora_course.runs import (
    COMPLETE,
    as_json,
    check_optimizer,
    describe_run,
    folder_to_resume,
    mark_complete,
    read_mark,
    rotate_checkpoints,
)
from lora_course.states import adapter_state, use_adapter

TRAINER_STATE = "trainer_state.json"


class AdapterTrainer(Trainer):
    """`transformers.Trainer` for a model that `inject` has been called on, with a plain or a 4-bit base.

    Its loss is L = Σ over the step's tokens −log p / their number, plus `auxiliary_loss(model)` once an optimiser step,
    whatever `gradient_accumulation_steps` is: of M micro-batches each adds 1/M of it. Evaluation leaves it out.

    A checkpoint holds the adapter, optimiser, scheduler, random states and the trainer's state, never the base.
    `train(resume_from_checkpoint=True)` goes on from the last complete one to the weights that an uninterrupted run
    reaches, and starts afresh where there is none, so that one command serves for the first run and for each repetition.
    What a checkpoint was made by is written into it (`runs.describe_run`): a run of another adapter, method, schedule or
    rows is refused. A run that was finished is not trained further, and gives the weights that it gave the first time.

    After `train` the model is given back as it came: without autocast around its `forward`, its cache switched on again.

    model, args, train_dataset, …: as for `Trainer`; args are best made by `training_arguments`. With `disable_tqdm=True` it
    is silent: `history` has the losses; `callbacks=[PrinterCallback()]` prints them.
    auxiliary_loss: called with the model at each micro-batch after its forward pass; returns a scalar tensor.
    Raises ValueError for a model without adapters, with merged ones, with nothing to train, and for one that lies on
    another kind of device than the arguments train on: no model is moved without a word.
    """

    model: Any  # Trainer's own type is for models that may be missing

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        auxiliary_loss: Callable[[nn.Module], Tensor] | None = None,
        **arguments: Any,
    ) -> None:
        refused.check_given(model, args, arguments)
        refused.check_adapter(model)
        if args.parallel_mode.value == "not_distributed":
            one_device(model, args)
        # Trainer refuses a 4-bit base unless it takes its adapters for PEFT's; saving a model looks at the mark too.
        model._hf_peft_config_loaded = True  # type: ignore[assignment]  # no module, no tensor
        with kept_as_it_is(model), kept_factors(model):
            try:
                super().__init__(model, args=args, **arguments)  # DPOTrainer's second is another
            finally:
                del model._hf_peft_config_loaded
            self._forward = forward_set_on(model)
        refused.check_made(self, arguments, self._forward)
        self._optimizer_given = self.optimizer is not None
        self._collator_given = arguments.get("data_collator")
        self._passes_without_labels: Any = 0
        self._begun: AdapterState | None = None
        self.auxiliary_loss = auxiliary_loss
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)  # or it prints each logged step instead
        else:
            self.remove_callback(trainer.DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(Progress())

    @property
    def history(self) -> list[dict[str, float]]:
        """The training loss, auxiliary part included, at each logged step: `{"step": …, "loss": …}`; whole after resuming."""
        return [
            {"step": entry["step"], "loss": entry["loss"]}
            for entry in self.state.log_history
            if "loss" in entry
        ]

    def method_settings(self) -> dict[str, Any]:
        """What a subclass adds to the description of a run, as JSON holds it; nothing here."""
        return {}

    def train(  # type: ignore[override]  # a Path will do, and trials are not supported
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        overwrite: bool = False,
        **arguments: Any,
    ) -> TrainOutput:
        """Trains, from the seed in the arguments on.

        Args:
            resume_from_checkpoint: True (the last complete checkpoint in `output_dir`, if there is one), or a
                checkpoint's folder.
            overwrite: delete the checkpoints of another run in `output_dir`, and start anew.

        Raises:
            FileNotFoundError: a folder that holds no complete checkpoint.    ValueError: one of another run.
        """
        refused.check_adapter(self.model)
        refused.check_rows(
            self.train_dataset, self.model, self.args.train_batch_size, self.data_collator
        )
        set_seed(self.args.seed)
        if not self._optimizer_given:
            self.optimizer = None  # an earlier training's is for the adapter that was there then
        self.described = as_json(describe_run(self, self.method_settings()))
        folder = processes.from_first(
            lambda: folder_to_resume(
                self.args.output_dir, resume_from_checkpoint, self.described, overwrite
            )
        )
        if folder is not None and (finished := self._take_over(folder)):
            return finished
        if folder is None:
            if self._begun is not None and resume_from_checkpoint:
                use_adapter(self.model, self._begun)  # an interrupted training left no checkpoint
            self._begun = {name: t.cpu() for name, t in adapter_state(self.model).items()}
        warn_of_no_length(self.train_dataset, folder)
        with kept_as_it_is(self.model, self._forward):
            set_use_cache(self.model, self.args.use_cache)
            # Older checkpoints go when a new one is complete, by us: Trainer would delete the last one where one is kept and
            # the best is another, and with it the mark that the run is finished.
            self._limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                output = super().train(
                    resume_from_checkpoint=str(folder) if folder else None, **arguments
                )
            finally:
                self.args.save_total_limit = self._limit
                if noise := getattr(self, "neftune_hook_handle", None):
                    noise.remove()  # an interrupted training's would stay
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, ModelCallback):
                        callback.stopped()
        self._begun = None
        last = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and (last / COMPLETE).is_file():
            mark_complete(last, self, output)
        processes.wait()  # or another process could look for the mark before it is there
        self._passes_without_labels = refused.warn_of_no_labels(self._passes_without_labels)
        refused.warn_of_no_best(self.args, self.state)
        return output

    def _take_over(self, folder: Path) -> TrainOutput | None:
        """Takes over a checkpoint that ended its run; from there Trainer would train one step too many."""
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
        steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if state.global_step < steps and not read_mark(folder).get("finished"):
            check_optimizer(folder)
            return None
        self._load_from_checkpoint(str(folder))
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        return TrainOutput(state.global_step, *output_of(read_mark(folder), self.history))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Trainer's loss of a micro-batch, with this micro-batch's share of the auxiliary loss in training."""
        if num_items_in_batch is not None and model.training:  # 0 / 0 would make the adapter NaN
            items = torch.as_tensor(num_items_in_batch)
            self._passes_without_labels = self._passes_without_labels + (items == 0)
            num_items_in_batch = items.clamp(min=1)
        found: Any = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        loss: Tensor = found[0] if return_outputs else found
        if self.auxiliary_loss is not None and model.training:
            # A loss per token of the whole step is summed over the micro-batches; any other Trainer divides itself.
            summed = getattr(self, "loss_is_scaled_for_ga", None)  # what a Trainer's class may say
            if summed is None:
                summed = self.compute_loss_func is not None or (
                    self.model_accepts_loss_kwargs and num_items_in_batch is not None
                )
            auxiliary = refused.check_number(self.auxiliary_loss(self.model))
            share = self.current_gradient_accumulation_steps if summed else 1
            loss = loss + auxiliary.squeeze().to(loss.device) / share
        return (loss, found[1]) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return order_by_epoch(super()._get_train_sampler(train_dataset), self.args)

    def evaluation_loop(self, *arguments: Any, **named: Any) -> EvalLoopOutput:
        """Trainer's, after which the model has the `forward` that it had before: without `train` this would prepare it for good."""
        with kept_as_it_is(self.model, self._forward):
            return super().evaluation_loop(*arguments, **named)

    def compute_loss_context_manager(self) -> ExitStack:
        """Evaluation computes in training's precision, after `train` too, where the model has its own `forward` back."""
        contexts = super().compute_loss_context_manager()
        if not self.model.training:
            contexts.enter_context(self.accelerator.autocast())
        return contexts

    def push_to_hub(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Raises ValueError: the run's folder is in the course's own format."""
        raise ValueError(f"push_to_hub: {refused.FIELDS['push_to_hub']}.")

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if self.args.should_save:
            save_adapter(self.model, output_dir or str(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        processes.wait()  # each writes its own random state
        if self.args.should_save:
            mark_complete(folder, self)
            rotate_checkpoints(folder.parent, self._limit, self.state.best_model_checkpoint)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        restore_callbacks(self.callback_handler.callbacks, self.state.stateful_callbacks)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        restore_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if not best.is_dir():  # the run's folder was moved
            best = Path(str(self.args.output_dir)) / best.name
        restore_adapter(self.model, best)
