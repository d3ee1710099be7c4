"""What servers make of a PEFT adapter folder: the update of each module by their own rules for scales and ranks.

Each rule is stated in the words of its source, as read in November 2026, and in code of our own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_course.linears import is_4bit

Updates = dict[str, Tensor]
"""ΔW `[out, in]` by module name; a module that is missing gets no update."""


def factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """`(A, B)` by module name."""
    found = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): (
            found[f"{name}.lora_A.weight"],
            found[f"{name}.lora_B.weight"],
        )
        for name in names
    }


def settings(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def vllm(folder: Path, model: nn.Module) -> Updates:
    """vLLM, `vllm/lora/peft_helper.py`: one `r` and one `lora_alpha` for all; patterns are not read.

    A rank above `max_lora_rank`, which is compared with `r`, is refused: so `r` has to be the largest.
    """
    config = settings(folder)
    found = factors(folder)
    assert config["r"] >= max(A.shape[0] for A, _ in found.values())
    scale = config["lora_alpha"] / config["r"]
    return {name: scale * B @ A for name, (A, B) in found.items()}


def llama_cpp(folder: Path, model: nn.Module) -> Updates:
    """llama.cpp, `convert_lora_to_gguf.py` (one `lora_alpha` goes into the file) and `llama-adapter.h` (`get_scale`:
    alpha over the rank of each tensor)."""
    alpha = settings(folder)["lora_alpha"]
    return {name: alpha / A.shape[0] * B @ A for name, (A, B) in factors(folder).items()}


def tgi(folder: Path, model: nn.Module) -> Updates:
    """TGI and LoRAX, `adapters/lora.py` (`prepare_weights`): layer type by layer type, one scale `lora_alpha / r`; the
    factors of all blocks are stacked, so their ranks are equal; a type that one block lacks is left out whole."""
    config, found = settings(folder), factors(folder)
    scale = config["lora_alpha"] / config["r"]
    types: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_4bit(module):
            types.setdefault(name.rpartition(".")[2], []).append(name)
    updates: Updates = {}
    for names in types.values():
        if all(name in found for name in names):
            torch.stack([found[name][0] for name in names])
            updates |= {name: scale * found[name][1] @ found[name][0] for name in names}
    return updates


SERVERS: dict[str, Callable[[Path, nn.Module], Updates]] = {
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "tgi": tgi,
}
