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
import copy
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, XLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from lora_course import (
    adalora,
    adaptive,
    experts,
    fused,
    hierarchical,
    lab,
    lora,
    progressive,
    qlora,
    quantized,
    sparse,
)
from lora_course.arguments import compute_dtype
from lora_course.experiments.record import commit
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, merge, unload
from lora_course.serving import load_adapters, row_adapters
from lora_course.states import factor_state

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "lora_course" / "data" / "benchmarks.json"
QUICK = ROOT / "build" / "benchmarks-quick.json"
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
SHAPES = {
    "smollm2": SMOLLM2,
    "quick": SMOLLM2
    | {
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    },
}
BATCHES = {"nano": (8, 128), "smollm2": (1, 128), "quick": (2, 16)}  # rows, tokens
ROUNDS = {"nano": 21, "smollm2": 11, "quick": 2}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
NATIVE_BF16 = compute_dtype("cpu") == torch.bfloat16
"""Whether this processor multiplies in bf16. One that emulates it takes a hundred times as long: a bf16 base then gets one row
of 16 tokens, and a 4-bit base computes in fp32, as the course's trainer would have it."""
logging.disable_progress_bar()


@dataclasses.dataclass
class Arm:
    """What is timed: a training step, or a forward pass. A model with nothing to train goes without an optimiser.

    after: called between the optimiser's step and zero_grad.
    """

    model: nn.Module
    ids: torch.Tensor
    autocast: bool = False
    auxiliary_loss: Callable[[nn.Module], torch.Tensor] | None = None
    after: Callable[[], object] | None = None
    training: bool = True
    forward: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.model.train(self.training)
        if self.training and (trained := [p for p in self.model.parameters() if p.requires_grad]):
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # a Trainer's default

    def run(self) -> None:
        with (
            torch.set_grad_enabled(self.training),
            torch.autocast("cpu", torch.bfloat16, enabled=self.autocast),
        ):
            out = self.model(input_ids=self.ids, labels=self.ids, use_cache=False, **self.forward)
        if self.training:
            loss = out.loss + self.auxiliary_loss(self.model) if self.auxiliary_loss else out.loss
            loss.backward()
        if self.optimizer:
            self.optimizer.step()
            if self.after:
                self.after()
            self.optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------ bases and arms


@functools.cache
def base(size: str, precision: str) -> nn.Module:
    """The weights that all arms of a size and precision share: "fp32", "bf16" or "4bit" (NF4)."""
    torch.manual_seed(0)
    dtype = (
        torch.bfloat16
        if precision == "bf16" or (precision == "4bit" and NATIVE_BF16)
        else torch.float32
    )
    model = (
        lab.load_base("nano", dtype)[0]
        if size == "nano"
        else LlamaForCausalLM(LlamaConfig(**SHAPES[size])).to(dtype)
    )
    return qlora.quantize_model(model) if precision == "4bit" else model


def batch_of(size: str, precision: str) -> tuple[int, int]:
    """Rows and tokens of a step."""
    return BATCHES[size] if precision != "bf16" or NATIVE_BF16 else (1, 16)


def sharing_weights(model: nn.Module) -> nn.Module:
    """Modules of its own, around the same tensors."""
    return copy.deepcopy(
        model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    )


def config(r: int = 8, **fields: Any) -> LoraConfig:
    return LoraConfig(
        r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM", **fields
    )


ADALORA = {
    "init_r": 12,
    "target_r": 8,
    "lora_alpha": 24,
    "tinit": 1,
    "tfinal": 100,
    "total_step": 1000,
    "orth_reg_weight": 0.5,
}
LAYERS: dict[str, tuple[type[lora.LoRALinear], dict[str, Any]]] = {
    "LoRA": (lora.LoRALinear, {}),
    "fused LoRA": (fused.FusedLoRALinear, {}),
    "progressive": (progressive.StackedLoRALinear, {}),
    "adaptive": (adaptive.GrowingLoRALinear, {}),
    "gates": (sparse.GatedLoRALinear, {}),
    "masked factors": (sparse.SparseLoRALinear, {"sparsity": 0.5}),
    "ΔW mask": (sparse.SparseDeltaLinear, {}),
    "nested": (hierarchical.NestedLoRALinear, {"weighting": "matryoshka"}),
    "4-bit factors": (quantized.QuantizedLoRALinear, {"bits": 4}),
    "experts": (experts.ExpertsLinear, {}),
}


