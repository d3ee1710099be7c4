"""The study of chapter 4.4: what fusing a training step saves, and what merging and batching adapters save when they serve.

Times are processor time of one thread, as other programs on the machine disturb it less than they do the clock. Arms take
turns, in another order each round, so that a round's times belong together: compare ratios within rounds. Memory is the
size of tensors, the same in every run.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lora_course.experiments import ROUNDING, Arm, Runs, Study, Witness
from lora_course.experiments import fused_costs as costs
from lora_course.experiments import fused_serving as serving
from lora_course.experiments.arms import adapted, bits_of, config_of, train_as
from lora_course.experiments.timing import processors

SETTINGS = costs.SETTINGS | serving.SETTINGS | {
    "domains": ["bible", "shakespeare", "milton", "python"], "r": 8, "lora_alpha": 16, "learning_rate": 8e-3,
    "steps": 40, "train_bytes": 400_000, "test_bytes": 20_000, "seeds": [0, 1, 2],
}  # fmt: skip


def trained(kind: str, domain: str, seed: int) -> dict[str, Any]:
    """Bits a byte on test text after training on one domain."""
    model = adapted(SETTINGS, seed, config_of(SETTINGS["r"]), layer=costs.LAYERS[kind])
    found = train_as(SETTINGS, Arm(model), SETTINGS["learning_rate"], seed, domain)
    bits = bits_of(SETTINGS | {"score_bytes": SETTINGS["test_bytes"]}, model, "test", domain)
    return {"bits_per_byte": bits, "last_loss": found.losses[-1]}


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    names = processors()
    found = {"processor": (names or [platform.processor()])[0], "cores": len(names)}
    return found | {"threads": torch.get_num_threads(), "system": platform.system()}


def plan(seeds: Sequence[int]) -> dict[str, Callable[[], dict[str, Any]]]:
    """All runs by key, in the order in which they are made."""
    kinds, modes = (*costs.LAYERS, "peft"), {"fp32": 0.0, "dropout": SETTINGS["dropout"]}
    found: dict[str, Callable[[], dict[str, Any]]] = {"machine": machine}
    for kind in kinds:
        for r, mode in itertools.product(SETTINGS["memory_ranks"], modes):
            found[f"memory/{mode}/{r}/{kind}"] = partial(costs.memory, kind, r, modes[mode])
        for dropout in modes.values():
            found[f"process/{dropout:g}/{kind}"] = partial(costs.process, kind, dropout)
    for r, mode in itertools.product(SETTINGS["step_ranks"], modes):
        found[f"step/{mode}/{r}"] = partial(costs.step_times, r, modes[mode])
    found["layer"] = costs.layer_times
    found |= {f"orders/{r}": partial(costs.order_times, r) for r in SETTINGS["orders"]["ranks"]}
    found |= {f"latency/{n}": partial(serving.latency, n) for n in SETTINGS["tokens"]}
    found |= {f"served/{n}": partial(serving.served, n) for n in SETTINGS["served"]["adapters"]}
    found["generate"] = serving.generated
    for seed, domain, kind in itertools.product(seeds, SETTINGS["domains"], costs.LAYERS):
        found[f"trained/{domain}/{seed}/{kind}"] = partial(trained, kind, domain, seed)
    r = SETTINGS["autocast_rank"]
    return found | {
        f"memory/autocast/{r}/{k}": partial(costs.memory, k, r, 0.0, True) for k in kinds
    }


def body(runs: Runs) -> None:
    torch.set_num_threads(1)
    runs_to_make = plan(runs.seeds)
    runs.expect(len(runs_to_make))
    for key, compute in runs_to_make.items():
        runs(key, compute)


WITNESS = Witness(
    ("memory/fp32/16/fused", "trained/python/0/fused"),
    {"saved": 0, "peak": 0, "bits_per_byte": 0.005},
    ROUNDING + "; bytes are counted, and times are not compared",
    chapter="4_4_fused",
)
STUDY = Study("4_4_fused", SETTINGS, body, WITNESS)
