"""The study of chapter 3.1: ranks that grow during training against uniform ones, against the grown ones from the start, and
against pruning from above, all with the same number of parameters in the end; which layers grow on which text; and what four
ways to grow do to the loss at that step (`adaptive_moment`).

All arms see the same batches at the same scale, with the same learning-rate grid. The grown arm goes first: the other three
get, seed by seed, as many parameters as it ended with.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower, rank_history
from lora_course.experiments import Arm, Runs, Study, Trained, Witness
from lora_course.experiments.adaptive_moment import moment
from lora_course.experiments.arms import NANO, adapted, base_runs, bits_of, config_of, train_as
from lora_course.experiments.rates import at_rate, compete_all, run_key
from lora_course.injection import adapter_layers
from lora_course.lora import LoRALinear

SETTINGS = NANO | {
    "domains": ["shakespeare", "bible", "milton", "python"], "steps": 60, "batch": 8, "score_bytes": {"validation": 20_000, "test": 40_000},
    "search_seeds": [0, 1, 2], "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "scaling": 2.0, "r": 2, "high_r": 16,
    "growth": {"budget": 224, "start": 12, "every": 3, "top": 7, "add": 2, "max_r": 16},  # on average 8 a layer, after step 45
    "moment": {"learning_rate": 8e-3, "before": 15, "after": 12, "add": 6},
}  # fmt: skip
ARMS = ["grown", "uniform", "final", "pruned"]
Ranks = dict[str, int]


class Pruner(TrainerCallback):
    """Growth in the mirror: the same score, part by part, and at the same steps the lowest parts of all layers go for good.

    A part is a row of `A` with its column of `B`, which is set to zero and held there. What is too much for `parameters` goes
    in equal shares.
    """

    def __init__(self, model: nn.Module, steps: list[int], parameters: int, beta: float) -> None:
        self.layers, self.beta = adapter_layers(model), beta
        self.kept = {n: torch.ones(layer.r, dtype=torch.bool) for n, layer in self.layers.items()}
        self.mean = {n: torch.zeros(layer.r) for n, layer in self.layers.items()}
        self.deviation = {n: torch.zeros(layer.r) for n, layer in self.layers.items()}
        most, count = parameters_of(self.layers, self.ranks), len(steps)
        shares = {step: (i + 1) / count for i, step in enumerate(steps)}
        self.targets = {step: most + (parameters - most) * x for step, x in shares.items()}

    @property
    def ranks(self) -> Ranks:
        return {name: int(kept.sum()) for name, kept in self.kept.items()}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, layer in self.layers.items():
            size = math.sqrt(layer.in_features * layer.out_features)
            assert layer.B.grad is not None  # a step was just made
            part = (layer.B * layer.B.grad).sum(0).abs() / size
            self.mean[name].lerp_(part, 1 - self.beta)
            self.deviation[name].lerp_((part - self.mean[name]).abs(), 1 - self.beta)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.targets:
            parts = []
            for name in self.layers:
                scores = self.mean[name] * self.deviation[name]
                kept = self.kept[name].nonzero().flatten().tolist()
                parts += [(scores[i].item(), name, i) for i in kept]
            excess = parameters_of(self.layers, self.ranks) - self.targets[state.global_step]
            for _score, name, i in sorted(parts):
                if excess <= 0:
                    break
                self.kept[name][i] = False
                excess -= cost(self.layers[name])
        # at every step: Adam goes on moving what has moments
        for name, layer in self.layers.items():
            layer.B[:, ~self.kept[name]] = 0


def cost(layer: LoRALinear) -> int:
    """Parameters of one rank."""
    return layer.in_features + layer.out_features


def parameters_of(layers: dict[str, LoRALinear], ranks: Ranks) -> int:
    return sum(ranks[name] * cost(layer) for name, layer in layers.items())


def uniform_ranks(costs: dict[str, int], parameters: int) -> Ranks:
    """As equal ranks as there are for so many parameters: one value, and one more for some layers, spread over the model."""
    r, left = divmod(parameters, sum(costs.values()))
    ranks, names = dict.fromkeys(costs, r), list(costs)
    for i in range(len(names)):
        name = names[i * 11 % len(names)]  # 11 and nano's 28 layers have no common divisor
        if costs[name] <= left:
            ranks[name], left = r + 1, left - costs[name]
    return ranks


def with_ranks(layer: type[LoRALinear], ranks: int | Ranks, seed: int) -> nn.Module:
    """nano with an adapter of the study's scale; ranks: one for all layers, or by layer."""
    by_layer = ranks if isinstance(ranks, dict) else {}
    common = ranks if isinstance(ranks, int) else min(ranks.values())
    alpha = {name: SETTINGS["scaling"] * r for name, r in by_layer.items()}
    patterns: dict[str, Any] = {"rank_pattern": by_layer, "alpha_pattern": alpha}
    config = config_of(common, SETTINGS["scaling"], **patterns)
    return adapted(SETTINGS, seed, config, layer=layer)


