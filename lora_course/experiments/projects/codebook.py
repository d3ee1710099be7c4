"""The project of chapter 1.1, "a better codebook": sixteen values fitted to SmolLM2's weights by Lloyd, against NF4's.

Lloyd, on all linear weights over the largest |w| of their block of 64: each weight goes to its nearest value, each value to
the mean of its weights; −1, 0 and 1 stay. A weight counts with the square of its block's largest, so that the error of the
weights themselves falls. Every second block is fitted to; the error is also given on the others. Two starts: NF4's values, and
int4's fifteen with one more at half a step above zero. Weights are counted in bins 1/32,768 wide, which decide by their middle;
sums within a bin are exact. The model's losses are taken with the values from NF4's start, on the first five windows a text
of the study `1_1_formats`, whose runs "base" and "nf4/all" they are compared with.

Written before the run. Predictions: about a tenth of NF4's error goes away, on the other blocks as well; the second start
ends at the same error; and the loss does not follow in step. Decided by: the errors; and the differences of the loss,
fitted less NF4, window by window, with an interval for each of the five texts.
"""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from lora_course.experiments import Runs, Study, Witness, formats

SETTINGS: dict[str, Any] = {
    **{key: formats.SETTINGS[key] for key in ("model", "tokens", "texts")}, "windows": 5,
    "block": 64, "bins": 65_536, "rounds": 60, "starts": ["nf4", "int4"],
}  # fmt: skip


def first_values(start: str) -> Tensor:
    """The sixteen values that Lloyd starts from, in order."""
    if start == "nf4":
        return bnb.functional.get_4bit_type("nf4", device="cpu").double().sort().values
    return torch.tensor([*range(-7, 8), 0.5], dtype=torch.float64).sort().values / 7


def scaled_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of a weight over their largest |w|, `[blocks, 64]`, and those, `[blocks, 1]`."""
    blocks, largest = formats.blocks_of(weight)
    return blocks / largest, largest


@functools.cache
def counted() -> Tensor:
    """Σ m², Σ m² x and Σ m² x² of the scaled weights x in each bin, m their block's largest, `[half, 3, bins]`."""
    sums = torch.zeros(2, 3, SETTINGS["bins"], dtype=torch.float64)
    for weight in formats.loaded()[1].values():
        scaled, largest = scaled_blocks(weight)
        for half in (0, 1):
            x, m = scaled[half::2].double(), largest[half::2].double().square()
            bins = ((x + 1) / 2 * SETTINGS["bins"]).long().clamp(max=SETTINGS["bins"] - 1).flatten()
            for power in range(3):
                moments = (m * x**power).flatten()
                sums[half, power] += torch.bincount(bins, moments, minlength=SETTINGS["bins"])
    return sums


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """The place of the nearest of the sorted values."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def error(values: Tensor, half: int) -> tuple[float, Tensor]:
    """The squared error over Σ w² on one half of the blocks, and the mean of the weights that each value got."""
    size = SETTINGS["bins"]
    middles = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    place = nearest(middles, values)
    s0, s1, s2 = (torch.bincount(place, sums, minlength=16) for sums in counted()[half])
    lost = (s2 - 2 * values * s1 + values.square() * s0).sum() / s2.sum()
    return lost.item(), torch.where(s0 > 0, s1 / s0.clamp(min=1e-300), values)


def fit(start: str) -> dict[str, Any]:
    """Lloyd's rounds on every second block."""
    values, errors = first_values(start), []
    for _ in range(SETTINGS["rounds"]):
        lost, means = error(values, 0)
        errors.append(lost)
        fixed = torch.isin(values, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
        values = torch.where(fixed, values, means)
    errors.append(error(values, 0)[0])
    before = error(first_values(start), 1)[0]
    return {"errors": errors, "others": [before, error(values, 1)[0]], "values": values.tolist()}


def rounded(values: list[float], count: int = SETTINGS["windows"]) -> dict[str, Any]:
    """Error and losses with all linear weights rounded to the nearest of `values` times their block's largest."""
    model, originals, _ = formats.loaded()
    table, lost, total = torch.tensor(values), 0.0, 0.0
    for name, weight in originals.items():
        scaled, largest = scaled_blocks(weight)
        new = (table[nearest(scaled, table)] * largest).reshape(weight.shape)
        lost += (new - weight).square().sum().item()
        total += weight.square().sum().item()
        model.get_submodule(name).weight.data = new
    return {"error": lost / total, "loss": formats.losses(count)}


def body(runs: Runs) -> None:
    runs.expect(len(SETTINGS["starts"]) + 1)
    found = {start: runs(f"fit/{start}", fit, start) for start in SETTINGS["starts"]}
    runs("fitted", rounded, found["nf4"]["values"])


WITNESS = Witness(
    ("fitted",),
    {"error": 1e-6, "loss": 0.002},
    "No training: fp32 sums in another order move a loss by less than a thousandth, and the formats lie hundredths apart",
    part=lambda: rounded(fit("nf4")["values"], count=1),
)
STUDY = Study("1_1_project", SETTINGS, body, WITNESS)
