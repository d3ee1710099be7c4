"""The study of chapter 4.3: LoRA's factors in few bits, trained quantised or quantised afterwards, against bytes.

Trained: plain LoRA of three ranks (rank 1 in fp32 and rank 2 in 16 bits take about the bytes of rank 8 in 4 bits), and rank 8
with quantised factors. What is quantised after training is plain LoRA's own run of that seed. Bytes are those of the files
that are written. Scale 2 for all.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from lora_course.experiments import NANO, ROUNDING, Arm, Runs, Study, Trained, Witness, adapted
from lora_course.experiments.arms import base_runs, bits_of, config_of, file_bytes, train_as
from lora_course.experiments.rates import Kept, at_rate, compete
from lora_course.quantized import QuantizedLoRALinear, quantize_after_training, save_quantized
from lora_course.states import factor_state, relative_error

RANKS = {"lora": 8, "r1": 1, "r2": 2}
GRIDS: dict[str, dict[str, Any]] = {
    "4 group": {"bits": 4}, "2 group": {"bits": 2}, "2 group clip": {"bits": 2, "clip": 0.5}, "3 group": {"bits": 3},
    "8 group": {"bits": 8}, "A2 B8": {"bits_A": 2, "bits_B": 8}, "A8 B2": {"bits_A": 8, "bits_B": 2},
    "4 tensor": {"bits": 4, "granularity": "tensor"}, "2 tensor": {"bits": 2, "granularity": "tensor"},
}  # fmt: skip
AFTER = GRIDS | {
    "8 tensor": {"bits": 8, "granularity": "tensor"}, "8 channel": {"bits": 8, "granularity": "channel"},
    "4 channel": {"bits": 4, "granularity": "channel"}, "2 channel": {"bits": 2, "granularity": "channel"},
}  # fmt: skip
R2_AFTER = {"bits": 16, "granularity": "channel"}
SETTINGS = NANO | {
    "steps": 40, "batch": 4, "r": 8, "scaling": 2, "score_bytes": {"validation": 15_000, "test": 25_000}, "search_seeds": [0],
    "target_modules": "all-linear", "group_size": 64, "ranks": RANKS, "trained": GRIDS, "after": AFTER, "r2 after": R2_AFTER,
    "learning_rates": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2], "first": [4e-3, 8e-3, 1.6e-2],
}  # fmt: skip


def make(arm: str, seed: int) -> Arm:
    config = config_of(RANKS.get(arm, SETTINGS["r"]), SETTINGS["scaling"])
    if arm in RANKS:
        return Arm(adapted(SETTINGS, seed, config))
    model = adapted(SETTINGS, seed, config, layer=QuantizedLoRALinear, **GRIDS[arm])
    return Arm(model, save=save_quantized)


def trained(arm: str, rate: float, seed: int) -> Trained:
    return train_as(SETTINGS, make(arm, seed), rate, seed)


def score(found: Trained, split: str) -> dict[str, Any]:
    values: dict[str, Any] = {"bits_per_byte": bits_of(SETTINGS, found.model, split)}
    if split == "test":
        values |= {"bytes": file_bytes(found.arm), "losses": found.curve}
    return values


@torch.no_grad()
def quantized_after(found: Trained, grid: dict[str, Any]) -> dict[str, Any]:
    """A plain LoRA, quantised when it was done; error: ‖ΔW − ΔW before‖ / ‖ΔW before‖ over all layers together."""
    model = copy.deepcopy(found.model)
    quantize_after_training(model, group_size=SETTINGS["group_size"], **grid)
    return {
        "bits_per_byte": bits_of(SETTINGS, model, "test"),
        "bytes": file_bytes(Arm(model, save=save_quantized)),
        "error": relative_error(factor_state(model), factor_state(found.model)),
    }


def body(runs: Runs) -> None:
    arms, first, seeds = [*RANKS, *GRIDS], SETTINGS["first"], SETTINGS["search_seeds"]
    tested = (len(arms) + len(AFTER) + 1) * len(runs.seeds)
    runs.expect(2 + len(arms) * len(first) * len(seeds) + tested)
    base_runs(runs, SETTINGS)
    grids = {"lora": {f"after {name}": AFTER[name] for name in AFTER}, "r2": {"r2 after": R2_AFTER}}
    for arm in arms:
        kept = Kept(trained, arm)
        best = compete(runs, arm, kept, score, first, seeds)
        for name, grid in grids.get(arm, {}).items():
            at_rate(runs, name, best, lambda *how: quantized_after(kept(*how), grid))


WITNESS = Witness(
    ("4 group/0.008/0/test",),
    {"bits_per_byte": 0.005, "bytes": 64},
    ROUNDING + "; the file's header names more than it did",
    chapter="4_3_quantized",
)
STUDY = Study("4_3_quantized", SETTINGS, body, WITNESS)
