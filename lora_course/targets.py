"""Which linear layers a configuration targets: PEFT's rules, and a sentence for each way to miss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from lora_course.linears import check_linear
from lora_course.lora import LoRALinear


def check_fields(config: LoraConfig, layer: type[LoRALinear]) -> None:
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; peft.LoraConfig(r=…, lora_alpha=…, target_modules=…) is expected."
        )
    ignored = []
    for field in dataclasses.fields(config):
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        if field.name not in layer.supported_fields and getattr(config, field.name) != default:
            ignored.append(f"{field.name}={getattr(config, field.name)!r}")
    if ignored:
        raise ValueError(
            f"{layer.__name__} does not support {', '.join(ignored)}: leave it at its default, or use PEFT itself."
        )


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Linear]:
    """Target layers by name; resolves "all-linear" in `config`, as PEFT does."""
    modules = {name: module for name, module in model.named_modules() if name}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if config.target_modules is None:
        raise ValueError(
            f"target_modules is not set: give 'all-linear' or some of {_endings(linears)}."
        )
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        _refuse_fused_experts(model)
        # Conv1D is a target of PEFT's "all-linear": here it is refused by name below, not passed over.
        conv1d = {name for name, module in modules.items() if type(module).__name__ == "Conv1D"}
        config.target_modules = conv1d | {
            name for name, module in linears.items() if module is not head
        }
    targets = {
        name: module for name, module in modules.items() if check_target_module_exists(config, name)
    }
    listed = [] if isinstance(config.target_modules, str) else config.target_modules
    unknown = _unmatched(listed, modules)
    if unknown or not targets:
        given = unknown or (
            config.target_modules if isinstance(config.target_modules, str) else sorted(listed)
        )
        raise ValueError(
            f"target_modules={given!r} matches no linear layer; this model has {_endings(linears)}.{_fused(model, unknown)}"
        )
    excluded = [] if isinstance(config.exclude_modules, str) else config.exclude_modules or []
    if unknown := _unmatched(excluded, modules):
        raise ValueError(
            f"exclude_modules={unknown!r} matches no module; the linear layers are {_endings(linears)}."
        )
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for name, module in targets.items():
        check_linear(module, name)
        if embedding is not None and module.weight is getattr(embedding, "weight", None):
            raise TypeError(
                f"{name!r} shares its weight with the input embedding: a merged update would change both. Leave it out of target_modules."
            )
    return targets


def find_patterns(config: LoraConfig, targets: Iterable[str]) -> dict[str, dict[str, float]]:
    """`rank_pattern` and `alpha_pattern` by target name. Raises ValueError for a key that matches no target."""
    found = {}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field) or {}
        keys = {name: get_pattern_key(pattern, name) for name in targets}
        found[field] = {name: pattern[key] for name, key in keys.items() if key in pattern}
        if unused := set(pattern) - set(keys.values()):
            raise ValueError(
                f"{field}: {sorted(unused)} matches none of the targets {_endings(targets)}."
            )
    return found


def _unmatched(keys: Iterable[str], names: Iterable[str]) -> list[str]:
    return sorted(
        key for key in keys if not any(name == key or name.endswith(f".{key}") for name in names)
    )


def _refuse_fused_experts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 3 and not isinstance(owner, nn.modules.conv._ConvNd):
            raise TypeError(
                f"{name!r} {list(parameter.shape)} is a fused weight of several experts, not a linear layer, and 'all-linear' "
                "would pass over it without a word: list the linear layers to adapt in target_modules."
            )


def _fused(model: nn.Module, unknown: Sequence[str]) -> str:
    found = [
        n for n, p in model.named_parameters() if p.ndim == 3 and n.rpartition(".")[2] in unknown
    ]
    return (
        f" {found[0]!r} is a fused weight of several experts, which is not supported."
        if found
        else ""
    )


def _endings(names: Iterable[str]) -> str:
    return (
        ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "no linear layer at all"
    )
