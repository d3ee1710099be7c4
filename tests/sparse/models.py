"""Models with sparse adapters that these tests share."""

from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from lora_course.arguments import training_arguments
from lora_course.injection import adapter_layers, inject
from lora_course.lora import LoRALinear
from lora_course.sparse import (
    GatedLoRALinear,
    SparseDeltaLinear,
    SparseLoRALinear,
)
from lora_course.training import AdapterTrainer
from tests.models import config, qwen

KINDS = [GatedLoRALinear, SparseLoRALinear, SparseDeltaLinear]


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Trained numbers as after training: none is zero, so that nothing agrees by accident."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer."):
                parameter.data.normal_(std=1.0 if name == "gate" else 0.2, generator=generator)
    return model


def adapted(
    kind: type[LoRALinear], seed: int = 1, base: nn.Module | None = None, **fields: object
) -> nn.Module:
    arguments = {key: fields.pop(key) for key in ("sparsity", "mask", "gate_init") if key in fields}
    return randomize(inject(base or qwen(), config(**fields), layer=kind, **arguments), seed)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def trainer(
    model: nn.Module, folder: Path, *callbacks: TrainerCallback, **fields: object
) -> AdapterTrainer:
    ids = torch.randint(97, (64, 12), generator=torch.Generator().manual_seed(7))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format(
        "torch"
    )
    defaults = {
        "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 0.1, "save_strategy": "no", "bf16": False, "warmup_steps": 2,
        "lr_scheduler_type": "linear", "disable_tqdm": True, "max_grad_norm": 0.0, "weight_decay": 0.0,
    }  # fmt: skip
    args = training_arguments(folder, device="cpu", **{**defaults, **fields})
    return AdapterTrainer(model, args, train_dataset=data, callbacks=list(callbacks))
