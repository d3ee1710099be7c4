"""Half of nano with an adapter, rows of random tokens and short trainings, for tests of what trains."""

import copy
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainingArguments

from lora_course.arguments import training_arguments
from lora_course.injection import adapter_layers, inject
from lora_course.lab.models import NANO

LENGTH = 16
MODEL = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
MODEL.model.layers = MODEL.model.layers[:2]  # half of nano: the same in half the time
MODEL.config.num_hidden_layers = 2


def injected(dropout: float = 0.0, model: torch.nn.Module | None = None) -> torch.nn.Module:
    """Half of nano, or `model`, with LoRA on two kinds of layers; factors are non-zero, so that both get gradients."""
    torch.manual_seed(5)
    model = copy.deepcopy(MODEL) if model is None else model
    config = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["q_proj", "down_proj"]
    )
    inject(model, config)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.02)
    return model


def rows(count: int = 24, ragged: bool = False) -> datasets.Dataset:
    """Random tokens; `ragged`: a different number of labels in every row counts."""
    ids = torch.randint(1, 4096, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if ragged:
        for i, row in enumerate(labels):
            row[: i % 11] = -100
    return datasets.Dataset.from_dict(
        {"input_ids": ids.numpy(), "labels": labels.numpy()}
    ).with_format("torch")


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_strategy": "no", "bf16": False,
        "disable_tqdm": True, **overrides,
    }  # fmt: skip
    return training_arguments(folder, device="cpu", **settings)
