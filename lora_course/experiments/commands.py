"""The subcommands `study list`, `run` and `verify` of `lora-course`. Importing this is quick: studies are imported when they run."""

from __future__ import annotations

import argparse
import time
import warnings
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
    studies = [experiments.get(name) for name in arguments.names or complete]
    if arguments.ci:
        studies = [study for study in studies if not study.witness.chapter]
    failed = []
    for study in studies:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = study.verify(note=not arguments.no_note)
        said = ", ".join(
            f"{field} {most:.2g} apart ({found['within'][field]:g} allowed)"
            for field, most in found["largest"].items()
        )
        verdict = "holds" if found["holds"] else "DOES NOT HOLD"
        print(
            f"{study.name:18} {verdict}: {', '.join(found['keys'])}: {said}; {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        failed += [] if found["holds"] else [study.name]
    if failed:
        raise ValueError(
            f"{', '.join(failed)}: today's code gives other numbers than the record. Find out why, or run the study anew with "
            "`lora-course study run NAME --overwrite`"
        )
