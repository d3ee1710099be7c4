"""The study of chapter 4.2: one adapter served at four ranks, trained in several ways, against an adapter for each rank.

A training gives adapters of the ranks 1, 2, 4 and 8 in one or more ways ("servings"); each of them is put into plain LoRA
layers and scored. All have scale 2 at every rank, see the same batches with the same seed, and take the same steps, but for
"short": four adapters that share these steps. Each serving searches its own learning rate, by the mean bits a byte over the
ranks that are served. "not-held" leaves the rows beyond the cut to the optimiser, whose momentum moves them.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from lora_course.experiments import NANO, Arm, Runs, Study, Trained, Witness, adapted, bits_of
from lora_course.experiments.arms import base_runs, components, config_of, serving, train_as
from lora_course.experiments.rates import Kept, compete
from lora_course.hierarchical import NestedLoRALinear, RankSampler, cut
from lora_course.injection import adapter_layers
from lora_course.lora import AdapterState
from lora_course.states import factor_state, truncate

RANKS = [1, 2, 4, 8]
STEPS = 32
TRAININGS: dict[str, dict[str, Any]] = {
    **{f"lora-{r}": {"r": r, "steps": STEPS} for r in RANKS},
    **{f"short-{r}": {"r": r, "steps": STEPS // len(RANKS)} for r in RANKS},
    "truncation": {"r": 8, "steps": STEPS, "weighting": "equal", "hold": True},
    "not-held": {"r": 8, "steps": STEPS, "weighting": "equal", "hold": False},
    "matryoshka": {"r": 8, "steps": STEPS, "weighting": "matryoshka"},
}
SERVINGS: dict[str, Any] = {
    **{f"lora-{r}": ["whole"] for r in RANKS[:-1]},
    "lora-8": ["whole", "sliced", "svd"],
    **{f"short-{r}": ["whole"] for r in RANKS},
    "truncation": ["cut"], "not-held": ["cut"], "matryoshka": ["cut", "bare"],
}  # fmt: skip
SETTINGS = NANO | {
    "batch": 4, "score_bytes": 10_000, "search_seeds": [0],
    "learning_rates": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128, 0.256], "first": [8e-3, 1.6e-2, 3.2e-2],
    "scaling": 2.0, "target_modules": "all-linear", "ranks": RANKS, "trainings": TRAININGS, "servings": SERVINGS,
}  # fmt: skip


def trained(name: str, rate: float, seed: int) -> Trained:
    how = TRAININGS[name]
    layer: dict[str, Any] = {}
    if "weighting" in how:
        layer = {"layer": NestedLoRALinear, "ranks": RANKS, "weighting": how["weighting"]}
    model = adapted(SETTINGS, seed, config_of(how["r"], SETTINGS["scaling"]), **layer)
    callbacks = [RankSampler(model, seed, hold=how["hold"])] if "hold" in how else []
    return train_as(SETTINGS | how, Arm(model, callbacks), rate, seed)


def adapters(model: torch.nn.Module, how: str) -> dict[int, AdapterState]:
    """What is served, by rank: plain LoRA factors."""
    whole = factor_state(model)
    r = next(iter(adapter_layers(model).values())).r
    if how == "whole":
        return {r: whole}
    if how == "sliced":
        return {b: components(whole, 0, b) for b in RANKS}
    if how == "svd":
        return {b: truncate(whole, b) for b in RANKS}
    return {b: cut(model, b, weighted=how == "cut") for b in RANKS}


def score(how: str, found: Trained, split: str) -> dict[str, Any]:
    served = adapters(found.model, how)
    scores = {str(b): bits_of(SETTINGS, serving(SETTINGS, served[b]), split) for b in served}
    values: dict[str, Any] = {"bits_per_byte": scores}
    return values | {"losses": found.curve} if split == "test" else values


def mean(values: Mapping[str, Any]) -> float:
    return statistics.fmean(values["bits_per_byte"].values())


def body(runs: Runs) -> None:
    first, seeds = SETTINGS["first"], SETTINGS["search_seeds"]
    arms = runs.arms([f"{name}/{how}" for name in TRAININGS for how in SERVINGS[name]])
    runs.expect(2 + len(arms) * (len(first) * len(seeds) + len(runs.seeds)))
    base_runs(runs, SETTINGS)
    for name in TRAININGS:
        again = Kept(trained, name)  # servings of one training share what was trained
        for how in SERVINGS[name]:
            if f"{name}/{how}" in arms:
                scored = functools.partial(score, how)
                compete(runs, f"{name}/{how}", Kept(again), scored, first, seeds, value=mean)


KEY = "truncation/cut/0.016/0/test"
WITNESS = Witness((KEY,), {"bits_per_byte": 0.005}, chapter="4_2_hierarchical")
STUDY = Study("4_2_hierarchical", SETTINGS, body, WITNESS)
