"""The project of chapter 1.2, "spend parameters, not triplets": each triplet is charged what it costs.

LoRA of rank 4 and AdaLoRA are arms of the study `1_2_adalora`; batches, steps, schedule, scale and scoring are those of that
study, and so are the seeds that search, of which the third is asked where the first two disagree. This study adds two arms,
whose budget is counted in parameters, LoRA's number in the end, and falls by the same cube:

    charged    keeps the triplets of highest score / cost until the parameters are used up; cost = in + out + 1
    by lot     the same with scores drawn once, charged alike: what is left of the gain if the score says nothing

Written before the run. Prediction: more rank in the narrow matrices than AdaLoRA gives them, and no difference of bits a
byte that three seeds can show, "charged" less AdaLoRA and less LoRA. Decided by the intervals of the paired differences,
seeds 0 to 2. If "by lot" is level with "charged", the score is not the reason of what comes out.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig
from torch import nn

from lora_course.adalora import AdaLoRALinear, kept_triplets, prune_triplets, regularizer
from lora_course.experiments import (
    Arm,
    Kept,
    Runs,
    Study,
    Trained,
    Witness,
    adapted,
    compete,
    rows_of,
    train,
)
from lora_course.experiments import adalora as first
from lora_course.experiments.study import ROUNDING
from lora_course.injection import injection_of
from lora_course.linears import zero_where

ARMS = {"charged": "importance", "by lot": "random"}
SETTINGS: dict[str, Any] = first.SETTINGS | {
    "methods": {"charged": first.METHODS["adalora"], "by lot": first.METHODS["adalora"]}, "controls": [],
    "seeds": [0, 1, 2], "learning_rates": [1.6e-2, 3.2e-2, 6.4e-2],
}  # fmt: skip


class Charged(first.Recorder):
    """Keeps the best triplets for their cost, until a number of parameters is used up.

    target: that number, of LoRA with r = target_r on the same layers.
    """

    def __init__(self, model: nn.Module, choice: str, seed: int) -> None:
        super().__init__(model, choice, seed)
        sizes = [layer.in_features + layer.out_features for layer in self.layers.values()]
        self.target = self.config.target_r * sum(sizes)
        self.cost = torch.tensor([s + 1 for s in sizes]).repeat_interleave(self.config.init_r)

    def budget(self, t: int) -> int:
        """b(t) in parameters: `RankAllocator.budget`, times the mean parameters of a rank."""
        c, final = self.config, self.final
        left = 1 - (min(max(t, c.tinit), final) - c.tinit) / (final - c.tinit)
        return int(self.target * (1 + (c.init_r / c.target_r - 1) * left**3))

    def _allocate(self, budget: int) -> dict[str, int]:
        together = torch.cat([layer.scores() for layer in self.layers.values()]) / self.cost
        order = together.argsort(descending=True, stable=True)
        keep = torch.zeros_like(together, dtype=torch.bool)
        keep[order[self.cost[order].cumsum(0) <= budget]] = True
        layers = list(self.layers.values())
        for layer, part in zip(layers, keep.split([x.r for x in layers]), strict=True):
            layer.mask.copy_(part)
            zero_where(layer.E, ~layer.mask[:, None])
        return kept_triplets(self.model)


def finish(model: nn.Module) -> dict[str, Any]:
    info: Any = injection_of(model)
    info.config.target_r = (
        info.config.init_r
    )  # the budget was one of parameters: any number of triplets may be left
    prune_triplets(model)
    return {"ranks": kept_triplets(model)}


def trained(arm: str, rate: float, seed: int) -> Trained:
    fields = SETTINGS["adalora"] | SETTINGS["methods"][arm]
    config = AdaLoraConfig(**fields, target_modules=SETTINGS["target_modules"])
    model = adapted(SETTINGS, seed, config, layer=AdaLoRALinear)
    made = Arm(model, [Charged(model, ARMS[arm], seed)], regularizer, finish=finish)
    return train(made, rows_of(SETTINGS), rate, seed, SETTINGS["steps"], SETTINGS["batch"])


def body(runs: Runs) -> None:
    rates, seeds = SETTINGS["learning_rates"], SETTINGS["search_seeds"]
    runs.expect(len(ARMS) * (len(rates) * (len(seeds) - 1) + len(runs.seeds)))
    for arm in ARMS:
        compete(runs, arm, Kept(trained, arm), first.score, rates, seeds, agree=2)


DEAREST = 256 + 704 + 1  # what a triplet of nano's MLP costs
WITNESS = Witness(
    ("charged/0.032/0/test",),
    {"bits_per_byte": 0.005, "parameters": DEAREST},
    f"{ROUNDING}; triplets of nearly one score change places with it, and what is left of the budget is less than the dearest",
)
STUDY = Study("1_2_project", SETTINGS, body, WITNESS)
