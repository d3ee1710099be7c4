"""The study of chapter 1.1: LoRA on an unquantised base, QLoRA, and QLoRA on attention only, with the same learning-rate search.

Each method tries each rate with each search seed. Attention only has 21 · 1,792 against 8 · 4,672 parameters a block of nano,
0.7% more. α = 2r throughout.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from lora_course import qlora
from lora_course.experiments import Arm, Runs, Study, Trained, Witness
from lora_course.experiments.arms import NANO, base_of, bits_of, config_of, train_as, values_of
from lora_course.experiments.rates import Kept, compete
from lora_course.injection import inject, merge, unload

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"quantize": False, "target_modules": "all-linear", "r": 8},
    "qlora": {"quantize": True, "target_modules": "all-linear", "r": 8},
    "attention": {"quantize": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 21},
}  # fmt: skip
SETTINGS = NANO | {
    "steps": 60, "batch": 8, "score_bytes": 40_000, "search_seeds": [0, 1, 2], "learning_rates": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
    "methods": METHODS,
}  # fmt: skip


def base(quantize: bool) -> nn.Module:
    model = base_of(SETTINGS)
    return qlora.quantize_model(model) if quantize else model


def trained(method: str, rate: float, seed: int) -> Trained:
    how = METHODS[method]
    model = base(how["quantize"])
    torch.manual_seed(seed)
    inject(model, config_of(how["r"], target_modules=how["target_modules"]))
    return train_as(SETTINGS, Arm(model), rate, seed)


def score(method: str, found: Trained, split: str) -> dict[str, Any]:
    """A QLoRA is tested after each of the three ways to merge the adapter of a 4-bit model, too."""
    values, model = values_of(SETTINGS, found, split), found.model
    if method == "qlora" and split == "test":
        dequantized = qlora.dequantize_model(copy.deepcopy(model))
        ways = {
            "dequantized": unload(merge(dequantized)),
            "requantized": qlora.merge_requantized(copy.deepcopy(model)),
            "original": qlora.merge_into(base(False), model),
        }
        values["merged"] = {way: bits_of(SETTINGS, ways[way], split) for way in ways}
    return values


def body(runs: Runs) -> None:
    rates, seeds = SETTINGS["learning_rates"], SETTINGS["search_seeds"]
    runs.expect(4 + len(METHODS) * (len(rates) * len(seeds) + len(runs.seeds)))
    for name, quantize in (("fp32", False), ("nf4", True)):
        for split in ("validation", "test"):
            untrained = lambda q, s: {"bits_per_byte": bits_of(SETTINGS, base(q), s)}  # noqa: E731
            runs(f"base/{name}/{split}", untrained, quantize, split)
    for method in METHODS:
        scored = functools.partial(score, method)
        compete(runs, method, Kept(trained, method), scored, rates, seeds)


TOLERANCES = {"bits_per_byte": 0.005, "merged": 0.005, "parameters": 0}
WITNESS = Witness(("qlora/0.008/0/test",), TOLERANCES, chapter="1_1_qlora")
STUDY = Study("1_1_qlora", SETTINGS, body, WITNESS)
