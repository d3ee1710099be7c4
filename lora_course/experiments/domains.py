"""Studies of several domains: the rows of all, a plain adapter for each, routers over those, and scores by domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import nn

from lora_course import experts
from lora_course.experiments.arms import Arm, adapted, base_of, bits_by_domain, config_of, train
from lora_course.lora import AdapterState
from lora_course.states import factor_state

Settings = Mapping[str, Any]
RowsOf = Callable[[str], datasets.Dataset]


def mixed_rows(
    settings: Settings, domains: Sequence[str], steps: int, rows: RowsOf
) -> datasets.Dataset:
    """What so many steps read: the first rows of each domain, equally many; the column `domain` says of which they are."""
    count = steps * settings["batch"] // len(domains)
    parts = [
        rows(domain).select(range(count)).add_column("domain", [i] * count)
        for i, domain in enumerate(domains)
    ]
    return datasets.concatenate_datasets(parts).with_format("torch")


def one_each(
    settings: Settings, domains: Sequence[str], r: int, rate: float, seed: int, steps: int, rows: RowsOf
) -> dict[str, AdapterState]:  # fmt: skip
    """A LoRA of rank r for each domain, trained on its own rows."""
    states = {}
    for domain in domains:
        model = adapted(settings, seed, config_of(r))
        train(Arm(model), rows(domain), rate, seed, steps, settings["batch"])
        states[domain] = factor_state(model)
    return states


def routed(
    settings: Settings, states: Sequence[AdapterState], rows: datasets.Dataset, rate: float, seed: int, steps: int,
    gate_by: str = "token",
) -> nn.Module:  # fmt: skip
    """The adapters as frozen experts, and routers trained on the rows: all of them stay, and run at once."""
    model = base_of(settings)
    torch.manual_seed(seed)
    experts.mix_experts(model, states, gate_by=gate_by)
    return train(Arm(model), rows, rate, seed, steps, settings["batch"]).model


def own_bits(
    settings: Settings, states: Mapping[str, AdapterState], split: str
) -> dict[str, float]:
    """Bits a byte of each domain with its own adapter."""
    return {
        domain: bits_by_domain(settings, state, split, [domain])[domain]
        for domain, state in states.items()
    }
