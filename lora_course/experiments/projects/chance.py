"""The project of chapter 3.1, "is chance better?": is crowding why growth by score ended behind growth by lot?

Batches, steps, schedule, scale and scoring are those of the studies `3_1_adaptive` and `3_1_controls`. The seeds are other
ones, 5 to 7, since the guess was made from seeds 0 to 4. "score" and "chance" are those studies' arms at the rates that they
found. "score, max 10" and "chance, max 10" have `max_r` at 10; the first searches its own rate on validation text, with
seed 5, and the second, a control, takes the rate of "chance". The other scores that the exercise names are not tried here.

Written before the run. Prediction: if crowding is the cause, the cap brings growth by score level with chance, and helps
chance less. If the score is merely noise, the cap changes nothing that three seeds can show. Decided by the intervals of
the paired differences, three seeds: an observation. Parameters are counted, as places differ in cost.
"""

from __future__ import annotations

from typing import Any

from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
from lora_course.experiments import (
    Arm,
    Kept,
    Runs,
    Study,
    Trained,
    Witness,
    adaptive,
    compete,
    rows_of,
    run_key,
    train,
)
from lora_course.experiments.adaptive_controls import RandomGrower, score

SETTINGS: dict[str, Any] = adaptive.SETTINGS | {
    "seeds": [5, 6, 7], "search_seeds": [5], "learning_rates": [8e-3, 1.6e-2, 3.2e-2], "max_r": 10,
    "searched": "score, max 10",
    "as recorded": {"score": 1.6e-2, "chance": 1.6e-2, "chance, max 10": 1.6e-2},
}  # fmt: skip


GROWERS = {"score": RankGrower, "chance": RandomGrower}


def trained(arm: str, rate: float, seed: int) -> Trained:
    model = adaptive.with_ranks(GrowingLoRALinear, SETTINGS["r"], seed)
    name, _, capped = arm.partition(", ")
    growth = SETTINGS["growth"] | ({"max_r": SETTINGS["max_r"]} if capped else {})
    grower = GROWERS[name](model, GrowthSchedule(**growth, seed=seed))
    steps, batch = SETTINGS["steps"], SETTINGS["batch"]
    return train(Arm(model, [grower]), rows_of(SETTINGS), rate, seed, steps, batch)


def body(runs: Runs) -> None:
    rates, seeds, searched = (SETTINGS[key] for key in ("learning_rates", "search_seeds", "searched"))  # fmt: skip
    recorded = SETTINGS["as recorded"]
    runs.expect(len(rates) * len(seeds) + (1 + len(recorded)) * len(runs.seeds))
    compete(runs, searched, Kept(trained, searched), score, rates, seeds)
    for arm, rate in recorded.items():
        for seed in runs.seeds:
            key = run_key(arm, rate, seed, "test")
            runs(key, lambda *how: score(trained(*how), "test"), arm, rate, seed)


WITNESS = Witness(("score/0.016/5/test",), {"bits_per_byte": 0.004, "parameters": 0})
STUDY = Study("3_1_project", SETTINGS, body, WITNESS)
