"""The project of chapter 4.2: random truncation in which a step trains only the rows that the next smaller rank lacks.

Ranks, text, steps, scoring and search are those of the chapter's study, whose arms "truncation/cut" and LoRA of each rank are what
this is compared with. All train and hold what a step does not train; they differ in this:

    last block         `only_last`: a step at rank 4 trains rows 3 and 4, in a quarter of the steps
    last block, α/b    the same, and a cut at b has the scale α/b, as DyLoRA's code has: 16 at rank 1, 2 at rank 8

Expected, before the first run. Served at rank 8, "last block" is higher than truncation: rows 5 to 8 learn in a quarter of the steps
and the others no longer fit themselves to them. That is the one comparison that decides. At rank 1 it is within noise of truncation.
With α/b the best rate is lower, and rank 1 is no better, as a rate can do what a scale does.
"""

from __future__ import annotations

from typing import Any

from lora_course.experiments import (
    Arm,
    Kept,
    Runs,
    Study,
    Trained,
    Witness,
    adapted,
    compete,
    config_of,
    hierarchical,
    train,
)
from lora_course.experiments.arms import bits_of, rows_of, serving
from lora_course.hierarchical import NestedLoRALinear, RankSampler

ARMS = {"last block": False, "last block, α/b": True}
SETTINGS: dict[str, Any] = {
    key: hierarchical.SETTINGS[key]
    for key in ("model", "domain", "batch", "length", "train_bytes", "score_bytes", "search_seeds", "scaling", "ranks", "first")
} | {"seeds": [0, 1, 2], "r": 8, "steps": hierarchical.STEPS}  # fmt: skip


class ScaledSampler(RankSampler):
    """Of a step at rank b the scale is α/b."""

    def begin_step(self, t: int) -> int:
        b = super().begin_step(t)
        for layer in self.layers:
            layer.scaling = layer.lora_alpha / b
        return b

    def end_step(self) -> None:
        super().end_step()
        for layer in self.layers:
            layer.scaling = layer.lora_alpha / layer.r


def trained(arm: str, rate: float, seed: int) -> Trained:
    nested = {"layer": NestedLoRALinear, "ranks": SETTINGS["ranks"]}
    model = adapted(SETTINGS, seed, config_of(SETTINGS["r"], SETTINGS["scaling"]), **nested)
    sampler = (ScaledSampler if ARMS[arm] else RankSampler)(model, seed, only_last=True)
    rows, plan = rows_of(SETTINGS), (SETTINGS["steps"], SETTINGS["batch"])
    return train(Arm(model, [sampler]), rows, rate, seed, *plan)


def score(found: Trained, split: str, by_rank: bool) -> dict[str, Any]:
    bits, r = {}, SETTINGS["r"]
    for b, state in hierarchical.adapters(found.model, "cut").items():
        factor = r / b if by_rank else 1.0
        cut = {k: factor * t if k.endswith(".scaling") else t for k, t in state.items()}
        model = serving(SETTINGS, cut)
        bits[str(b)] = bits_of(SETTINGS, model, split)
    return {"bits_per_byte": bits} | ({"losses": found.curve} if split == "test" else {})


def body(runs: Runs) -> None:
    first, asked = SETTINGS["first"], SETTINGS["search_seeds"]
    runs.expect(len(ARMS) * (len(first) * len(asked) + len(runs.seeds)))
    for arm in runs.arms(list(ARMS)):
        scored = lambda found, split, arm=arm: score(found, split, ARMS[arm])  # noqa: E731
        compete(runs, arm, Kept(trained, arm), scored, first, asked, value=hierarchical.mean)


WITNESS = Witness(("last block/0.016/0/test",), {"bits_per_byte": 0.005})
STUDY = Study("4_2_project", SETTINGS, body, WITNESS)
