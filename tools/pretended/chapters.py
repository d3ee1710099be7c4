"""Runs a chapter cell by cell on a machine that pretends to have GPUs, and says which cell fails.

    python -m tools.pretended.chapters 3_2_distillation --profile tiny --gpus 1
    python -m tools.pretended.chapters --profile t4 --bf16 --gpus 2        every chapter
    python -m tools.pretended.chapters --profile t4 --live                 only what the profile changes: half the time

Models of the hub stand in as random ones of the same configuration, narrower, with nano's tokenizer, and what lies on the
device trains on a corner of each batch: what is tested is on which device and in which precision things are, and not what
comes out. What lies on the CPU runs as it is, as its numbers are compared with records; under a larger profile only outside
of the cells that the profile changes.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import jupytext

from lora_course.lab.estimate import Shape
from tools.chapters import chapters
from tools.pretended.held import Meter
from tools.pretended.live import changed, live, read_all

# No matrix of it has the shape of one of nano's, which don't count as bases (`held`).
NARROW = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
CORNER = (slice(2), slice(24))  # rows and tokens
ON_HUB = {"Qwen/Qwen2.5-0.5B": {"tie_word_embeddings": True}, "Qwen/Qwen2.5-7B": {"tie_word_embeddings": False}}  # fmt: skip


def stand_in(folder: Path, **settings: Any) -> Shape:
    """A random model of Qwen2.5's kind, narrower, with nano's tokenizer, saved in fp16's twin on the hub: bf16; its shape."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from lora_course.lab.models import NANO

    tokenizer = AutoTokenizer.from_pretrained(NANO)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), **NARROW, **settings)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Shape.from_config(config.to_dict())


def redirect(folder: Path) -> Shape:
    """Whatever is loaded from the hub by name comes from the folder instead; the shape of one of these models."""
    import transformers

    shapes = [stand_in(folder / name, **settings) for name, settings in ON_HUB.items()]
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
    return shapes[0]


def train_on_corners(
    step: Callable[[int], None] = lambda tokens: None, on_cpu: Callable[[], bool] = lambda: False
) -> None:
    """A `Trainer` whose model is on the device takes two short rows a step: every step is made, and costs next to nothing.

    step: is told how many tokens each would have had. on_cpu: whether one on the CPU takes such rows too.
    """
    from torch import Tensor
    from transformers import Trainer

    prepare = Trainer._prepare_inputs

    def _prepare_inputs(self: Any, inputs: Any) -> Any:
        there = self.args.device.type == "cuda"
        if there:
            step(inputs["input_ids"].numel())
        if there or on_cpu():
            inputs = {
                key: value[CORNER[: value.dim()]] if isinstance(value, Tensor) else value
                for key, value in inputs.items()
            }
        return prepare(self, inputs)

    Trainer._prepare_inputs = _prepare_inputs


def run(chapter: Path, meter: Meter, live_only: bool = False) -> list[str]:
    """Runs the cells of a chapter in this process, past those that fail; what failed, the cause before what it causes, and
    whether the chapter held as many bases on the device as it announced.

    live_only: only the cells that the profile changes, and what they need (`live`).
    """
    from IPython.core.interactiveshell import InteractiveShell

    shell, text, failures = InteractiveShell.instance(), chapter.read_text(), []
    code = [cell for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]
    sources = [cell.source for cell in code]
    larger = os.environ["LORA_COURSE_PROFILE"] != "tiny"
    under_profile = changed(read_all(sources)) if larger else set()
    number = 0
    train_on_corners(meter.step, on_cpu=lambda: number in under_profile)
    for number in live(sources) if live_only else range(len(sources)):
        source = sources[number]
        result = shell.run_cell(source, silent=True)
        meter.look()
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            line = text[: text.find(source)].count("\n") + 1
            message = " ".join(str(error).split())[:300]
            failures.append(
                f"notebooks/{chapter.name}:{line}: code cell {number + 1}: {type(error).__name__}: {message}"
            )
    profile = shell.user_ns.get("profile")
    if profile is not None and profile.device == "cuda":
        failures += [f"notebooks/{chapter.name}: {wrong}" for wrong in meter.unlike(profile)]
    return failures


def run_here(stem: str, gpus: int, bf16: bool, live_only: bool) -> list[str]:
    """Makes this process one on such a machine, for good, and runs a chapter; what failed."""
    from lora_course import qlora
    from tools.pretended.machine import GIB, pretend

    qlora.optimizer_name = lambda device, bits=32: "adamw_torch"  # paged memory is CUDA's own
    with TemporaryDirectory() as folder:
        os.environ["LORA_COURSE_CLAIMS"] = f"{folder}/claims"
        meter = Meter(redirect(Path(folder)))
        pretend(gpus, bf16, 80 * GIB if bf16 else 15 * GIB)
        os.chdir(folder)
        (chapter,) = [path for path in chapters() if path.stem == stem]
        return run(chapter, meter, live_only)


def run_apart(stem: str, gpus: int, bf16: bool, live_only: bool) -> list[str]:
    """Runs a chapter in a copy of this process, which what it imported costs nothing; what failed."""
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    with TemporaryFile("w+") as printed:

        def child() -> None:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            sender.send(run_here(stem, gpus, bf16, live_only))

        process = processes.Process(target=child)
        process.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            printed.seek(0)
            return [f"{stem}: the process ended early: {printed.read()[-300:]}"]
        finally:
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM")
    parser.add_argument("--profile", default="tiny", choices=("tiny", "t4", "large"))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--bf16", action="store_true", help="a GPU with bf16; else one without, as a T4"
    )
    parser.add_argument(
        "--live", action="store_true", help="only the cells that the profile changes, and what they need"
    )  # fmt: skip
    given = parser.parse_args()
    os.environ |= {"LORA_COURSE_PROFILE": given.profile, "HF_HUB_OFFLINE": "1"}
    # what chapters import is imported once, and settles before the device changes torch
    import tools.pretended.machine  # noqa: F401
    from lora_course import lab, qlora  # noqa: F401

    failed = []
    for stem in given.stems or [path.stem for path in chapters()]:
        start = time.perf_counter()
        failures = run_apart(stem, given.gpus, given.bf16, given.live)
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
