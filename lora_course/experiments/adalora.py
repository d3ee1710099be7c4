"""The study of chapter 1.2: AdaLoRA against plain LoRA of the same final budget, with the same learning-rate search.

Each method tries each rate with each search seed. Controls choose the triplets in another way than by importance in the whole
model; they take AdaLoRA's rate. All end with 112 triplets in nano's 28 linear layers, at scale 2.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor

from lora_course import adalora
from lora_course.adalora import AdaLoRALinear
from lora_course.experiments import Arm, Runs, Study, Trained, Witness
from lora_course.experiments.arms import NANO, adapted, base_runs, train_as, values_of
from lora_course.experiments.rates import at_rate, compete_all
from lora_course.injection import injection_of

SETTINGS = NANO | {
    "steps": 60, "batch": 4, "score_bytes": {"validation": 20_000, "test": 40_000}, "search_seeds": [0, 1, 2],
    "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2],
    "methods": {"lora": {"r": 4, "lora_alpha": 8}, "adalora": {"orth_reg_weight": 0.5}, "free": {"orth_reg_weight": 0.0}},
    "controls": ["magnitude", "per layer", "random"], "target_modules": "all-linear",
    "adalora": {"init_r": 6, "target_r": 4, "lora_alpha": 12, "tinit": 6, "tfinal": 20, "deltaT": 2, "total_step": 60},
}  # fmt: skip
METHODS, CONTROLS = SETTINGS["methods"], SETTINGS["controls"]


class Recorder(adalora.RankAllocator):
    """An allocator that remembers what it chose, and that may choose by something else than importance."""

    def __init__(self, model: torch.nn.Module, choice: str, seed: int) -> None:
        super().__init__(model)
        self.history: dict[str, list[int]] = {}
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values() if choice != "importance" else ():
            scores = {"magnitude": magnitude, "per layer": per_layer, "random": drawn}[choice]
            layer.scores = scores(layer, generator)  # type: ignore[method-assign]  # another choice, for comparison

    def step(self, t: int) -> dict[str, int] | None:
        chosen = super().step(t)
        if chosen:
            self.history[str(t)] = list(chosen.values())
        return chosen


def magnitude(layer: AdaLoRALinear, _: torch.Generator):
    """The size of λ alone, as in a truncated SVD."""
    return lambda: layer.E.abs().flatten()


def per_layer(layer: AdaLoRALinear, _: torch.Generator):
    """Scores under which each layer keeps as many triplets as the others: the place of each within its layer."""
    return lambda: 1.0 + AdaLoRALinear.scores(layer).argsort().argsort()


def drawn(layer: AdaLoRALinear, generator: torch.Generator):
    """Scores drawn once."""
    fixed: Tensor = 0.1 + torch.rand(layer.r, generator=generator)
    return lambda: fixed


def make(method: str, seed: int, choice: str = "importance") -> Arm:
    """An arm; choice: by what AdaLoRA chooses its triplets."""
    targets = SETTINGS["target_modules"]
    if method == "lora":
        return Arm(adapted(SETTINGS, seed, LoraConfig(**METHODS[method], target_modules=targets)))
    config = AdaLoraConfig(**SETTINGS["adalora"], **METHODS[method], target_modules=targets)
    model = adapted(SETTINGS, seed, config, layer=AdaLoRALinear)
    allocator = Recorder(model, choice, seed)

    def finish(model: torch.nn.Module) -> dict[str, Any]:
        info: Any = injection_of(model)
        info.config.orth_reg_weight = 1.0  # to measure by, as "free" has none
        orthogonality = adalora.regularizer(model).item()
        ranks = adalora.kept_triplets(adalora.prune_triplets(model))
        return {"orthogonality": orthogonality, "ranks": ranks, "history": allocator.history}

    return Arm(model, [allocator], adalora.regularizer, finish=finish)


def trained(method: str, rate: float, seed: int, choice: str = "importance") -> Trained:
    return train_as(SETTINGS, make(method, seed, choice), rate, seed)


def score(found: Trained, split: str) -> dict[str, Any]:
    told = ("orthogonality",) if split == "validation" else found.seen
    return values_of(SETTINGS, found, split) | {k: found.seen[k] for k in told if k in found.seen}


def body(runs: Runs) -> None:
    runs.expect(2 + len(CONTROLS) * len(runs.seeds))
    base_runs(runs, SETTINGS)
    best = compete_all(runs, SETTINGS, METHODS, trained, score)
    for choice in CONTROLS:
        other = lambda r, s: score(trained("adalora", r, s, choice), "test")  # noqa: E731
        at_rate(runs, choice, best["adalora"], other)


WITNESS = Witness(("adalora/0.032/0/test",), {"bits_per_byte": 0.005}, chapter="1_2_adalora")
STUDY = Study("1_2_adalora", SETTINGS, body, WITNESS)
