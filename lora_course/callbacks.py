"""Callbacks that belong to one model: what an algorithm does within a Trainer's steps, besides in a loop by hand."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_course.injection import check_same_model


class ModelCallback(TrainerCallback):
    """A callback made for one model, which refuses to be trained with another: it would act on layers that stand still.

    Attributes:
        model: the model it was made for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def settings(self) -> dict[str, Any]:
        """What was chosen, as JSON holds it: a run with other settings is another run."""
        return {}

    def stopped(self) -> None:
        """Called when a training has ended in any way, by hand or by an error too: nothing of a step is left behind."""

    def on_train_begin(  # type: ignore[override]  # the trainer gives the model by name
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Raises ValueError for another model than this callback's."""
        check_same_model(self, model, self.model)
