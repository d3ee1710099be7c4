"""Distillation as a plain loop, and as a Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from lora_course.distillation.larger import TeacherModel
from lora_course.distillation.loss import DistillationConfig, DistillationLoss, loss_from_mixture
from lora_course.distillation.teachers import DOMAIN, Teachers, split_batch
from lora_course.injection import check_same_model
from lora_course.processes import sum_over_processes
from lora_course.training import AdapterTrainer


def distillation_step(
    teachers: Teachers | TeacherModel,
    inputs: Mapping[str, Any],
    config: DistillationConfig = DistillationConfig(),
) -> DistillationLoss:
    """L of one batch: the teachers first, when no activation of the student is held, then the student with gradients.

    inputs: as for `Teachers.log_probs`. The student's mode is left as it is.
    """
    target = teachers.log_probs(inputs, config)
    inputs, labels, _ = split_batch(inputs)
    return loss_from_mixture(
        teachers.model(**inputs, use_cache=False).logits, target, labels, config
    )


def distill(
    teachers: Teachers | TeacherModel,
    batches: Iterable[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    config: DistillationConfig = DistillationConfig(),
) -> list[dict[str, float]]:
    """The plain loop: a step of `optimizer` a batch, the student in training mode. Returns each step's three means."""
    teachers.model.train()
    history = []
    for inputs in batches:
        loss = distillation_step(teachers, inputs, config)
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in loss._asdict().items()})
    return history


class DistillationTrainer(AdapterTrainer):
    """`AdapterTrainer` whose loss is L: a mean over the tokens of the whole optimiser step, however it is cut into
    micro-batches, plus `auxiliary_loss`, if there is one.

    `evaluate` gives L as `eval_loss`. Checkpoints hold the student alone: to resume, give the same teachers again.

    Args:
        teachers: on `model`, or another model as its teacher. With weights by domain the datasets need a column `domain`.
        config: what to minimise.
        model, args, train_dataset, …: as for `AdapterTrainer`.

    Raises:
        ValueError: teachers of another model, an argument that sets another loss.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        teachers: Teachers | TeacherModel,
        config: DistillationConfig = DistillationConfig(),
        **arguments: Any,
    ) -> None:
        check_same_model(teachers, model, teachers.model)
        if (
            arguments.get("compute_loss_func")
            or args.label_smoothing_factor
            or args.use_liger_kernel
        ):
            raise ValueError(
                "compute_loss_func, label_smoothing_factor and use_liger_kernel set another loss than the distillation's: leave them out."
            )
        super().__init__(model, args, compute_loss_func=self._student_loss, **arguments)
        self.teachers, self.distillation = teachers, config
        self._target: Tensor | None = None
        self._sums = torch.zeros(3)  # of divergence, of task loss, of tokens, since the last log

    def method_settings(self) -> dict[str, Any]:
        """The configuration, and a hash of the teachers."""
        return {
            "distillation": dataclasses.asdict(self.distillation),
            "teachers": self.teachers.fingerprint(),
        }

    @property
    def history(self) -> list[dict[str, float]]:
        """`step`, `loss` (auxiliary part included), `divergence` and `task` at each logged step; whole after resuming."""
        keys = ("step", "loss", "divergence", "task")
        return [
            {key: entry[key] for key in keys} for entry in self.state.log_history if "loss" in entry
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """L of a micro-batch: its sums divided by the tokens of the whole step."""
        self._target = self.teachers.log_probs(inputs, self.distillation)
        inputs = {key: value for key, value in inputs.items() if key != DOMAIN}
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._target = None

    def _student_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        assert self._target is not None  # compute_loss has just set it
        target = self._target
        loss = loss_from_mixture(
            outputs.logits, target, labels, self.distillation, num_items_in_batch
        )
        if self.model.training:
            tokens = len(target)
            items = tokens if num_items_in_batch is None else num_items_in_batch
            parts = [loss.divergence * items, loss.task * items, loss.task.new_tensor(tokens)]
            self._sums = self._sums.to(loss.task.device) + torch.stack(parts)
        return loss.loss

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """As `Trainer.log`, with the divergence and the task loss a token since the last time."""
        if "loss" in logs:
            divergence, task, tokens = sum_over_processes(self._sums).tolist()
            self._sums = torch.zeros(3)
            logs = logs | {"divergence": divergence / max(1, tokens), "task": task / max(1, tokens)}
        super().log(logs, *arguments, **named)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        if self.teachers.weights.ndim == 2 and DOMAIN not in columns:
            self._signature_columns: Any = [*columns, DOMAIN]
