"""`lora_course.callbacks`: a callback is for the model that it was made for."""

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_course.arguments import training_arguments
from lora_course.callbacks import ModelCallback
from lora_course.injection import inject
from tests.models import config, qwen


class Gardener(ModelCallback):
    pass


def test_another_model_than_its_own_is_refused_before_a_step(tmp_path: Path) -> None:
    model, other = inject(qwen(), config()), inject(qwen(), config())
    callback = Gardener(model)
    events: tuple[TrainingArguments, TrainerState, TrainerControl] = (
        training_arguments(tmp_path, device="cpu"),
        TrainerState(),
        TrainerControl(),
    )
    callback.on_train_begin(*events, model=model, optimizer=None)
    with pytest.raises(ValueError, match="This Gardener was made for another model.*make a Gard"):
        callback.on_train_begin(*events, model=other, optimizer=None)
