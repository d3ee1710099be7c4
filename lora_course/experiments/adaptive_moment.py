"""Of the study of chapter 3.1: the loss around the growth of every layer, in several ways."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
from lora_course.experiments import adapted, config_of, rows_of
from lora_course.injection import adapter_layers

WAYS = ["none", "preserved", "scale not held", "both zero", "moments thrown away"]


def moment(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The loss around a growth of every layer, in each of `WAYS`: on the training batches, which are the same, and on one
    batch kept aside, just before and just after. AdamW at a constant rate."""
    plan, batch = settings["moment"], settings["batch"]
    count = plan["before"] + plan["after"] + 1
    rows = rows_of(settings).shuffle(seed=seed)
    data = rows[: count * batch]["input_ids"].split(batch)
    first, rest, aside = data[: plan["before"]], data[plan["before"] : -1], data[-1]

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=plan["learning_rate"], weight_decay=0)

    model = adapted(settings, seed, config_of(settings["r"], settings["scaling"]), layer=GrowingLoRALinear)  # fmt: skip
    layers = adapter_layers(model.train())
    budget = (settings["r"] + plan["add"]) * len(layers)
    schedule = GrowthSchedule(
        budget, start=plan["before"], every=1, top=len(layers), add=plan["add"], seed=seed
    )
    optimizer = optimizer_of(model)
    found: dict[str, Any] = {"before": steps(model, optimizer, first, RankGrower(model, schedule))}
    for way in WAYS:
        copied = copy.deepcopy(model)
        copied_optimizer = optimizer_of(copied)
        copied_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        grower = RankGrower(copied, schedule)
        losses: dict[str, Any] = {"before": loss_of(copied, aside)}
        if way != "none":
            grower.grow(copied_optimizer, plan["before"])
        for layer in grower.layers.values():
            if way == "scale not held":
                layer.scaling *= settings["r"] / layer.r
            if way == "both zero":
                nn.init.zeros_(layer.get_parameter("A1"))
        if way == "moments thrown away":
            copied_optimizer.state.clear()
        losses["after"] = loss_of(copied, aside)
        # without growth there is budget left to observe for; nothing else depends on it
        losses["then"] = steps(copied, copied_optimizer, rest, grower)
        losses["end"] = loss_of(copied, aside)
        grown = [layer for layer in grower.layers.values() if len(layer.pairs) > 1]
        new = [layer.get_parameter("B1").abs().max().item() for layer in grown]
        found[way] = losses | {"largest_new_weight": max(new, default=0.0)}
    return found


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], grower: RankGrower
) -> list[float]:
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grower.observe()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    return losses


@torch.no_grad()
def loss_of(model: nn.Module, ids: Tensor) -> float:
    return model(input_ids=ids, labels=ids).loss.item()
