"""The project of chapter 2.2, "which stages pay?": rates that begin in full in each stage, and stages that are not alike.

The study `2_2_progressive` has four alike stages under one falling rate ("stack") and one LoRA of rank 16 ("large"): its
batches, steps, scale, scoring and grid of rates hold here too. This study adds two plans, each with its own search:

    full rates    that study's stages, and in each of them the rate begins in full and falls to zero (`schedule="stage"`)
    unequal       the same rates; attention first and the MLP later, rank 10 and then 6 in each: 16 in every matrix in the end

Written before the run. Predictions: "full rates" is nearer to one LoRA of rank 16 than "stack" is, and not ahead of it;
decided by the interval of full rates less stack. Without its first stage it loses more than without its last, since later
stages correct what the first one did. The other plan's prediction, "unequal" below one LoRA of rank 16, is tried too: beside
"full rates" it differs in targets and ranks alone. Three paired seeds: an observation.
"""

from __future__ import annotations

import tempfile
from typing import Any

from lora_course.experiments import (
    Kept,
    Runs,
    Study,
    Witness,
    base_of,
    bits_of,
    compete,
    config_of,
)
from lora_course.experiments import progressive as first
from lora_course.experiments.lora import ATTENTION, MLP
from lora_course.injection import inject
from lora_course.lora import AdapterState
from lora_course.progressive import Stage, stage_states, train_stages
from lora_course.states import concatenate, use_adapter

PLANS: dict[str, dict[str, Any]] = {
    "full rates": {"r": [4, 4, 4, 4], "targets": ["all-linear"] * 4},
    "unequal": {"r": [10, 6, 10, 6], "targets": [ATTENTION, ATTENTION, MLP, MLP]},
}
SETTINGS: dict[str, Any] = first.SETTINGS | {
    "methods": PLANS, "schedule": "stage", "seeds": [0, 1, 2], "parts": ["without first", "without last"],
}  # fmt: skip


def trained(arm: str, rate: float, seed: int) -> dict[str, Any]:
    """One training: the stacked model and its losses."""
    plan, warmup = PLANS[arm], SETTINGS["warmup"]
    steps, model = SETTINGS["steps"] // len(plan["r"]), base_of(SETTINGS)
    of_stages = zip(plan["r"], plan["targets"], strict=True)
    stages = [Stage(r, targets, rate, steps, warmup) for r, targets in of_stages]
    parts, fields = first.parts_of(seed, len(stages)), first.TRAINING
    how: dict[str, Any] = {"scaling": SETTINGS["scaling"], "schedule": SETTINGS["schedule"], "seed": seed}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        results = train_stages(model, stages, parts, folder, **how, **fields)
    losses = [round(entry["loss"], 4) for result in results for entry in result["history"]]
    return {"states": stage_states(model), "losses": losses}


def score(found: dict[str, Any], split: str) -> dict[str, Any]:
    """Bits a byte with all stages; on test text also without the first one, and without the last."""
    states = found["states"]

    def bits(kept: list[AdapterState]) -> float:
        model = inject(base_of(SETTINGS), config_of(1))
        return bits_of(SETTINGS, use_adapter(model, concatenate(kept)), split)

    values: dict[str, Any] = {"bits_per_byte": bits(states)}
    if split == "test":
        left_out = zip(SETTINGS["parts"], (states[1:], states[:-1]), strict=True)
        values |= {name: bits(kept) for name, kept in left_out}
        values["losses"] = found["losses"]
    return values


def body(runs: Runs) -> None:
    rates, seeds = SETTINGS["learning_rates"], SETTINGS["search_seeds"]
    runs.expect(len(PLANS) * (len(rates) * len(seeds) + len(runs.seeds)))
    for arm in PLANS:
        compete(runs, arm, Kept(trained, arm), score, rates, seeds)


WITNESS = Witness(("full rates/0.008/0/test",), {"bits_per_byte": 0.005})
STUDY = Study("2_2_project", SETTINGS, body, WITNESS)
