"""The project of chapter 3.3: TIES and the mean of updates, each at a scale of its own.

The adapters are those of the chapter's isolated runs at their rate, trained again: four domains, three seeds. A merge is cut to
their rank, and scored as the study scores: the mean bits a byte of the four domains.

    mean        (s / 4) Σ ΔWₖ
    TIES d      s · TIES of the ΔWₖ at density d; signs are elected before the scale, so it only multiplies

The scale s is searched over the same grid for all, on validation text, by the mean of the three seeds, and beyond an edge where
the best is there. TIES has its density on top: an advantage, so the chapter's own density, 0.2, is tested too.

Expected, before the first run. TIES wants a scale below 1, the mean one above 1. At the density of 0.2 TIES stays above the mean at
its best scale, by less than half of what it is above it at 1. At density 1 the two are within noise of each other.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from lora_course.continual import Isolated
from lora_course.experiments import (
    ROUNDING,
    Kept,
    Runs,
    Study,
    Witness,
    adapted,
    compete,
    config_of,
    continual,
)
from lora_course.lora import AdapterState
from lora_course.merging import ties
from lora_course.states import concatenate, truncate, use_adapter

SETTINGS: dict[str, Any] = {
    key: continual.SETTINGS[key]
    for key in ("model", "r", "steps", "batch", "length", "train_bytes", "score_bytes", "piece")
} | {
    "domains": continual.DOMAINS, "learning_rate": 8e-3, "seeds": [0, 10, 20], "search_seeds": [0, 10, 20],
    "scales": [0.25, 0.5, 1.0, 2.0], "densities": [0.2, 1.0],
}  # fmt: skip


@cache
def adapters(seed: int) -> list[AdapterState]:
    """One of each domain, as the chapter's study trains them."""
    strategy = Isolated()
    continual.sequence(strategy, SETTINGS["learning_rate"], seed, "validation")
    return strategy.states


@cache
def merged(arm: str, seed: int) -> AdapterState:
    """At scale 1."""
    states, r = adapters(seed), SETTINGS["r"]
    if arm == "mean":
        return truncate(concatenate(states, [1 / len(states)] * len(states)), r)
    return ties(states, r, float(arm.removeprefix("TIES "))).state


def scaled(arm: str, scale: float, seed: int) -> AdapterState:
    whole = merged(arm, seed)
    return {key: scale * t if key.endswith(".scaling") else t for key, t in whole.items()}


def score(state: AdapterState, split: str) -> dict[str, Any]:
    model = use_adapter(adapted(SETTINGS, 0, config_of(SETTINGS["r"])), state)
    found = continual.result([continual.score_of(model, d, split) for d in SETTINGS["domains"]])
    return {"bits_per_byte": found["ACC"], "scores": found["scores"]}


def body(runs: Runs) -> None:
    scales, asked = SETTINGS["scales"], SETTINGS["search_seeds"]
    arms = runs.arms(["mean", *(f"TIES {density:g}" for density in SETTINGS["densities"])])
    runs.expect(len(arms) * (len(scales) * len(asked) + len(runs.seeds)))
    for arm in arms:
        compete(runs, arm, Kept(scaled, arm), score, scales, asked)


WITNESS = Witness(
    ("mean/1/0/validation",),
    {"bits_per_byte": 0.005},
    ROUNDING + "; four trainings of 20 steps and a merge",
)
STUDY = Study("3_3_project", SETTINGS, body, WITNESS)
