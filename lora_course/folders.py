"""Adapter folders as plain states, without a model: what mixing, teaching and serving take besides states."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from lora_course.checkpoint import read_description, read_tensors
from lora_course.lora import AdapterState
from lora_course.states import split_state


def read_factors(adapter: AdapterState | str | Path) -> AdapterState:
    """The plain factors of a folder that `save_adapter`, `export_peft` or PEFT wrote; a state is given back as it is.

    Raises:
        FileNotFoundError: no adapter there.    ValueError: a layer whose tensors are no plain factors, or another method
        than LoRA.
    """
    if isinstance(adapter, dict):
        return adapter
    folder = Path(adapter)
    if (folder / "adapter_config.json").is_file():
        return read_peft(folder)[1]
    layer = read_description(folder)["layer"]
    state = read_tensors(folder)
    if any(set(tensors) != {"A", "B", "scaling"} for tensors in split_state(state).values()):
        raise ValueError(
            f"{folder} holds a {layer}, whose tensors are no plain factors: load_adapter it into a base, and give "
            "factor_state of that model, or a folder by export_peft."
        )
    return state


def read_peft(folder: Path) -> tuple[LoraConfig, AdapterState]:
    """Configuration and plain factors of a LoRA folder that PEFT wrote. Raises as `read_factors`."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: a folder written by PEFT's save_pretrained (safetensors) is expected."
        )
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise ValueError(f"{folder} holds a {config.peft_type} adapter; plain LoRA is expected.")
    state: AdapterState = {}
    for key, tensor in load_file(path).items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, factor = name.rpartition(".")
        if factor not in ("lora_A", "lora_B") or not key.endswith(".weight"):
            raise ValueError(
                f"{path} holds {key!r}, which is no factor of a linear layer: load this adapter with PEFT."
            )
        state[f"{module}.{factor.removeprefix('lora_')}"] = tensor
    alphas, ranks = config.alpha_pattern or {}, config.rank_pattern or {}
    for module in split_state(state):
        alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
        r = ranks.get(get_pattern_key(list(ranks), module), config.r)
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        state[f"{module}.scaling"] = torch.tensor(scaling, dtype=torch.float64)
    return config, state
