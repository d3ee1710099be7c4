"""The command `lora-course`: the comparison, what runs here, and adapters from the course's format to PEFT's and back."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
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

    compare = commands.add_parser(
        "compare", help="all methods side by side on one task; goes on where it was stopped",
        description="Trains each method with the same base, text, steps and search for the learning rate, keeps every run in a file, and "
        "prints the table. What the file holds is not computed again; a changed method's own runs are.",
    )  # fmt: skip
    compare.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="by default all, such as lora dora qlora; a wrong name lists them",
    )
    compare.add_argument(
        "--domains", nargs="+", metavar="NAME", help="by default shakespeare python"
    )
    compare.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the record; by default the one that comes with the course",
    )
    compare.set_defaults(run=run_compare)

    info = commands.add_parser(
        "info", help="versions, device and the profile that chapters would choose here"
    )
    info.set_defaults(run=run_info)

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
    return top


def run_compare(arguments: argparse.Namespace) -> None:
    from lora_course import compare

    methods, domains = (
        arguments.methods or list(compare.METHODS),
        arguments.domains or list(compare.DOMAINS),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = compare.compare(
            methods, domains, arguments.out or compare.RECORD, lambda line: print(line, flush=True)
        )
    for domain in domains:
        print(
            f"\n{domain}, {len(record['settings']['seeds'])} seeds: mean and 95% interval; forgetting on {record['settings']['own_domain']}"
        )
        print(compare.table(record, domain, methods).to_string())


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


def run_convert(arguments: argparse.Namespace) -> None:
    source, target = arguments.source, arguments.target
    ours, pefts = (source / "adapter.json").is_file(), (source / "adapter_config.json").is_file()
    if ours == pefts:
        raise ValueError(
            f"{source} holds {'both' if ours else 'neither'} adapter.json (the course's format) {'and' if ours else 'nor'} adapter_config.json (PEFT's)."
        )
    if arguments.uniform and not ours:
        raise ValueError(
            "--uniform is of what is written for PEFT and servers: SOURCE holds PEFT's format already."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target} is there already: give a folder that is empty or does not exist."
        )
    from lora_course import export_peft, lab, load_adapter, load_peft, save_adapter

    model = lab.describe_base(arguments.base)  # names and shapes alone: no weight is read
    if ours:
        export_peft(load_adapter(model, source), target, arguments.uniform, name_of_base(source))
    else:
        save_adapter(load_peft(model, source), target)
    print(f"{target} holds the adapter in {'PEFT' if ours else 'the course'}'s format.")


def name_of_base(source: Path) -> str | None:
    """What the adapter in `source` says its base is called; None where it does not say."""
    from lora_course.checkpoint import read_description

    return read_description(source)["base"]["name"] or None


def main(given: Sequence[str] | None = None) -> int:
    """Runs a command. What the user can mend is one sentence on the error stream, and exit status 2."""
    arguments = parser().parse_args(given)
    try:
        arguments.run(arguments)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
