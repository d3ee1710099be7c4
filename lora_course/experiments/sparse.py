"""The study of chapter 4.1: gates, masked factors and a mask on ΔW against plain LoRA of as many trained parameters.

One method of each family searches its learning rate, and all methods of the family are trained at it. The scale is 2 for all.
"factors/4" trains as many numbers as "lora/4", and so do the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_course import sparse
from lora_course.experiments import NANO, Arm, Runs, Study, Trained, Witness, adapted
from lora_course.experiments.arms import base_runs, config_of, file_bytes, train_as, values_of
from lora_course.experiments.rates import at_rate, compete_all
from lora_course.injection import layers_of
from lora_course.lora import LoRALinear

LAYERS = {
    "lora": LoRALinear, "gates": sparse.GatedLoRALinear, "factors": sparse.SparseLoRALinear, "delta": sparse.SparseDeltaLinear,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lora/4": {"r": 4}, "lora/8": {"r": 8}, "lora/2": {"r": 2},
    "factors/4": {"r": 8, "sparsity": 0.5}, "factors/2": {"r": 8, "sparsity": 0.75},
    "delta/4": {"r": 4}, "delta/2": {"r": 2}, "delta/magnitude": {"r": 4, "mask": "magnitude"},
    "gates/2": {"r": 8, "penalty": 2.0}, "gates/1": {"r": 8, "penalty": 1.0}, "gates/4": {"r": 8, "penalty": 4.0},
}  # fmt: skip
SEARCHED = ["lora/4", "factors/4", "delta/4", "gates/2"]
SETTINGS = NANO | {
    "steps": 40, "batch": 4, "score_bytes": {"validation": 15_000, "test": 30_000}, "search_seeds": [0],
    "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "scaling": 2, "methods": METHODS, "searched": SEARCHED,
    "target_modules": "all-linear",
}  # fmt: skip


class Recorder(sparse.GateSparsity):
    """Remembers how many gates are open after each step."""

    def __init__(self, model: nn.Module, penalty: float) -> None:
        super().__init__(model, penalty)
        self.opened: list[int] = []

    def step(self, optimizer: torch.optim.Optimizer, t: int = 1) -> int:
        self.opened.append(super().step(optimizer, t))
        return self.opened[-1]


def make(method: str, seed: int) -> Arm:
    """An arm; masks and gates come from torch's generator, as the factors do."""
    fields, family = METHODS[method], family_of(method)
    arguments = {key: fields[key] for key in ("sparsity", "mask") if key in fields}
    config = config_of(fields["r"], SETTINGS["scaling"])
    model = adapted(SETTINGS, seed, config, layer=LAYERS[family], **arguments)
    if family != "gates":
        return Arm(model)
    recorder, start = Recorder(model, fields["penalty"]), gates_of(model)

    def finish(model: nn.Module) -> dict[str, Any]:
        gates = {"start": start, "end": gates_of(model)}
        sparse.prune_gates(model)
        return {"ranks": sparse.open_gates(model), "opened": recorder.opened, "gates": gates}

    return Arm(model, [recorder], finish=finish)


def family_of(method: str) -> str:
    return method.split("/")[0]


def gates_of(model: nn.Module) -> list[list[float]]:
    layers = layers_of(model, sparse.GatedLoRALinear).values()
    return [[round(gate, 4) for gate in layer.gate.tolist()] for layer in layers]


def trained(method: str, rate: float, seed: int) -> Trained:
    return train_as(SETTINGS, make(method, seed), rate, seed)


def score(found: Trained, split: str) -> dict[str, Any]:
    values = values_of(SETTINGS, found, split) | {"bytes": file_bytes(found.arm)}
    return values | found.seen if split == "test" else values


def body(runs: Runs) -> None:
    others = [method for method in METHODS if method not in SEARCHED]
    runs.expect(2 + len(others) * len(runs.seeds))
    base_runs(runs, SETTINGS)
    found = compete_all(runs, SETTINGS, SEARCHED, trained, score)
    best = {family_of(method): rate for method, rate in found.items()}
    for method in others:
        tested = lambda r, s: score(trained(method, r, s), "test")  # noqa: E731
        at_rate(runs, method, best[family_of(method)], tested)


TOLERANCES = {"bits_per_byte": 0.005, "parameters": 0}
WITNESS = Witness(("delta/4/0.016/0/test",), TOLERANCES, chapter="4_1_sparse")
STUDY = Study("4_1_sparse", SETTINGS, body, WITNESS)
