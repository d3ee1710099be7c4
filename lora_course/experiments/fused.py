"""The study of chapter 4.4: what fusing a training step saves, and what merging and batching adapters save when they serve.

Times are processor time of one thread, as other programs on the machine disturb it less than they do the clock. Arms take
turns, in another order each round, so that a round's times belong together: compare ratios within rounds. Memory is the
size of tensors, the same in every run.
"""

from __future__ import annotations

import itertools
import platform
from pathlib import Path
from typing import Any

import torch

from lora_course.experiments import ROUNDING, Arm, Runs, Study, Witness
from lora_course.experiments import fused_costs as costs
from lora_course.experiments import fused_serving as serving
from lora_course.experiments.arms import adapted, bits_of, config_of, rows_of, train

SETTINGS = costs.SETTINGS | serving.SETTINGS | {
    "domains": ["bible", "shakespeare", "milton", "python"], "r": 8, "lora_alpha": 16, "learning_rate": 8e-3,
    "steps": 40, "train_bytes": 400_000, "test_bytes": 20_000, "seeds": [0, 1, 2],
}  # fmt: skip


def trained(kind: str, domain: str, seed: int) -> dict[str, Any]:
    """Bits a byte on test text after training on one domain."""
    model = adapted(SETTINGS, seed, config_of(SETTINGS["r"]), layer=costs.LAYERS[kind])
    plan = (SETTINGS["learning_rate"], seed, SETTINGS["steps"], SETTINGS["batch"])
    found = train(Arm(model), rows_of(SETTINGS, domain), *plan)
    bits = bits_of(SETTINGS | {"score_bytes": SETTINGS["test_bytes"]}, model, "test", domain)
    return {"bits_per_byte": bits, "last_loss": found.losses[-1]}


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    cpuinfo, names = Path("/proc/cpuinfo"), []
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    found = {"processor": (names or [platform.processor()])[0], "cores": len(names)}
    return found | {"threads": torch.get_num_threads(), "system": platform.system()}


def body(runs: Runs) -> None:
    torch.set_num_threads(1)
    kinds, modes = (*costs.LAYERS, "peft"), (("fp32", 0.0), ("dropout", SETTINGS["dropout"]))
    ranks, learnt = SETTINGS["memory_ranks"], len(SETTINGS["domains"]) * len(costs.LAYERS)
    once = ("step_ranks", "step_ranks", "tokens")
    counted = sum(len(SETTINGS[name]) for name in once) + len(SETTINGS["orders"]["ranks"])
    counted += len(SETTINGS["served"]["adapters"]) + len(kinds) * (2 * len(ranks) + 2 + 1) + 3
    runs.expect(counted + learnt * len(runs.seeds))
    runs("machine", machine)
    for kind in kinds:
        for r in ranks:
            for mode, dropout in modes:
                runs(f"memory/{mode}/{r}/{kind}", costs.memory, kind, r, dropout, False)
        for _, dropout in modes:
            runs(f"process/{dropout:g}/{kind}", costs.process, kind, dropout)
    for r in SETTINGS["step_ranks"]:
        for mode, dropout in modes:
            runs(f"step/{mode}/{r}", costs.step_times, r, dropout)
    runs("layer", costs.layer_times)
    for r in SETTINGS["orders"]["ranks"]:
        runs(f"orders/{r}", costs.order_times, r)
    for count in SETTINGS["tokens"]:
        runs(f"latency/{count}", serving.latency, count)
    for count in SETTINGS["served"]["adapters"]:
        runs(f"served/{count}", serving.served, count)
    runs("generate", serving.generated)
    for seed, domain, kind in itertools.product(runs.seeds, SETTINGS["domains"], costs.LAYERS):
        runs(f"trained/{domain}/{seed}/{kind}", trained, kind, domain, seed)
    r = SETTINGS["autocast_rank"]
    for kind in kinds:
        runs(f"memory/autocast/{r}/{kind}", costs.memory, kind, r, 0.0, True)


WITNESS = Witness(
    ("memory/fp32/16/fused", "trained/python/0/fused"),
    {"saved": 0, "peak": 0, "bits_per_byte": 0.005},
    ROUNDING + "; bytes are counted, and times are not compared",
    chapter="4_4_fused",
)
STUDY = Study("4_4_fused", SETTINGS, body, WITNESS)
