"""Whether a model's activations fit into 16 bits of floating point, measured on a batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_course.lab.models import embedding_of, evaluating

FP16_LARGEST = torch.finfo(torch.float16).max  # 65,504


@torch.no_grad()
def largest_activation(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[str, float]:
    """The module whose output has the largest absolute entry in a forward pass over `batch`, and that entry; infinite where
    an output overflowed or is NaN. The first such module is named, as those behind it only pass it on.

    batch: holds `input_ids` [rows, tokens].
    """
    found: list[tuple[str, float]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                largest = tensor.abs().amax().float()
                found.append((name, largest.nan_to_num(nan=torch.inf, posinf=torch.inf).item()))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        device = embedding_of(model).device
        with evaluating(model):
            model(input_ids=batch["input_ids"].to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return max(found, key=lambda pair: pair[1])


def check_fp16(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """For a model whose weights are in fp16, or in 4 bits that are multiplied in fp16: prints how near its activations come
    to fp16's largest number on this batch. Other models pass in silence.

    Raises RuntimeError where they leave the range, naming the first module that does, and what to do.
    """
    four_bits = any(
        getattr(module, "compute_dtype", None) == torch.float16 for module in model.modules()
    )
    if embedding_of(model).dtype != torch.float16 and not four_bits:
        return
    name, largest = largest_activation(model, batch)
    if largest == torch.inf:
        load = (
            "in 4 bits that compute in fp32 (qlora.load_4bit(name, compute_dtype=torch.float32))"
            if four_bits
            else "in fp32 (lab.load_base(profile, torch.float32))"
        )
        raise RuntimeError(
            f"activations leave fp16's range ({FP16_LARGEST:,.0f}) in {name!r} on the first batch, so nothing can be trained: "
            f"take a GPU with bf16 (L4, A100), load the base {load} with half the batch, or set LORA_COURSE_PROFILE=tiny"
        )
    share = largest / FP16_LARGEST
    print(
        f"fp16: the largest activation of the first batch is {largest:,.0f}, {share:.0%} of the range."
    )