def make(name: str, size: str, precision: str = "fp32", r: int = 8, count: int = 8) -> Arm:
    """An arm by its name, around the base. count: of experts, or of tasks in a batch."""
    rows, length = batch_of(size, precision)
    model = base(size, precision)
    ids = torch.randint(
        model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1)
    )
    common: dict[str, Any] = {"ids": ids, "autocast": precision != "fp32" and NATIVE_BF16}
    torch.manual_seed(2)
    if name == "base":
        return Arm(sharing_weights(model), training=False, **common)
    if name == "frozen base":  # forward and backward: what every adapter's step contains
        frozen = sharing_weights(model).requires_grad_(False)
        first = frozen.model.layers[0].self_attn
        for linear in (
            first.q_proj,
            first.k_proj,
            first.v_proj,
        ):  # from here on down no gradient of an input is needed
            linear.register_forward_hook(lambda module, inputs, y: y.requires_grad_())
        return Arm(frozen, **common)
    if name == "unmerged":
        return Arm(randomized(inject(sharing_weights(model), config(r))), training=False, **common)
    if name == "merged":  # into weights of its own
        return Arm(
            merge(randomized(inject(copy.deepcopy(model), config(r)))),
            training=False,
            **common,
        )
    if name == "merged and unloaded":
        return Arm(unload(make("merged", size, precision, r).model), training=False, **common)
    if name == "PEFT LoRA":
        return Arm(get_peft_model(sharing_weights(model), config(r)), **common)
    if name == "PEFT DoRA":
        return Arm(get_peft_model(sharing_weights(model), config(r, use_dora=True)), **common)
    if name in ("AdaLoRA", "PEFT AdaLoRA"):
        schedule, steps = (
            AdaLoraConfig(**ADALORA, target_modules="all-linear", task_type="CAUSAL_LM"),
            itertools.count(2),
        )
        if name == "PEFT AdaLoRA":
            theirs = get_peft_model(
                sharing_weights(model), schedule
            )  # its loss holds the regulariser
            return Arm(
                theirs, after=lambda: theirs.base_model.update_and_allocate(next(steps)), **common
            )
        ours = inject(sharing_weights(model), schedule, layer=adalora.AdaLoRALinear)
        allocator = adalora.RankAllocator(ours)
        return Arm(
            ours,
            auxiliary_loss=adalora.regularizer,
            after=lambda: allocator.step(next(steps)),
            **common,
        )
    if (
        name == "X-LoRA"
    ):  # its experts are frozen, and it runs only where they are named "0", "1", …
        with tempfile.TemporaryDirectory() as folder:
            adapters = {}
            for i in range(count):
                plain = randomized(inject(sharing_weights(model), config(r)))
                adapters[str(i)] = str(export_peft(plain, Path(folder) / str(i)))
            bare = sharing_weights(model)
            bare.config = copy.deepcopy(bare.config)
            bare.config.use_cache = False
            settings = XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=bare.config.hidden_size,
                adapters=adapters,
                layerwise_scalings=True,
            )
            return Arm(get_peft_model(bare, settings), **common)
    if name in ("experts", "frozen experts"):
        mixture = inject(
            sharing_weights(model), config(r), layer=experts.ExpertsLinear, num_experts=count
        )
        return Arm(
            experts.freeze_experts(mixture) if name == "frozen experts" else mixture, **common
        )
    if name in ("tasks", "PEFT tasks"):
        return serving(name, model, size, r, count)
    layer, arguments = LAYERS[name]
    ours = inject(sharing_weights(model), config(r), layer=layer, **arguments)
    if name == "progressive":  # in its second stage: half the rank is frozen
        ours = inject(sharing_weights(model), config(max(1, r // 2)), layer=layer)
        for stacked in adapter_layers(ours).values():
            stacked.freeze()
            stacked.start(max(1, r // 2))
    if name == "adaptive":  # grown twice
        ours = inject(sharing_weights(model), config(max(1, r // 2)), layer=layer)
        for growing in adapter_layers(ours).values():
            for step in (1, 2):
                growing.grow(max(1, r // 4), step)
    if name == "gates":
        sparsity, optimizer = sparse.GateSparsity(ours, 1e-3), []
        arm = Arm(ours, after=lambda: sparsity.step(optimizer[0]), **common)
        optimizer.append(arm.optimizer)
        return arm
    return Arm(ours, **common)


def serving(name: str, model: nn.Module, size: str, r: int, count: int) -> Arm:
    """A batch of 16 short prompts, its rows spread over `count` adapters; a forward pass."""
    ids = torch.randint(
        model.config.vocab_size,
        (16, 16 if size != "quick" else 4),
        generator=torch.Generator().manual_seed(1),
    )
    names = [str(i % count) for i in range(16)]
    states = {
        str(i): factor_state(randomized(inject(sharing_weights(model), config(r)), seed=i))
        for i in range(count)
    }
    if name == "tasks":
        ours = load_adapters(sharing_weights(model), states)
        arm = Arm(ours, ids, training=False)
        plain = arm.run

        def run() -> None:
            with row_adapters(ours, names):
                plain()

        arm.run = run
        return arm
    theirs = get_peft_model(sharing_weights(model), config(r), adapter_name="0")
    for i in range(1, count):
        theirs.add_adapter(str(i), config(r))
    with torch.no_grad():
        for parameter in (p for n, p in theirs.named_parameters() if "lora_B" in n):
            nn.init.normal_(parameter, std=0.02)
    return Arm(theirs, ids, training=False, forward={"adapter_names": names})


@torch.no_grad()
def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """A stand-in for a trained adapter: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        layer.B.normal_(std=0.02, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------ groups


@dataclasses.dataclass(frozen=True)
class Group:
    """Arms that take turns. The first one is what the others are compared with. arms: label → (name, further arguments of
    `make`). memory: whether each arm's peak is measured too. rounds: times the rounds of its size."""

    size: str
    precision: str
    arms: dict[str, tuple[str, dict[str, int]]]
    memory: bool = False
    rounds: int = 1


def plain(*names: str) -> dict[str, tuple[str, dict[str, int]]]:
    return {name: (name, {}) for name in names}


VARIANTS = plain(
    "LoRA",
    "fused LoRA",
    "AdaLoRA",
    "progressive",
    "adaptive",
    "gates",
    "masked factors",
    "ΔW mask",
    "nested",
    "4-bit factors",
    "PEFT DoRA",
)


def groups(quick: bool = False) -> dict[str, Group]:
    """All parts of a run by name."""
    nano, smollm2 = ("quick", "quick") if quick else ("nano", "smollm2")
    found = {
        f"lora {label} {precision}": Group(size, precision, plain("PEFT LoRA", "LoRA", *["frozen base"] * (precision == "fp32")), memory=not quick or precision == "fp32" and label == "nano")
        for label, size in (("nano", nano), ("smollm2", smollm2)) for precision in ("fp32", "bf16", "4bit")
    }  # fmt: skip
    found |= {
        f"adalora {label}": Group(
            size,
            "fp32",
            plain("PEFT AdaLoRA", "AdaLoRA", "frozen base"),
            memory=not quick and size == smollm2,
        )
        for label, size in (("nano", nano), ("smollm2", smollm2))
    }
    found["experts smollm2"] = Group(smollm2, "fp32", plain("LoRA", "experts"), memory=not quick)
    found["xlora smollm2"] = Group(
        smollm2, "fp32", plain("X-LoRA", "frozen experts"), memory=not quick
    )
    found["merged smollm2"] = Group(
        smollm2, "fp32", plain("base", "merged and unloaded", "merged", "unmerged"), rounds=3
    )
    found |= {
        f"variants {label}": Group(size, "fp32", VARIANTS, memory=not quick and size == smollm2)
        for label, size in (("nano", nano), ("smollm2", smollm2))
    }
    ranks, counts = ((2, 4), (2,)) if quick else ((2, 8, 32, 128), (2, 4, 8, 16))
    found["curve rank"] = Group(
        nano,
        "fp32",
        {f"{name} {r}": (name, {"r": r}) for r in ranks for name in ("LoRA", "PEFT LoRA")},
    )
    found["curve experts"] = Group(
        nano,
        "fp32",
        {f"{name} {n}": (name, {"count": n}) for n in counts for name in ("experts",)}
        | plain("LoRA"),
    )
    found["curve tasks"] = Group(
        nano,
        "fp32",
        {
            f"{name} {n}": (name, {"count": n})
            for n in (1, *counts)
            for name in ("tasks", "PEFT tasks")
        },
    )
    return found


def measure(group: Group) -> dict[str, Any]:
    """Seconds of each arm in each round, after one round that does not count; and peaks of memory in bytes."""
    arms = {
        label: make(name, group.size, group.precision, **more)
        for label, (name, more) in group.arms.items()
    }
    seconds: dict[str, list[float]] = {label: [] for label in arms}
    for count in range(group.rounds * ROUNDS[group.size] + 1):
        for label in random.Random(count).sample(
            list(arms), len(arms)
        ):  # so that none always follows the same one, or itself
            start = time.perf_counter()
            arms[label].run()
            seconds[label].append(time.perf_counter() - start)
    result: dict[str, Any] = {
        "size": group.size,
        "precision": group.precision,
        "batch": batch_of(group.size, group.precision),
        "seconds": {label: [round(s, 6) for s in times[1:]] for label, times in seconds.items()},
    }
    del arms
    gc.collect()
    if group.memory:
        base.cache_clear()
        peaks = {
            label: lab.process_peak(
                "benchmarks.bench:two_steps", name, group.size, group.precision, more
            )
            for label, (name, more) in group.arms.items()
        }
        result["peak_bytes"] = {label: peak.grown for label, peak in peaks.items()}
    return result


def two_steps(name: str, size: str, precision: str, more: dict[str, int]) -> None:
    """In a process of its own: a training, without the peak of building its model (where the system can forget that)."""
    arm = make(name, size, precision, **more)
    base.cache_clear()
    gc.collect()
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # Linux: the high-water mark starts anew from what is resident now
    arm.run()
    arm.run()


# ------------------------------------------------------------------------------------------------ the run


def provenance() -> dict[str, Any]:
    """What the numbers depend on, beside the date."""
    names = [
        line.split(":", 1)[1].strip()
        for line in _cpuinfo()
        if line.startswith(("model name", "CPU part"))
    ]
    return {
        "machine": f"{platform.system()} {platform.machine()}", "processor": names[0] if names else platform.processor() or "unknown",
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "native_bf16": NATIVE_BF16,
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "commit": commit(),
    }  # fmt: skip


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


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
    from benchmarks import report

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
