"""Sane `TrainingArguments` for an adapter, and the precision that pays on a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

CPU_DTYPE = "LORA_COURSE_CPU_DTYPE"


def compute_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """The dtype in which matrix products are fastest on a device without losing training: bf16 where the hardware has it
    (GPUs from Ampere on; CPUs with AVX512-BF16 or AMX), fp16 on older GPUs, fp32 on other CPUs, which only emulate bf16.

    device: the GPU where there is one, else the CPU, by default.

    `computing_in`, or LORA_COURSE_CPU_DTYPE=float32 in the environment, decides it for CPUs: two processors then compute
    the same numbers, to the order of their sums.
    """
    kind = _device_type(device)
    if kind == "cuda":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return torch.bfloat16 if native else torch.float16
    if kind == "cpu" and (name := os.environ.get(CPU_DTYPE)):
        if name not in ("float32", "bfloat16"):
            raise ValueError(f"{CPU_DTYPE}={name!r}: float32 or bfloat16 is expected.")
        return torch.float32 if name == "float32" else torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if kind == "cpu" and fast else torch.float32


@contextmanager
def computing_in(name: str) -> Iterator[None]:
    """Within the block a CPU computes in this dtype, "float32" or "bfloat16": a record's own, so that it can be compared."""
    before = os.environ.get(CPU_DTYPE)
    os.environ[CPU_DTYPE] = name
    try:
        yield
    finally:
        os.environ.pop(CPU_DTYPE)
        if before is not None:
            os.environ[CPU_DTYPE] = before


def training_arguments(
    output_dir: str | Path, device: str | torch.device | None = None, **overrides: Any
) -> TrainingArguments:
    """`TrainingArguments` that suit an adapter: seeded data and dropout, the loss logged at every step, nothing reported to
    a service, autocast in `compute_dtype(device)`, AdamW at 2e-4 (arXiv 2305.14314) after 5% of warm-up, small
    checkpoints every 100 steps and at the end, of which two are kept.

    device: where to train, which is where the model lies; by default the GPU where there is one. overrides: any field of
    `TrainingArguments`.
    """
    kind, dtype = _device_type(device), compute_dtype(device)
    defaults: dict[str, Any] = {
        "seed": 0,
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # or a loss of NaN is logged as the mean of those before it
        "learning_rate": 2e-4,
        "warmup_steps": 0.05,
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 2,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": kind == "cpu",
        "dataloader_pin_memory": kind == "cuda",
    }
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **overrides})


def device_of(model: nn.Module) -> torch.device:
    """Where a model's computation begins: the device of its first parameter, or the one that accelerate's hook names."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(next(model.parameters()).device if device is None else device)


def one_device(model: nn.Module, args: TrainingArguments) -> None:
    """Holds `args` to the one device that the model lies on; for a Trainer in a process of its own.

    With several GPUs in one process Trainer would use DataParallel, which copies the model at every step.
    Raises ValueError where the model lies elsewhere, as Trainer would move it and leave it there.
    """
    there = device_of(model).type
    if there not in ("meta", args.device.type):
        raise ValueError(
            f"the model is on {there} and the arguments train on {args.device.type}: "
            f"make them with training_arguments(..., device={there!r}), or move the model first"
        )
    args._n_gpu = 1


def _device_type(device: str | torch.device | None) -> str:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
