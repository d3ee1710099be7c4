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

NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
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


def run(chapter: Path) -> str | None:
    """Runs the cells of a chapter in this process; what failed, or None."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    number = 0
    for cell in jupytext.read(chapter).cells:
        if cell.cell_type != "code":
            continue
        number += 1
        result = shell.run_cell(cell.source, silent=True)
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            line = chapter.read_text()[: chapter.read_text().find(cell.source)].count("\n") + 1
            return f"notebooks/{chapter.name}:{line}: code cell {number}: {type(error).__name__}: {str(error)[:300]}"
    return None


def run_here(stem: str, gpus: int, bf16: bool) -> int:
    import transformers  # noqa: F401  (imports settle before the device changes torch)

    from lora_course import lab, qlora  # noqa: F401
    from tools.pretended.device import GIB, pretend

    qlora.optimizer_name = lambda device, bits=32: "adamw_torch"  # paged memory is CUDA's own
    with TemporaryDirectory() as folder:
        redirect(Path(folder))
        pretend(gpus, bf16, 80 * GIB if bf16 else 15 * GIB)
        os.chdir(folder)
        (chapter,) = [path for path in chapters() if path.stem == stem]
        failure = run(chapter)
    print(failure or "passed", file=sys.stderr)
    return bool(failure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM")
    parser.add_argument("--profile", default="tiny", choices=("tiny", "t4", "large"))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--bf16", action="store_true", help="a GPU with bf16; else one without, as a T4"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        raise SystemExit(run_here(given.stems[0], given.gpus, given.bf16))
    failed = []
    for stem in given.stems or [path.stem for path in chapters()]:
        start = time.perf_counter()
        with TemporaryDirectory() as claims:
            settings = {
                "LORA_COURSE_PROFILE": given.profile,
                "LORA_COURSE_CLAIMS": claims,
                "HF_HUB_OFFLINE": "1",
            }
            command = [sys.executable, "-m", "tools.pretended.chapters", *sys.argv[1:], "--here"]
            command = [word for word in command if word not in given.stems] + [stem]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"
        print(f"{stem}: {last} ({time.perf_counter() - start:.0f} s)", flush=True)
        failed += [stem] * bool(done.returncode)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
