"""Ours against PEFT, side by side: time and memory of a training step, and what merging, ranks, experts and tasks cost.

    make bench                                  about 20 minutes on two idle cores; goes on where it was stopped
    python -m benchmarks.bench --quick          every part once, on a model of two small blocks: for tests

The arms of a group stand on the same base weights, in one process, and take turns: a ratio is the median of the rounds'
ratios. A base of SmolLM2-135M's shape has random weights, which take as long as trained ones. Each arm's peak of memory is that
of a process of its own, less what the process had after its imports. Writes lora_course/data/benchmarks.json, which
the book's page shows and chapter 4.4 reads. What was measured on another machine, or with other versions or code, is measured again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.bases import NATIVE_BF16
from benchmarks.groups import groups
from benchmarks.measuring import measure
from lora_course.experiments.record import commit
from lora_course.experiments.timing import processors

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "lora_course" / "data" / "benchmarks.json"
QUICK = ROOT / "build" / "benchmarks-quick.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def provenance() -> dict[str, Any]:
    """What the numbers depend on, beside the date."""
    names = processors()
    return {
        "machine": f"{platform.system()} {platform.machine()}", "processor": names[0] if names else platform.processor() or "unknown",
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "native_bf16": NATIVE_BF16,
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "commit": commit(),
    }  # fmt: skip


def run(
    out: Path, quick: bool = False, only: list[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures the groups that the file lacks, writes each when it is done, and yields it.

    Raises:
        ValueError: an unknown group.
    """
    wanted = groups(quick)
    if unknown := [name for name in only or [] if name not in wanted]:
        raise ValueError(f"There is no group {unknown[0]!r}; there are {', '.join(wanted)}.")
    here = provenance()
    record: dict[str, Any] = {"provenance": here, "quick": quick, "groups": {}}
    if out.exists():
        old = json.loads(out.read_text())
        if old["provenance"] == here and old["quick"] == quick:
            record = old
        else:
            changed = [key for key in here if old["provenance"].get(key) != here[key]]
            print(
                f"{out.name} is of another {', '.join(changed) or 'kind'}: everything is measured again.",
                flush=True,
            )
    for name, group in wanted.items():
        if name in record["groups"] or (only and name not in only):
            continue
        record["groups"][name] = measure(group) | {"date": datetime.date.today().isoformat()}
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(out.name + ".part")
        part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        part.replace(out)
        yield name, record["groups"][name]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time and memory of ours against PEFT, side by side."
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a small model, two rounds, into {QUICK.relative_to(ROOT)}",
    )
    parser.add_argument(
        "--out", type=Path, help=f"the file; by default {RESULTS.relative_to(ROOT)}"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="GROUP", help="these groups; a wrong name lists them"
    )
    arguments = parser.parse_args()
    out = arguments.out or (QUICK if arguments.quick else RESULTS)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    try:
        for name, result in run(out, arguments.quick, arguments.only):
            print(
                f"{(time.perf_counter() - start) / 60:5.1f} min  {name:20} {report.line(result)}",
                flush=True,
            )
    except ValueError as error:
        parser.error(str(error))
    print("\n" + report.text(json.loads(out.read_text())))


if __name__ == "__main__":
    main()
