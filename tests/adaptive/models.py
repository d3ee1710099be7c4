"""Growing models that these tests share."""

import torch
from torch import Tensor, nn

from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
from lora_course.injection import adapter_layers, inject
from tests.models import batch, config, qwen

SCHEDULE = GrowthSchedule(
    budget=40, start=3, every=2, top=3, add=2, max_r=6
)  # 14 layers of rank 2: 28, then 34, then 40


def growing(model: nn.Module | None = None, **fields: object) -> nn.Module:
    """Rank 2, scaling 3, all factors non-zero."""
    torch.manual_seed(1)
    model = inject(model or qwen(), config(**{"r": 2, "lora_alpha": 6} | fields), GrowingLoRALinear)
    return randomized(model)


def randomized(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for name, tensor in layer.named_parameters():
            if not name.startswith("base_layer."):
                tensor.data.normal_(std=0.1, generator=generator)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    grower: RankGrower | None = None,
) -> list[float]:
    losses = []
    for step in steps:
        loss = model(**batch()).loss
        loss.backward()
        if grower:
            grower.observe()
        optimizer.step()
        if grower:
            grower.grow(optimizer, step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def grown(steps: int = 6) -> nn.Module:
    model = growing()
    train(
        model,
        torch.optim.AdamW(trainable(model), lr=1e-2),
        range(1, steps),
        RankGrower(model, SCHEDULE),
    )
    return model


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name
