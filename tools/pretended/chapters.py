"""Runs a chapter cell by cell on a machine that pretends to have GPUs, and says which cell fails.

    python -m tools.pretended.chapters 3_2_distillation --profile tiny --gpus 1
    python -m tools.pretended.chapters --profile t4 --bf16 --gpus 2        every chapter

Models of the hub stand in as random ones of the same configuration, narrower, with nano's tokenizer: what is tested is on
which device and in which precision things are, and not what comes out. Cells that check numbers of a trained model under
`tiny` run as they are.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext

from tools.run_chapters import ROOT, chapters

NARROW = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
ON_HUB = {"Qwen/Qwen2.5-0.5B": {"tie_word_embeddings": True}, "Qwen/Qwen2.5-7B": {"tie_word_embeddings": False}}  # fmt: skip


def stand_in(folder: Path, **settings: Any) -> None:
    """A random model of Qwen2.5's kind, narrower, with nano's tokenizer, saved in fp16's twin on the hub: bf16."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from lora_course.lab.models import NANO

    tokenizer = AutoTokenizer.from_pretrained(NANO)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), **NARROW, **settings)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def redirect(folder: Path) -> None:
    """Whatever is loaded from the hub by name comes from the folder instead."""
    import transformers

    for name, settings in ON_HUB.items():
        stand_in(folder / name, **settings)
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoTokenizer,
        transformers.AutoConfig,
    ):
        load = auto.from_pretrained.__func__

        def from_pretrained(
            cls: Any, name: Any, *args: Any, load: Any = load, **kwargs: Any
        ) -> Any:
            return load(cls, folder / name if name in ON_HUB else name, *args, **kwargs)

        auto.from_pretrained = classmethod(from_pretrained)


def run(chapter: Path) -> list[str]:
    """Runs the cells of a chapter in this process, past those that fail; what failed, the cause before what it causes."""
    from IPython.core.interactiveshell import InteractiveShell

    shell, text, failures = InteractiveShell.instance(), chapter.read_text(), []
    code = [cell for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        result = shell.run_cell(cell.source, silent=True)
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            line = text[: text.find(cell.source)].count("\n") + 1
            message = " ".join(str(error).split())[:300]
            failures.append(
                f"notebooks/{chapter.name}:{line}: code cell {number}: {type(error).__name__}: {message}"
            )
    return failures


def run_here(stem: str, gpus: int, bf16: bool) -> list[str]:
    """Makes this process one on such a machine, for good, and runs a chapter; what failed."""
    import transformers  # noqa: F401  (imports settle before the device changes torch)

    from lora_course import lab, qlora  # noqa: F401
    from tools.pretended.machine import GIB, pretend

    qlora.optimizer_name = lambda device, bits=32: "adamw_torch"  # paged memory is CUDA's own
    with TemporaryDirectory() as folder:
        redirect(Path(folder))
        pretend(gpus, bf16, 80 * GIB if bf16 else 15 * GIB)
        os.chdir(folder)
        (chapter,) = [path for path in chapters() if path.stem == stem]
        return run(chapter)


def run_apart(stem: str, given: argparse.Namespace) -> list[str]:
    """Runs a chapter in a process of its own; what failed."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        settings = {
            "LORA_COURSE_PROFILE": given.profile,
            "LORA_COURSE_CLAIMS": folder,
            "HF_HUB_OFFLINE": "1",
        }
        command = [
            sys.executable,
            "-m",
            "tools.pretended.chapters",
            stem,
            "--gpus",
            str(given.gpus),
        ]
        command += ["--report", str(report), *["--bf16"] * given.bf16]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
        if not report.exists():
            return [f"{stem}: the process ended early: {done.stderr[-300:]}"]
        return report.read_text().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM")
    parser.add_argument("--profile", default="tiny", choices=("tiny", "t4", "large"))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--bf16", action="store_true", help="a GPU with bf16; else one without, as a T4"
    )
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.report:
        given.report.write_text("\n".join(run_here(given.stems[0], given.gpus, given.bf16)))
        return
    failed = []
    for stem in given.stems or [path.stem for path in chapters()]:
        start = time.perf_counter()
        failures = run_apart(stem, given)
        verdict = f"{len(failures)} cells failed" if failures else "passed"
        print(
            f"{stem}: {verdict} ({time.perf_counter() - start:.0f} s)",
            *failures,
            sep="\n",
            flush=True,
        )
        failed += [stem] * bool(failures)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
