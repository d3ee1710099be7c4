"""A second study of chapter 3.2: what the first one's merging is worth at smaller weights and without a cut, and a short distillation.

The first study merges at three weights and finds the smallest best: the grid goes on below it here. "cut" is its arm, the sum
of the teachers' updates at the student's rank; "whole" is the sum at full rank. "pair/0" is small enough for the chapter to
repeat: two of the teachers, and one student of both.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_course.distillation import DistillationConfig
from lora_course.experiments import Runs, Study, Witness, compete_all
from lora_course.experiments import distillation as first
from lora_course.experiments import distillation_models as models
from lora_course.experiments.domains import own_bits
from lora_course.lora import AdapterState

SETTINGS: dict[str, Any] = {
    "weights": [0.0625, 0.125, 0.1875, 0.25, 0.5], "seeds": [0, 1, 2], "search_seeds": [0, 1, 2],
    "pair": {"domains": ["bible", "python"], "seed": 0, "steps": 16, "learning_rate": 1.6e-2, "batch": 8},
}  # fmt: skip


def pair() -> dict[str, Any]:
    """Two teachers into one student, each row's own teacher its own; test text."""
    how, domains = SETTINGS["pair"], SETTINGS["pair"]["domains"]
    states = {domain: models.teacher_states(how["seed"])[domain] for domain in domains}
    config, weights = DistillationConfig(alpha=models.SETTINGS["alpha"]), torch.eye(len(states))
    plan = (how["learning_rate"], how["seed"], how["steps"])
    rows = models.mixed_rows(domains, how["steps"])
    model, history = models.distil(states, weights, config, *plan, rows)
    own = own_bits(models.SETTINGS, states, "test")
    scores = first.score(model, "test", domains)
    return first.result(scores, own_teacher=own, divergences=history["divergences"])


def summed(arm: str, weight: float, seed: int) -> AdapterState:
    return models.merged(weight, seed, cut=arm == "cut")


def body(runs: Runs) -> None:
    runs.expect(1)
    runs("pair/0/test", pair)
    searched = SETTINGS | {"first": SETTINGS["weights"]}
    compete_all(runs, searched, ("cut", "whole"), summed, first.scored)


WITNESS = Witness(
    ("pair/0/test",),
    {"bits_per_byte": 0.005, "own_teacher": 0.005},
    "sums in another order (other code, threads or processors, fp32 in place of bf16) move three trainings of 16 to 24 steps by thousandths",
    chapter="3_2_distillation",
)
STUDY = Study("3_2_merge", SETTINGS, body, WITNESS)
