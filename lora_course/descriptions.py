"""How a model was injected, and on which weights: written beside an adapter, and compared with what is asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_course.injection import adapter_layers, injection_of, unwrapped
from lora_course.linears import whole
from lora_course.lora import LoRALinear
from lora_course.targets import input_embedding

DESCRIPTIVE = frozenset({
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type",
    "base_model_name_or_path", "revision", "inference_mode",
})  # fmt: skip
"""Fields that say nothing of what an adapter computes beyond its modules, which are compared by name and shape."""

UNKNOWN = "unknown"
"""The fingerprint of rows that can't be told from others; it differs from none."""


def describe_adapter(model: nn.Module) -> dict[str, Any]:
    """How `model` was injected: `layer`, `config_class`, `config`, `arguments`, as JSON holds them."""
    info = injection_of(model)
    return {
        "layer": info.layer.__name__,
        "config_class": type(info.config).__name__,
        "config": {
            name: _jsonable(value) for name, value in _fields(info.config, info.layer).items()
        },
        "arguments": info.arguments,
    }


def describe_modules(model: nn.Module) -> dict[str, str]:
    """The modules of the adapter by their last names: how many there are, and a hash of where they lie."""
    names: dict[str, list[str]] = {}
    for name in adapter_layers(model):
        names.setdefault(name.rpartition(".")[2], []).append(name)
    return {
        ending: f"{len(found)}, {hashlib.sha256(' '.join(found).encode()).hexdigest()[:6]}"
        for ending, found in names.items()
    }


def differences(found: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`"config.r is 2 there and 8 here"` for each entry that differs; what only describes a configuration (`DESCRIPTIVE`) is passed over."""
    lines = []
    found, asked = json.loads(json.dumps(found)), json.loads(json.dumps(asked))
    for key in sorted(found.keys() | asked.keys()):
        there, here = found.get(key), asked.get(key)
        describes = key in DESCRIPTIVE and prefix.endswith("config.")
        if describes or there == here or UNKNOWN in (there, here):
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} is {there!r} there and {here!r} here")
    return lines


def base_fingerprint(layers: Mapping[str, LoRALinear]) -> str | None:
    """A hash of a sample of the base weights under the adapter: equal for equal values in fp32, bf16 or fp16."""
    if any(
        layer.merged or layer.folded or layer.base_layer.weight.is_meta for layer in layers.values()
    ):
        return None
    digest = hashlib.sha256()
    for layer in layers.values():
        weight: Tensor = whole(layer.base_layer.weight).flatten()
        digest.update(weight[:: max(1, weight.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokens_fingerprint(model: nn.Module) -> str | None:
    """How many tokens the model has, and a hash of the last ones' embeddings: those that `resize_token_embeddings` adds."""
    weight = getattr(input_embedding(model), "weight", None)
    if weight is None or weight.is_meta or isinstance(weight, DTensor):
        return None
    last = weight.detach()[-8:].float().cpu().contiguous()
    return f"{len(weight)} tokens, {hashlib.sha256(last.numpy().tobytes()).hexdigest()[:8]}"


def describe_base(
    model: nn.Module, layers: Mapping[str, LoRALinear] | None = None
) -> dict[str, Any]:
    """`name`, `fingerprint` of the weights under the adapter and `tokens` of the base, as JSON holds them.

    layers: of one of several adapters, in the model's order; by default all.
    """
    model = unwrapped(model)
    return {
        "name": getattr(model, "name_or_path", ""),
        "fingerprint": base_fingerprint(adapter_layers(model) if layers is None else layers),
        "tokens": tokens_fingerprint(model),
    }


def warn_of_another_base(
    model: nn.Module,
    base: Mapping[str, Any],
    folder: str | Path,
    layers: Mapping[str, LoRALinear] | None = None,
) -> None:
    """Warn where the injected `model` has other base weights than those that the adapter in `folder` was trained on.

    layers: as for `describe_base`.
    """
    here = describe_base(model, layers)
    there, tokens = base.get("tokens"), here["tokens"]
    if there and tokens and there != tokens:
        warnings.warn(
            f"The base's last tokens are not those that the adapter in {folder} was trained with ({there} there, {tokens} here): "
            "tokens that resize_token_embeddings adds start at random, and no adapter holds them. Load a base that was saved with them.",
            stacklevel=3,
        )
    found, expected = here["fingerprint"], base["fingerprint"]
    if found and expected and found != expected:
        warnings.warn(
            f"The base's weights are not those that the adapter in {folder} was trained on ({base['name']!r}). "
            "That is expected when a 4-bit base is replaced by its 16-bit original.",
            stacklevel=3,
        )


def _fields(config: LoraConfig, layer: type[LoRALinear]) -> dict[str, object]:
    derived = {"peft_type", "peft_version", "auto_mapping"}
    names = {
        field.name for field in dataclasses.fields(config) if field.init
    } & layer.supported_fields - derived
    return {name: getattr(config, name) for name in sorted(names)}


def _jsonable(value: object) -> object:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", value)
