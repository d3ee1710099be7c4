"""The first steps of a training, for the witness of a study whose whole runs take minutes."""

from __future__ import annotations

import dataclasses
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from lora_course.experiments.arms import Arm, train

STEPS = 4


class StopAfter(TrainerCallback):
    """Ends a training after so many steps; the schedule of its rate is the whole training's."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def first_losses(
    arm: Arm, rows: Dataset, rate: float, seed: int, steps: int, batch: int
) -> list[float]:
    """Nats a token of the first `STEPS` of `steps` steps, on rows in their order, as a record keeps them."""
    begun = dataclasses.replace(arm, callbacks=(*arm.callbacks, StopAfter(STEPS)))
    order: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    return train(begun, rows, rate, seed, steps, batch, **order).curve
