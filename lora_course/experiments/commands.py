"""The subcommands `study list`, `run` and `verify` of `lora-course`. Importing this is quick: studies are imported when they run."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from lora_course import experiments


def add(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser(
        "study", help="the recorded studies: list them, run what is missing, verify what is there"
    ).add_subparsers(title="commands", dest="what", required=True, metavar="COMMAND")
    listing = study.add_parser(
        "list", help="all studies: runs, when they were made and verified",
        description="Lists all studies: what each asks, its runs, when they were made and last verified.",
    )  # fmt: skip
    listing.set_defaults(run=run_study_list)

    running = study.add_parser(
        "run", help="compute what a record lacks; stopped, the same command goes on",
        description="Computes the runs that the record of a study lacks and writes each when it is done. What is there is not computed again.",
    )  # fmt: skip
    running.add_argument(
        "name", metavar="NAME", help="such as 5_1_comparison; a wrong name lists them"
    )
    running.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM", help="by default all; patterns such as 'lora' or 'dora/python'"
    )  # fmt: skip
    running.add_argument(
        "--seeds", nargs="+", type=int, default=[], metavar="N", help="seeds beside those of the study"
    )  # fmt: skip
    running.add_argument(
        "--out", type=Path, metavar="FILE", help="the record; by default the course's own"
    )
    running.add_argument("--overwrite", action="store_true", help="start the record anew")
    running.set_defaults(run=run_study)

    verifying = study.add_parser(
        "verify", help="run the witness of each record again and compare",
        description="Runs one cheap run a record again, compares it within the study's tolerance, and notes the outcome in the record.",
    )  # fmt: skip
    verifying.add_argument(
        "names", nargs="*", metavar="NAME", help="by default all that are complete"
    )
    verifying.add_argument(
        "--no-note", action="store_true", help="leave the records as they are: only say what was found"
    )  # fmt: skip
    verifying.add_argument(
        "--ci", action="store_true", help="only those whose chapter runs no run of the record again"
    )  # fmt: skip
    verifying.add_argument(
        "--workers", type=int, default=1, metavar="N", help="so many at a time; by default one"
    )
    verifying.set_defaults(run=run_study_verify)


def run_study_list(arguments: argparse.Namespace) -> None:
    for name in experiments.NAMES:
        print(experiments.summary(name))


def run_study(arguments: argparse.Namespace) -> None:
    study = experiments.get(arguments.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.run(
            arguments.out, arms=arguments.arms, seeds=arguments.seeds, overwrite=arguments.overwrite,
            progress=lambda line: print(line, flush=True),
        )  # fmt: skip
    print(experiments.summary(study.name, arguments.out))


def run_study_verify(arguments: argparse.Namespace) -> None:
    complete = [name for name in experiments.NAMES if name not in experiments.UNDER_WAY]
    names = arguments.names or complete
    for name in names:
        experiments.get(name)  # a wrong name is told before anything runs
    if arguments.ci:
        names = [name for name in names if not experiments.get(name).witness.chapter]
    failed = []
    for name, line, holds in verified(names, not arguments.no_note, arguments.workers):
        print(line, flush=True)
        failed += [] if holds else [name]
    if failed:
        raise ValueError(
            f"{', '.join(failed)}: today's code gives other numbers than the record. Find out why, or run the study anew with "
            "`lora-course study run NAME --overwrite`"
        )


def verified(names: list[str], note: bool, workers: int) -> Iterator[tuple[str, str, bool]]:
    """Of each study the name, the line to print, and whether its witness holds; in processes of their own if workers > 1."""
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least one process has to verify")
    if workers == 1:
        yield from (verify_one(name, note) for name in names)
        return
    fresh = multiprocessing.get_context("spawn")  # torch's threads don't survive a fork
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, fresh, _limit_threads, (threads,)) as pool:
        yield from pool.map(verify_one, names, [note] * len(names))


def _limit_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def verify_one(name: str, note: bool) -> tuple[str, str, bool]:
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = experiments.get(name).verify(note=note)
    said = ", ".join(
        f"{field} {most:.2g} apart ({found['within'][field]:g} allowed)"
        for field, most in found["largest"].items()
    )
    verdict = "holds" if found["holds"] else "DOES NOT HOLD"
    keys, took = ", ".join(found["keys"]), time.perf_counter() - start
    return name, f"{name:18} {verdict}: {keys}: {said}; {took:.0f} s", found["holds"]
