"""Mixtures that these tests share."""

import torch
from torch import Tensor, nn

from lora_course.experts import (
    ExpertsLinear,
    balance_loss,
)
from lora_course.injection import adapter_layers, inject
from tests.models import batch, config, qwen, randomize

MODES = [
    {}, {"top_k": 2}, {"routing": "shared"}, {"gate_by": "sequence", "prefix": 3},
    {"gate_by": "sequence", "prefix": 4, "routing": "shared", "top_k": 2},
]  # fmt: skip
CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # the same sums in another order


def shuffle(model: nn.Module, seed: int = 1, size: float = 20.0) -> nn.Module:
    """Random non-zero factors, and routers whose gates differ from token to token."""
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        if hasattr(layer, "router"):
            layer.router.data.normal_(std=size, generator=generator)
    return model


def mixture(num_experts: int = 3, base: nn.Module | None = None, **arguments: object) -> nn.Module:
    return shuffle(
        inject(base or qwen(), config(), ExpertsLinear, num_experts=num_experts, **arguments)
    )


def logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


IDS = batch(3, 9)["input_ids"]


def gradients(model: nn.Module, with_balance: bool = True) -> dict[str, Tensor]:
    model.train().zero_grad()
    loss = model(**batch(), use_cache=False).loss
    (loss + balance_loss(model) if with_balance else loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
