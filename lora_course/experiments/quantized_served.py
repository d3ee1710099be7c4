"""Of chapter 4.3: what LoRA loses where the model is served in int4, and whether training with the rounding wins it back.

What is served: the weights of nano's linear layers rounded to the nearest of 2^bits − 1 codes, symmetric, one scale for 32 neighbours
of a row (along `in`); biases, norms, head and embedding as they are, activations in fp32. 4 bits, and 3, since at nano's size 4 may
cost little. No calibration, as GPTQ and AWQ have; formats of servers have one code more (−8), and scales in 16 bits.

    merged                  trained on the base as it is, merged, rounded: one int4 model
    beside                  the same adapter, in fp32, beside the rounded base
    trained there           trained on the rounded base, beside it
    trained there, merged   … merged into the rounded base, and rounded again
    trained there, back     … merged into the base as it is, and rounded: what a training does that rounds base and adapter apart, and
                            converts afterwards
    aware                   trained with W₀ + s · B A rounded in the forward pass (straight-through), merged, rounded: what is served
                            is what was trained

Rank, steps, rows and scoring are those of chapter 1.1's arm "lora". Each arm searches its own rate on what it serves. "error" is
‖W served − (W₀ + ΔW)‖ / ‖ΔW‖ over all layers together, "update" ‖ΔW‖ / ‖W₀‖.

Expected, before the first run, with every seed:
- At 4 bits "merged" loses less than 5% of LoRA's gain, at 3 bits more than at 4.
- "beside" is within 0.005 of "merged" at 4 bits: the rounding of a weight of about the same size.
- "trained there" is lower than "beside", at both widths.
- "trained there, merged" is higher than "trained there", at both widths: it is rounded once more.
- "aware" is lower than "merged" at both widths; at 3 bits it wins back more than half of what rounding costs.
- Open: which is lower, "aware" or "trained there".
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_course.experiments import NANO, Arm, Runs, Study, Witness, adapted, config_of
from lora_course.experiments.arms import base_of, bits_of, train_as
from lora_course.experiments.rates import compete_all
from lora_course.injection import adapter_layers, inject, merge, unload
from lora_course.lora import AdapterState, LoRALinear
from lora_course.quantized import fake_quantize
from lora_course.states import adapter_state, use_adapter


@dataclass(frozen=True)
class Way:
    """trained: on the base "as it is", on it "rounded", or "aware" of the rounding of the sum.    base: what lies under the adapter
    that is served, or what it is merged into.    merged: the sum is rounded, and no adapter is left."""

    trained: str
    base: str
    merged: bool


WAYS = {
    "merged": Way("as it is", "as it is", True),
    "beside": Way("as it is", "rounded", False),
    "trained there": Way("rounded", "rounded", False),
    "trained there, merged": Way("rounded", "rounded", True),
    "trained there, back": Way("rounded", "as it is", True),
    "aware": Way("aware", "as it is", True),
}
SETTINGS: dict[str, Any] = NANO | {
    "steps": 60, "batch": 8, "r": 8, "scaling": 2, "score_bytes": 40_000, "search_seeds": [0], "target_modules": "all-linear",
    "bits": [4, 3], "group_size": 32, "first": [4e-3, 8e-3, 1.6e-2],
}  # fmt: skip
ARMS = {"lora": (Way("as it is", "as it is", False), 32)} | {
    f"{way}, {bits} bits": (WAYS[way], bits) for way in WAYS for bits in SETTINGS["bits"]
}
"""Each arm's way and bits; 32 bits round nothing."""


def rounded(weight: Tensor, bits: int) -> Tensor:
    return fake_quantize(weight, bits, group_size=SETTINGS["group_size"])


