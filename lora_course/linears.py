"""What may lie under an adapter: an `nn.Linear` or a bitsandbytes `Linear4bit`, and what to know of either."""

from __future__ import annotations

import torch
from torch import nn


def is_4bit(linear: nn.Module) -> bool:
    """Whether `linear` is a bitsandbytes `Linear4bit` (its weight is packed, two codes a byte)."""
    return type(linear).__name__ in {"Linear4bit", "LinearNF4", "LinearFP4"}


def check_linear(module: nn.Module, name: str) -> None:
    quantised_otherwise = (
        isinstance(module, nn.Linear)
        and not is_4bit(module)
        and not module.weight.is_floating_point()
    )
    inside_attention = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if (
        not (isinstance(module, nn.Linear) or is_4bit(module))
        or quantised_otherwise
        or inside_attention
    ):
        hint = {
            "Conv1D": "GPT-2's Conv1D stores its weight transposed: replace it by an nn.Linear of weight.T",
            "NonDynamicallyQuantizableLinear": "nn.MultiheadAttention reads its weight and never calls it",
        }.get(
            type(module).__name__,
            "leave it out of target_modules, or name the linear layers inside it",
        )
        raise TypeError(
            f"{name!r} is a {type(module).__name__}; nn.Linear or bitsandbytes' Linear4bit is expected: {hint}."
        )


def execution_device(linear: nn.Module) -> torch.device | str | int:
    # A layer that accelerate keeps on the CPU or on disk runs on the device its hook names.
    hook = getattr(linear, "_hf_hook", None)
    return getattr(hook, "execution_device", None) or linear.weight.device


def keep_unpacked(linear: nn.Module) -> None:
    """Keep bitsandbytes from repacking a 4-bit weight in an eval-mode forward on a CPU with AVX512-BF16.

    After the repacking, dequantising the weight, and so merging and the gradient below it, give garbage.
    """
    linear.support_avx512bf16_for_cpu = False
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise RuntimeError(
            "A 4-bit layer was run in eval mode before the adapter was injected, and this CPU's kernel has repacked its "
            "weight: gradients and merges would be wrong. Load the base again and inject, or call qlora.protect(model), "
            "before its first forward."
        )


def check_mergeable(linear: nn.Module, name: str) -> None:
    """Raise, with the layer's `name`, unless ΔW can be added to the weight of `linear`.

    Raises:
        TypeError: the weight is 4-bit.    RuntimeError: it is offloaded.
    """
    if is_4bit(linear):
        raise TypeError(
            f"The base of {name!r} is 4-bit: adding ΔW would round the sum to 16 values a block. Call "
            "lora_course.qlora.dequantize_model(model) and merge then, or merge_requantized(model) to accept the loss."
        )
    if linear.weight.is_meta:
        raise RuntimeError(
            f"The weight of {name!r} is offloaded to disk: load the base without offloading to merge."
        )
