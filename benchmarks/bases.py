"""The base models that arms are put around, and what a step of each reads."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from lora_course import lab, qlora
from lora_course.arguments import compute_dtype
from lora_course.injection import adapter_layers

logging.disable_progress_bar()

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
NATIVE_BF16 = compute_dtype("cpu") == torch.bfloat16
"""Whether this processor multiplies in bf16. One that emulates it takes a hundred times as long: a bf16 base then gets one row
of 16 tokens, and a 4-bit base computes in fp32, as the course's trainer would have it."""


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


@torch.no_grad()
def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """A stand-in for a trained adapter: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        layer.B.normal_(std=0.02, generator=generator)
    return model