class RoundedSumLinear(LoRALinear):
    """`y = Q(W₀ + s · B A) x + b`; the gradient takes Q for the identity. Builds an `[out, in]` matrix in each pass."""

    def __init__(
        self, base_layer: nn.Linear, r: int, lora_alpha: float, *, bits: int, **fields: Any
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, **fields)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        weight = rounded(self.base_layer.weight + self.delta_weight(), self.bits)
        return F.linear(x, weight, self.base_layer.bias)


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> nn.Module:
    """The weights under the adapter's layers, rounded in place."""
    for layer in adapter_layers(model).values():
        layer.base_layer.weight.copy_(rounded(layer.base_layer.weight, bits))
    return model


def start(trained: str, bits: int, seed: int) -> nn.Module:
    """The model that is about to be trained; the seed draws the same factors for all."""
    config = config_of(SETTINGS["r"], SETTINGS["scaling"])
    if trained == "aware":
        return adapted(SETTINGS, seed, config, layer=RoundedSumLinear, bits=bits)
    model = adapted(SETTINGS, seed, config)
    return round_weights(model, bits) if trained == "rounded" else model


@functools.cache
def adapter(trained: str, bits: int, rate: float, seed: int) -> AdapterState:
    """A trained adapter; arms that differ in what becomes of it share it."""
    found = train_as(SETTINGS, Arm(start(trained, bits, seed)), rate, seed)
    return adapter_state(found.model)


def serve(state: AdapterState, way: Way, bits: int) -> nn.Module:
    """The base with an adapter, as a way serves them."""
    config = config_of(SETTINGS["r"], SETTINGS["scaling"])
    model = use_adapter(inject(base_of(SETTINGS), config), state)
    if way.base == "rounded":
        round_weights(model, bits)
    return unload(round_weights(merge(model), bits)) if way.merged else model


@dataclass(frozen=True)
class Served:
    model: nn.Module
    state: AdapterState


def served(arm: str, rate: float, seed: int) -> Served:
    way, bits = ARMS[arm]
    # what is trained on the base as it is is the same for all bits
    state = adapter(way.trained, 32 if way.trained == "as it is" else bits, rate, seed)
    return Served(serve(state, way, bits), state)


@torch.no_grad()
def lengths(found: Served) -> dict[str, float]:
    """The served weights' distance from W₀ + ΔW in lengths of ΔW, and the length of ΔW in lengths of W₀."""
    config = config_of(SETTINGS["r"], SETTINGS["scaling"])
    plain = adapter_layers(use_adapter(inject(base_of(SETTINGS), config), found.state))
    error, update, base = (torch.zeros(()) for _ in range(3))
    for name, layer in plain.items():
        delta, module = layer.delta_weight(), found.model.get_submodule(name)
        weight: Any = module.weight
        if isinstance(module, LoRALinear):
            weight = module.base_layer.weight + module.delta_weight()
        error += (weight - layer.base_layer.weight - delta).square().sum()
        update += delta.square().sum()
        base += layer.base_layer.weight.square().sum()
    return {"error": (error / update).sqrt().item(), "update": (update / base).sqrt().item()}


def score(found: Served, split: str) -> dict[str, float]:
    values = {"bits_per_byte": bits_of(SETTINGS, found.model, split)}
    return values | lengths(found) if split == "test" else values


def base_score(bits: int, split: str) -> dict[str, float]:
    """The base without an adapter, rounded."""
    model = unload(round_weights(inject(base_of(SETTINGS), config_of(1)), bits))
    return {"bits_per_byte": bits_of(SETTINGS, model, split)}


def body(runs: Runs) -> None:
    arms = runs.arms(list(ARMS))
    runs.expect(3)
    for bits in (32, *SETTINGS["bits"]):
        runs(f"base/{bits}/test", base_score, bits, "test")
    compete_all(runs, SETTINGS, arms, served, score)


WITNESS = Witness(("aware, 4 bits/0.008/0/test",), {"bits_per_byte": 0.005, "error": 0.02, "update": 0.02})  # fmt: skip
STUDY = Study("4_3_served", SETTINGS, body, WITNESS)
