"""Stages and models that these tests share."""

import torch
from torch import Tensor, nn

from lora_course.injection import adapter_layers, merge
from lora_course.progressive import (
    Stage,
    begin_stage,
    inject_stages,
)
from tests.models import batch, qwen

STAGES = [
    Stage(3, ["q_proj", "down_proj"], 1e-2, 4),
    Stage(2, ["q_proj", "v_proj"], 2e-2, 5, warmup=2),
    Stage(5, r".*layers\.1\..*(q|up)_proj", 1e-2, 3, warmup=0),
]
MODES = ("stack", "merge")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if not name.endswith((".A", ".B"))
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fill(model: nn.Module, seed: int) -> None:
    """The trained factors as after training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        layer.A.data.normal_(std=0.1, generator=generator)
        layer.B.data.normal_(std=0.1, generator=generator)


def stacked(
    base: nn.Module | None = None,
    mode: str = "stack",
    stages: list[Stage] = STAGES,
    **fields: object,
) -> nn.Module:
    """All stages gone through, with random factors instead of a training."""
    model = inject_stages(base or qwen(), stages, **fields)
    for index, stage in enumerate(stages):
        begin_stage(model, stage, seed=index)
        fill(model, index)
        if mode == "merge":
            merge(model)
    return model
