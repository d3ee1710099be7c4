"""Sane `TrainingArguments` for an adapter, and the precision that pays on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


def compute_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """The dtype in which matrix products are fastest on a device without losing training: bf16 where the hardware has it
    (GPUs from Ampere on; CPUs with AVX512-BF16 or AMX), fp16 on older GPUs, fp32 on other CPUs, which only emulate bf16.

    device: the GPU where there is one, else the CPU, by default.
    """
    kind = _device_type(device)
    if kind == "cuda":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return torch.bfloat16 if native else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if kind == "cpu" and fast else torch.float32


def training_arguments(
    output_dir: str | Path, device: str | torch.device | None = None, **overrides: Any
) -> TrainingArguments:
    """`TrainingArguments` that suit an adapter: seeded data and dropout, the loss logged at every step, nothing reported to
    a service, autocast in `compute_dtype(device)`, AdamW at 2e-4 (arXiv 2305.14314) after 5% of warm-up, small
    checkpoints every 100 steps and at the end, of which two are kept.

    device: where to train, as in `compute_dtype`. overrides: any field of `TrainingArguments`.
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


def _device_type(device: str | torch.device | None) -> str:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
