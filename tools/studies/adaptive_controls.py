"""What the study of chapter 3.1 is to be compared with: a rank that stays small, and ranks that grow at random places.

    python tools/studies/adaptive_controls.py      about 10 minutes of one thread; goes on where it was stopped

Batches, scale, seeds, scoring and the choice of the rate are those of tools/studies/adaptive.py, whose functions it calls.
Writes lora_course/data/studies/3_1_controls.json.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import adaptive
import torch
from torch import nn

from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
from lora_course.injection import adapter_layers
from lora_course.lab import study

SETTINGS = adaptive.SETTINGS | {
    "learning_rates": {"small": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "random": [8e-3, 1.6e-2, 3.2e-2]},
}  # fmt: skip
SOURCES = [Path(__file__), *adaptive.SOURCES]


class RandomGrower(RankGrower):
    """Grows as the schedule says, at layers drawn anew for each growth."""

    def scores(self) -> dict[str, float]:
        generator = torch.Generator().manual_seed(1_000_000 * self.schedule.seed + self.total)
        return dict(
            zip(
                self.layers,
                (1 + torch.rand(len(self.layers), generator=generator)).tolist(),
                strict=True,
            )
        )


def train(arm: str, learning_rate: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """One training: the model and what is recorded."""
    model = adaptive.adapted(GrowingLoRALinear, SETTINGS["r"], seed)
    schedule = GrowthSchedule(**SETTINGS["growth"], seed=seed)
    callbacks = [RandomGrower(model, schedule)] if arm == "random" else []
    losses = study.fit(
        model, adaptive.rows(SETTINGS["domain"]), learning_rate, seed, SETTINGS["steps"], SETTINGS["batch"],
        callbacks=callbacks, disable_tqdm=True,
    )  # fmt: skip
    layers = adapter_layers(model)
    parameters = sum(layer.r * adaptive.cost(layer) for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    return model, {
        "ranks": ranks,
        "parameters": parameters,
        "losses": [round(loss, 4) for loss in losses],
    }


def main() -> None:
    results = study.Study(study.STUDIES / "3_1_controls.json", SOURCES, SETTINGS)
    start = time.perf_counter()
    for arm, rates in SETTINGS["learning_rates"].items():
        trained: dict[tuple[float, int], tuple[nn.Module, dict[str, Any]]] = {}

        def run(
            rate: float, seed: int, split: str, arm: str = arm, trained: dict = trained
        ) -> dict[str, Any]:
            if (rate, seed) not in trained:  # of the chosen rate it is, for the second split
                trained[rate, seed] = train(arm, rate, seed)
            model, result = trained[rate, seed]
            kept = result if split == "test" else {"parameters": result["parameters"]}
            return {"bits_per_byte": adaptive.score(model, split)} | kept

        def kept(rate: float, seed: int, split: str, arm: str = arm, run: Any = run) -> float:
            key = f"{arm}/{rate:g}/{seed}/{split}"
            found = results.run(key, lambda: run(rate, seed, split))["bits_per_byte"]
            print(
                f"{(time.perf_counter() - start) / 60:5.1f} min  {key:32} {found:.4f} bits a byte",
                flush=True,
            )
            return found

        means = {
            rate: statistics.fmean(kept(rate, seed, "validation") for seed in SETTINGS["seeds"])
            for rate in rates
        }
        best = min(means, key=means.__getitem__)
        assert min(rates) < best < max(rates), (arm, best)
        for seed in SETTINGS["seeds"]:
            kept(best, seed, "test")


if __name__ == "__main__":
    main()
