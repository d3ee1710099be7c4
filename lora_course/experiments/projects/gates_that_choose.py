"""The project of chapter 4.1: gates that all start at one, so that no draw decides which of them close.

Rank 8, text, steps, batch and scoring are those of the chapter's study, and so is the rate that it found for gates. The penalty is
searched by halving its range, on how many gates seed 0 leaves open: half of them, as many as LoRA of rank 4 has ranks. It is never
searched on the score. LoRA of rank 4 is the study's, at the rate found for it, which plain LoRA of other ranks takes over.

    gates         λ is above 1, as 40 steps at this rate close no gate that starts at one with less: the search alone, no score
    fast gates    a gate stands for eight times the number that is trained, which is a rate eight times higher for gates: λ is
                  then below 1, and a gate whose gradient keeps its sign can stay, as chapter 4.1 says
    as found      plain LoRA with the ranks that "fast gates" left, trained anew
    shuffled      the same ranks dealt to the matrices by lot

Expected, before the first run. With "gates" all close within a narrow range of penalties, as none can outrun the threshold. With
"fast gates" the range is wide, and seeds agree about the matrices in which gates stay. They do not differ from LoRA of rank 4 by
more than three seeds can show; nor does "as found" from "shuffled".
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch

from lora_course.experiments import (
    ROUNDING,
    Arm,
    Runs,
    Study,
    Trained,
    Witness,
    adapted,
    config_of,
    run_key,
    sparse,
    train,
)
from lora_course.experiments.arms import bits_of, rows_of
from lora_course.lora import LoRALinear
from lora_course.sparse import GatedLoRALinear, open_gates, prune_gates

SPEED = {"fast gates": 8, "gates": 1}
PENALTIES = {"fast gates": [0.1, 0.9], "gates": [2.75, 3.75]}
PLAIN = ["as found", "shuffled"]
SETTINGS: dict[str, Any] = {
    key: sparse.SETTINGS[key]
    for key in ("model", "domain", "steps", "batch", "length", "train_bytes", "score_bytes", "scaling")
} | {"seeds": [0, 1, 2], "r": 8, "speed": SPEED, "penalties": PENALTIES, "halvings": 5, "rate of gates": 1.6e-2, "rate": 8e-3}  # fmt: skip


class FastGates(GatedLoRALinear):
    """A gate is `speed` times its parameter, and starts at one: Adam then moves it `speed` times as far in a step."""

    def __init__(self, *arguments: Any, speed: int, **fields: Any) -> None:
        super().__init__(*arguments, gate_init="ones", **fields)
        self.speed = speed
        self.gate.data /= speed

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        A, B, scaling = super().factors()
        return self.speed * A, B, scaling


def gated(arm: str, penalty: float, seed: int) -> Trained:
    config, speed = config_of(SETTINGS["r"], SETTINGS["scaling"]), SPEED[arm]
    model = adapted(SETTINGS, seed, config, layer=FastGates, speed=speed)
    recorder = sparse.Recorder(model, penalty)

    def finish(model: torch.nn.Module) -> dict[str, Any]:
        prune_gates(model)
        return {"opened": recorder.opened, "ranks": open_gates(model)}

    return fitted(Arm(model, [recorder], finish=finish), SETTINGS["rate of gates"], seed)


def plain(arm: str, ranks: Mapping[str, int], seed: int) -> Trained:
    """LoRA with a rank for each matrix; those of rank 0 are left out."""
    dealt = list(ranks.values())
    if arm == "shuffled":
        random.Random(seed).shuffle(dealt)
    own = {name: r for name, r in zip(ranks, dealt, strict=True) if r}
    alpha = {name: SETTINGS["scaling"] * r for name, r in own.items()}
    patterns = {"target_modules": list(own), "rank_pattern": own, "alpha_pattern": alpha}
    model = adapted(SETTINGS, seed, config_of(1, SETTINGS["scaling"], **patterns), layer=LoRALinear)
    return fitted(Arm(model, finish=lambda model: {"ranks": own}), SETTINGS["rate"], seed)


def fitted(arm: Arm, rate: float, seed: int) -> Trained:
    return train(arm, rows_of(SETTINGS), rate, seed, SETTINGS["steps"], SETTINGS["batch"])


def score(found: Trained) -> dict[str, Any]:
    bits = bits_of(SETTINGS, found.model, "test")
    counted = found.arm.parameters(found.model)
    return {"bits_per_byte": bits, "parameters": counted, "losses": found.curve} | found.seen


def halving(runs: Runs, arm: str) -> float:
    """Of the penalties tried with seed 0 the one that leaves most nearly half of the gates open."""
    (low, high), tried = PENALTIES[arm], {}
    for _ in range(SETTINGS["halvings"]):
        penalty = (low + high) / 2
        key = f"penalty/{arm}/{penalty:g}"
        seen = runs(key, lambda p=penalty: gated(arm, p, 0).seen)
        share = sum(seen["ranks"].values()) / (SETTINGS["r"] * len(seen["ranks"]))
        tried[abs(share - 0.5)] = penalty
        low, high = (penalty, high) if share > 0.5 else (low, penalty)
    return tried[min(tried)]


def body(runs: Runs) -> None:
    arms = ("fast gates", *PLAIN)
    runs.expect(len(SPEED) * SETTINGS["halvings"] + len(arms) * len(runs.seeds))
    penalty = halving(runs, "fast gates")
    for seed in runs.seeds:
        one = lambda s: score(gated("fast gates", penalty, s))  # noqa: E731
        ranks = runs(run_key("fast gates", penalty, seed, "test"), one, seed)["ranks"]
        for arm in PLAIN:
            other = lambda s, arm=arm, ranks=ranks: score(plain(arm, ranks, s))  # noqa: E731
            runs(run_key(arm, SETTINGS["rate"], seed, "test"), other, seed)
    halving(runs, "gates")


WITNESS = Witness(
    ("shuffled/0.008/0/test",),
    {"bits_per_byte": 0.005, "parameters": 0},
    ROUNDING + "; which gates stay open is moved by it, their ranks are taken from the record",
)
STUDY = Study("4_1_project", SETTINGS, body, WITNESS)
