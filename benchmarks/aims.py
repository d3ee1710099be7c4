"""What a benchmark's record says of the ratios that the course has aims for, and why one is missed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Headline:
    """A ratio that the course has an aim for. of, to: labels in a group."""

    text: str
    group: str
    of: str
    to: str
    aim: float


HEADLINES = [
    *(Headline(f"LoRA against PEFT's, {size}, {precision}", f"lora {size} {precision}", "LoRA", "PEFT LoRA", 1.0)
      for size in ("nano", "smollm2") for precision in ("fp32", "bf16", "4bit")),
    *(Headline(f"AdaLoRA against PEFT's, {size}", f"adalora {size}", "AdaLoRA", "PEFT AdaLoRA", 0.8) for size in ("nano", "smollm2")),
    Headline("8 experts against one LoRA, smollm2", "experts smollm2", "experts", "LoRA", 1.3),
    Headline("8 frozen experts against X-LoRA, smollm2", "xlora smollm2", "frozen experts", "X-LoRA", 0.5),
    Headline("merged and unloaded against the base, smollm2", "merged smollm2", "merged and unloaded", "base", 1.02),
]  # fmt: skip
VARIANT_AIM = 1.15
MEMORY_AIM = {"LoRA against PEFT's": 1.0}
"""Beginnings of headlines whose memory has an aim too."""
REASONS = {
    "LoRA against PEFT's, nano, bf16": "the update is computed in the base's type, PEFT's in fp32. That takes less memory, and more time on a processor "
    "that emulates bf16: in a trial with the update in fp32 the step took less time than PEFT's.",
    "LoRA against PEFT's, smollm2, 4bit": "it is the memory. The copies of Bᵀ that are kept are a small part of it; the rest was not found.",
    "progressive": "joining the pairs of all stages for each pass is a small part of it, by a profile; the rest was not found.",
    "AdaLoRA against PEFT's": "the frozen base is most of PEFT's step already, and can't become cheaper; the next section says what is left.",
    "ΔW mask": "its multiplications are as many as LoRA's, but scattered: each trained number has its own row of x transposed, where LoRA's are "
    "matrix products. In a profile of nano's step, copies that turn x and the gradient round were the largest part.",
}
"""What was found, on one machine, by the beginning of a headline."""


def ratios(group: Record, of: str, to: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the rounds' ratios of seconds."""
    pairs = [a / b for a, b in zip(group["seconds"][of], group["seconds"][to], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return middle, low, high


def memory_ratio(group: Record, of: str, to: str) -> float | None:
    peaks = group.get("peak_bytes")
    return peaks[of] / peaks[to] if peaks else None


def met(ratio: float, aim: float) -> bool:
    """To the two decimals that are shown."""
    return round(ratio, 2) <= aim


def reason(text: str) -> str:
    """Why a headline is not met; what was not looked into says so."""
    return next(
        (why for start, why in REASONS.items() if text.startswith(start)), "not looked into."
    )


def memory_aim(text: str) -> float | None:
    return next((aim for start, aim in MEMORY_AIM.items() if text.startswith(start)), None)


def verdict(text: str, ratio: float, memory: float | None, aim: float) -> str:
    """ "met", "not met", or which of time and memory is not."""
    limit = memory_aim(text)
    missed = [
        name
        for name, ok in (
            ("time", met(ratio, aim)),
            ("memory", not limit or not memory or met(memory, limit)),
        )
        if not ok
    ]
    return "met" if not missed else "not met" if not limit else f"{' and '.join(missed)} not met"


def headlines(record: Record) -> list[tuple[str, tuple[float, float, float], float | None, float]]:
    """(text, ratio of seconds, ratio of memory, aim) of what has been measured; each layer variant among them."""
    groups = record["groups"]
    found = [
        (
            h.text,
            ratios(groups[h.group], h.of, h.to),
            memory_ratio(groups[h.group], h.of, h.to),
            h.aim,
        )
        for h in HEADLINES
        if h.group in groups
    ]
    for size in ("nano", "smollm2"):
        if group := groups.get(f"variants {size}"):
            found += [
                (f"{label} against LoRA, {size}", ratios(group, label, "LoRA"), memory_ratio(group, label, "LoRA"), VARIANT_AIM)
                for label in group["seconds"] if label != "LoRA" and not label.startswith("PEFT")
            ]  # fmt: skip
    return found


SHARES = [
    ("LoRA, nano", "lora nano fp32", "LoRA"),
    ("LoRA, smollm2", "lora smollm2 fp32", "LoRA"),
    ("AdaLoRA, nano", "adalora nano", "AdaLoRA"),
    ("AdaLoRA, smollm2", "adalora smollm2", "AdaLoRA"),
]


def shares(record: Record) -> list[tuple[str, float, float]]:
    """(what, the frozen base's part of PEFT's step, what ours adds to the base over what PEFT's adds), medians of the rounds' ratios."""
    found = []
    for label, key, arm in SHARES:
        if group := record["groups"].get(key):
            rounds = zip(
                *(group["seconds"][name] for name in (arm, f"PEFT {arm}", "frozen base")),
                strict=True,
            )
            if added := [
                (ours - base) / (theirs - base) for ours, theirs, base in rounds if theirs > base
            ]:
                found.append(
                    (
                        label,
                        ratios(group, "frozen base", f"PEFT {arm}")[0],
                        statistics.median(added),
                    )
                )
    return found
