"""Of the study of chapter 4.4: bytes and processor seconds of steps, layers, forward passes and generation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_course import lab, lora
from lora_course.experiments import base_of, config_of
from lora_course.experiments.timing import race
from lora_course.fused import FusedLoRALinear
from lora_course.injection import inject
from lora_course.lab.memory import saved_bytes
from lora_course.lora import LoRALinear

SETTINGS: dict[str, Any] = {
    "model": "nano", "batch": 4, "length": 128, "dropout": 0.1, "memory_ranks": [4, 16, 64], "autocast_rank": 16,
    "process": [8, 256, 16], "step_ranks": [8, 64], "step_rounds": 61,
    "layer": {"width": 1024, "tokens": 512, "r": 16, "rounds": 31},
    "orders": {"rows": 512, "out": 704, "ranks": [2, 4, 8, 10, 12, 16, 32, 64], "rounds": 41},
}  # fmt: skip
LAYERS = {"plain": LoRALinear, "fused": FusedLoRALinear}


def config(r: int, dropout: float = 0.0) -> LoraConfig:
    return config_of(r, lora_dropout=dropout, task_type="CAUSAL_LM")


def injected(kind: str, r: int, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """The base with an adapter whose B is not zero: "plain", "fused" or "peft"."""
    model = base_of(SETTINGS)
    torch.manual_seed(seed)
    how = config(r, dropout)
    model = get_peft_model(model, how) if kind == "peft" else inject(model, how, LAYERS[kind])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or name.endswith(".B")):
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(4096, (batch, length), generator=torch.Generator().manual_seed(0))


def forward(model: nn.Module, ids: torch.Tensor, autocast: bool = False) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def step(model: nn.Module, ids: torch.Tensor, autocast: bool = False) -> None:
    """Forward and backward pass."""
    forward(model, ids, autocast).backward()


def memory(kind: str, r: int, dropout: float, autocast: bool = False) -> dict[str, int]:
    """Bytes kept for the backward pass, and the peak of a step's tensors, gradients of the adapter included."""
    model, ids = injected(kind, r, dropout), tokens(SETTINGS["batch"], SETTINGS["length"])

    saved = saved_bytes(model, lambda: forward(model, ids, autocast))
    gc.collect()
    return {"saved": saved, "peak": lab.peak_memory(lambda: step(model, ids, autocast))[1]}


def process_step(kind: str, dropout: float) -> None:
    """What runs in a process of its own."""
    batch, length, r = SETTINGS["process"]
    step(injected(kind, r, dropout), tokens(batch, length))


def process(kind: str, dropout: float) -> dict[str, int]:
    """By how many bytes a process grows that runs a step."""
    return {"grown": lab.process_peak(f"{__name__}:process_step", kind, dropout).grown}


def step_times(r: int, dropout: float) -> dict[str, list[float]]:
    """Of a whole step; "B as it lies" is the plain one without lora.LARGEST_COPIED_RANK's transposed copy."""
    models = {kind: injected(kind, r, dropout) for kind in ("plain", "fused", "peft")}
    ids = tokens(SETTINGS["batch"], SETTINGS["length"])

    def arm(model: nn.Module, thin: int = lora.LARGEST_COPIED_RANK) -> Callable[[], None]:
        def run() -> None:
            before, lora.LARGEST_COPIED_RANK = lora.LARGEST_COPIED_RANK, thin
            model.zero_grad()
            step(model, ids)
            lora.LARGEST_COPIED_RANK = before

        return run

    arms = {kind: arm(model) for kind, model in models.items()}
    return race(arms | {"B as it lies": arm(models["plain"], 0)}, SETTINGS["step_rounds"])


def order_times(r: int) -> dict[str, list[float]]:
    """The two thin products of the backward pass that B takes part in, each written in two ways; g is ∂L/∂y, h is x Aᵀ."""
    s = SETTINGS["orders"]
    torch.manual_seed(0)
    g, h, B = torch.randn(s["rows"], s["out"]), torch.randn(s["rows"], r), torch.randn(s["out"], r)
    Bt = B.t().contiguous()
    first = {"gᵀh": lambda: g.t() @ h, "(hᵀg)ᵀ": lambda: (h.t() @ g).t()}
    second = {"gB": lambda: g @ B, "g(Bᵀ)ᵀ": lambda: g @ Bt.t()}
    return race(first | second, s["rounds"])


def layer_times() -> dict[str, list[float]]:
    """Forward and backward pass of one wide layer."""
    s = SETTINGS["layer"]
    arms = {}
    for kind, layer in LAYERS.items():
        torch.manual_seed(0)
        wrapped = layer(nn.Linear(s["width"], s["width"]), s["r"], s["r"]).train()
        nn.init.normal_(wrapped.B)
        x = torch.randn(s["tokens"], s["width"], requires_grad=True)
        arms[kind] = lambda wrapped=wrapped, x=x: wrapped(x).sum().backward()
    return race(arms, s["rounds"])
