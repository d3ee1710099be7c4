"""Arms that take turns, so that what else a machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def race(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one that isn't counted; the order turns with the rounds.

    clock: by default processor time of this thread, which other programs disturb less than what a clock on the wall shows.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            arms[name]()
            if i:
                times[name].append(clock() - start)
    return {name: [round(t, 7) for t in values] for name, values in times.items()}


def processors() -> list[str]:
    """The name of each processor that Linux knows; none where it doesn't say, as on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [x.split(":", 1)[1].strip() for x in lines if x.startswith(("model name", "CPU part"))]
