"""Seconds of arms that take turns, and each one's peak of memory."""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.arms import make
from benchmarks.bases import base, batch_of
from benchmarks.groups import Group
from lora_course import lab

ROUNDS = {"nano": 21, "smollm2": 11, "quick": 2}


def measure(group: Group) -> dict[str, Any]:
    """Seconds of each arm in each round, after one round that does not count; and peaks of memory in bytes."""
    arms = {
        label: make(name, group.size, group.precision, **more)
        for label, (name, more) in group.arms.items()
    }
    seconds: dict[str, list[float]] = {label: [] for label in arms}
    for count in range(group.rounds * ROUNDS[group.size] + 1):
        for label in random.Random(count).sample(
            list(arms), len(arms)
        ):  # so that none always follows the same one, or itself
            start = time.perf_counter()
            arms[label].run()
            seconds[label].append(time.perf_counter() - start)
    result: dict[str, Any] = {
        "size": group.size,
        "precision": group.precision,
        "batch": batch_of(group.size, group.precision),
        "seconds": {label: [round(s, 6) for s in times[1:]] for label, times in seconds.items()},
    }
    del arms
    gc.collect()
    if group.memory:
        base.cache_clear()
        peaks = {
            label: lab.process_peak(
                "benchmarks.measuring:two_steps", name, group.size, group.precision, more
            )
            for label, (name, more) in group.arms.items()
        }
        result["peak_bytes"] = {label: peak.grown for label, peak in peaks.items()}
    return result


def two_steps(name: str, size: str, precision: str, more: dict[str, int]) -> None:
    """In a process of its own: a training, without the peak of building its model (where the system can forget that)."""
    arm = make(name, size, precision, **more)
    base.cache_clear()
    gc.collect()
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # Linux: the high-water mark starts anew from what is resident now
    arm.run()
    arm.run()
