"""The project of chapter 0.1, "the other zero": A = 0 with a random B, against the usual B = 0 with a random A.

The usual start is the arm "lora" of the study `0_1_lora`: its batches, steps, seeds, scoring and scale hold here too. This
study adds the one other arm: `A` zero, `B` Kaiming-uniform, with a search of its own rate on validation text. The grid
reaches lower than that study's, since a lower rate is expected.

Written before the run. Prediction: no difference of bits a byte beyond noise, and a lower best rate for A = 0. Reason for
the rate: B's entries reach 1/√r and those of A 1/√in, so a step of A is multiplied by a larger factor than a step of B.
Decided by: the interval of the paired differences, A = 0 less B = 0, five seeds on test text. If it holds zero: "within
noise". It would be one small model and a short run in any case.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lora_course.experiments import (
    Arm,
    Kept,
    Runs,
    Study,
    Trained,
    Witness,
    adapted,
    compete,
    lora,
    rows_of,
    train,
)
from lora_course.injection import adapter_layers

SETTINGS: dict[str, Any] = lora.SETTINGS | {
    "arms": {"A = 0": lora.ARMS["lora"]}, "learning_rates": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
}  # fmt: skip


def trained(rate: float, seed: int) -> Trained:
    model = adapted(SETTINGS, seed, lora.config("lora"))
    for layer in adapter_layers(model).values():
        nn.init.zeros_(layer.A)
        nn.init.kaiming_uniform_(layer.B, a=math.sqrt(5))
    return train(Arm(model), rows_of(SETTINGS), rate, seed, SETTINGS["steps"], SETTINGS["batch"])


def body(runs: Runs) -> None:
    rates, seeds = SETTINGS["learning_rates"], SETTINGS["search_seeds"]
    runs.expect(len(rates) * len(seeds) + len(runs.seeds))
    compete(runs, "A = 0", Kept(trained), lora.score, rates, seeds)


WITNESS = Witness(
    ("A = 0/0.004/0/test",), {"bits_per_byte": 0.005, "own_domain": 0.02, "parameters": 0}
)
STUDY = Study("0_1_project", SETTINGS, body, WITNESS)