def make(arm: str, seed: int, like: Ranks | None = None) -> Arm:
    """like: the ranks that the grown arm of this seed ended with."""
    schedule = GrowthSchedule(**SETTINGS["growth"], seed=seed)
    if arm == "grown":
        model = with_ranks(GrowingLoRALinear, SETTINGS["r"], seed)
        return Arm(model, [RankGrower(model, schedule)], finish=histories)
    layers = adapter_layers(with_ranks(LoRALinear, 1, 0))
    assert like is not None  # the other arms copy the grown one's parameters
    total = parameters_of(layers, like)
    if arm == "pruned":
        model = with_ranks(LoRALinear, SETTINGS["high_r"], seed)
        pruner = Pruner(model, schedule.steps(SETTINGS["r"] * len(layers)), total, schedule.beta)
        return Arm(model, [pruner], finish=lambda model: {"ranks": pruner.ranks})
    costs = {name: cost(layer) for name, layer in layers.items()}
    ranks = like if arm == "final" else uniform_ranks(costs, total)
    return Arm(with_ranks(LoRALinear, ranks, seed))


def histories(model: nn.Module) -> dict[str, Any]:
    history = rank_history(model)
    by_layer = {n: [entry["ranks"][n] for entry in history] for n in adapter_layers(model)}
    return {"history": by_layer, "steps": [entry["step"] for entry in history]}


def trained(
    grown: dict[int, Ranks], arm: str, rate: float, seed: int, domain: str | None = None
) -> Trained:
    return train_as(SETTINGS, make(arm, seed, grown.get(seed)), rate, seed, domain)


def seen(found: Trained) -> dict[str, Any]:
    layers = adapter_layers(found.model)
    ranks = {"ranks": {name: layer.r for name, layer in layers.items()}} | found.seen
    counted = {"parameters": parameters_of(layers, ranks["ranks"]), "seconds": found.seconds}
    return ranks | counted | {"losses": found.curve}


def score(found: Trained, split: str) -> dict[str, Any]:
    values = {"bits_per_byte": bits_of(SETTINGS, found.model, split)} | seen(found)
    if split == "validation":
        return {key: values[key] for key in ("bits_per_byte", "parameters", "seconds")}
    return values


def body(runs: Runs) -> None:
    grown: dict[int, Ranks] = {}  # by seed, once the first arm is trained
    arm_of = functools.partial(trained, grown)
    others = [domain for domain in SETTINGS["domains"] if domain != SETTINGS["domain"]]
    runs.expect(2 + (1 + len(others)) * len(runs.seeds))
    for seed in runs.seeds:
        runs(f"moment/{seed}", moment, SETTINGS, seed)
    base_runs(runs, SETTINGS)
    rate = compete_all(runs, SETTINGS, ARMS[:1], arm_of, score)["grown"]
    for seed in dict.fromkeys([*runs.seeds, *SETTINGS["search_seeds"]]):
        grown[seed] = runs.recorded[run_key("grown", rate, seed, "test")]["ranks"]
    compete_all(runs, SETTINGS, ARMS[1:], arm_of, score)
    for domain in others:
        at_rate(runs, domain, rate, lambda r, s: seen(arm_of("grown", r, s, domain)), "ranks")


WITNESS = Witness(("grown/0.016/0/test",), {"bits_per_byte": 0.004}, chapter="3_1_adaptive")
STUDY = Study("3_1_adaptive", SETTINGS, body, WITNESS)
