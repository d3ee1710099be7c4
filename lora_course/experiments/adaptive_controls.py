"""What the study of chapter 3.1 is to be compared with: a rank that stays small, and ranks that grow at random places.

Batches, scale, seeds, scoring and the choice of the rate are those of that study.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
from lora_course.experiments import Arm, Runs, Study, Trained, Witness, adaptive
from lora_course.experiments.arms import train_as
from lora_course.experiments.rates import compete_all

SETTINGS = adaptive.SETTINGS | {
    "learning_rates": {"small": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "random": [8e-3, 1.6e-2, 3.2e-2]},
}  # fmt: skip


class RandomGrower(RankGrower):
    """Grows as the schedule says, at layers drawn anew for each growth."""

    def scores(self) -> dict[str, float]:
        generator = torch.Generator().manual_seed(1_000_000 * self.schedule.seed + self.total)
        drawn = (1 + torch.rand(len(self.layers), generator=generator)).tolist()
        return dict(zip(self.layers, drawn, strict=True))


def trained(arm: str, rate: float, seed: int) -> Trained:
    model = adaptive.with_ranks(GrowingLoRALinear, SETTINGS["r"], seed)
    schedule = GrowthSchedule(**SETTINGS["growth"], seed=seed)
    callbacks = [RandomGrower(model, schedule)] if arm == "random" else []
    return train_as(SETTINGS, Arm(model, callbacks), rate, seed)


def score(found: Trained, split: str) -> dict[str, Any]:
    values = adaptive.score(found, split)
    del values["seconds"]
    return values


def body(runs: Runs) -> None:
    compete_all(runs, SETTINGS, SETTINGS["learning_rates"], trained, score)


WITNESS = Witness(("random/0.016/0/test",), {"bits_per_byte": 0.004, "parameters": 0})
STUDY = Study("3_1_controls", SETTINGS, body, WITNESS)
