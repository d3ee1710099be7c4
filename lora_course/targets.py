"""Which linear layers a configuration targets: PEFT's rules, and a sentence for each way to miss."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from lora_course.linears import check_linear
from lora_course.lora import LoRALinear

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Under which names configurations state how many experts a block has."""
NEW_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types whose models get a head with random weights, which has to be trained and saved beside the adapter."""
HEADED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForImageClassification", "ForMultipleChoice")  # fmt: skip
"""How classes of transformers end whose models have such a head."""


def check_fields(model: nn.Module, config: LoraConfig, layer: type[LoRALinear]) -> LoraConfig:
    """A copy of `config` with numbers of numpy as Python's.

    Raises:
        TypeError: no `LoraConfig`.    ValueError: a field that `layer` does not obey.

    Warns:
        UserWarning: the model has a head of its own, which may be at its random weights.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; peft.LoraConfig(r=…, lora_alpha=…, target_modules=…) is expected."
        )
    check_supported(config, layer)
    if getattr(config.task_type, "value", config.task_type) in NEW_HEADS:
        raise ValueError(
            f"task_type={config.task_type!s}: the model's new head would stay at its random weights, since only adapters are "
            "trained and saved here. Use PEFT, which trains and saves it, or train the head first and leave task_type out."
        )
    kind = type(model).__name__
    if kind.endswith(HEADED):
        warnings.warn(
            f"A {kind} has a head of its own, which is neither trained nor saved with the adapter: right where it was trained before, and a "
            "head of random weights where it was not (from_pretrained names what it had to make anew).",
            stacklevel=3,
        )
    check_names(config)
    config = copy.deepcopy(config)
    for field in dataclasses.fields(config):
        setattr(config, field.name, plain_numbers(getattr(config, field.name)))
    return config


def check_supported(config: LoraConfig, layer: type[LoRALinear]) -> None:
    """Raise ValueError for a field that is set and that `layer` does not obey."""
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


def check_arguments(layer: type[LoRALinear], arguments: Iterable[str]) -> None:
    """Raise TypeError, naming what `layer` takes beside its configuration, for an argument that it does not take."""
    known = {
        name
        for kind in layer.__mro__
        if issubclass(kind, LoRALinear)
        for name in inspect.signature(kind.__init__).parameters
    }
    own = sorted(
        known - set(inspect.signature(LoRALinear.__init__).parameters) - {"fields", "_", "__"}
    )
    if unknown := sorted(set(arguments) - set(own)):
        raise TypeError(
            f"{layer.__name__} takes no argument {unknown[0]!r}; beside its configuration it takes {', '.join(own) or 'none'}."
        )


def check_names(config: LoraConfig) -> None:
    """Raise TypeError for names of modules that are none, ValueError for a regular expression that is none."""
    for field in (
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    ):
        given = () if getattr(config, field) is None else getattr(config, field)
        names = [given] if isinstance(given, str) else given
        pattern = field in ("rank_pattern", "alpha_pattern")
        if not isinstance(names, dict if pattern and names else (list, tuple, set, dict)):
            raise TypeError(
                f"{field}={given!r}: {'numbers by name' if pattern else 'names'} of modules are expected."
            )
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"{field} holds {wrong[0]!r}: names of modules are expected.")
        for name in names if isinstance(given, str | dict) else ():
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(
                    f"{field}={name!r} is no regular expression ({error}): one name of a module is given as a list, ['{name}']."
                ) from None
    layers = config.layers_to_transform
    listed = layers if isinstance(layers, list | tuple) else [0 if layers is None else layers]
    if not all(isinstance(layer, int) for layer in listed):
        raise TypeError(f"layers_to_transform={layers!r}: numbers of layers are expected.")


def plain_numbers(value: Any) -> Any:
    """`value` with numbers of numpy as Python's, in dictionaries and lists too: JSON knows no others, and no ranges."""
    if isinstance(value, dict):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, range | list):
        return [plain_numbers(item) for item in value]
    return value.item() if isinstance(value, numpy.generic) else value


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives a language model's logits; None where there is no telling."""
    found = getattr(model, "get_output_embeddings", None)
    return found() if found else None


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The table of a language model's tokens; None where there is no telling."""
    found = getattr(model, "get_input_embeddings", None)
    return found() if found else None


def find_targets(model: nn.Module, config: Any) -> dict[str, Any]:
    """Target layers by name; resolves "all-linear" in `config`, as PEFT does."""
    modules = {name: module for name, module in model.named_modules() if name}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    head = output_head(model)
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
    embedding, places = input_embedding(model), _places(model)
    for name, module in targets.items():
        check_linear(module, name)
        if len(places[id(module)]) > 1:
            raise TypeError(
                f"{' and '.join(map(repr, places[id(module)]))} are one module: an adapter in one place would be missing in the other. "
                "Give one of them a module of its own (a copy), or leave it out of target_modules."
            )
        if embedding is not None and module.weight is getattr(embedding, "weight", None):
            raise TypeError(
                f"{name!r} shares its weight with the input embedding: a merged update would change both. Leave it out of target_modules."
            )
    return targets


def _places(model: nn.Module) -> dict[int, list[str]]:
    """The names under which modules hold each module, by its id; a module that is there twice itself counts once."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for child, held in module._modules.items():  # named_children passes over the second
            places.setdefault(id(held), []).append(f"{name}.{child}" if name else child)
    return places


def find_patterns(config: LoraConfig, targets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`rank_pattern` and `alpha_pattern` by target name. Raises ValueError for a key that matches no target."""
    found = {}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field) or {}
        keys = {name: get_pattern_key(list(pattern), name) for name in targets}
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


def _fused_experts(model: nn.Module) -> list[str]:
    """Names of parameters that hold the weights of several experts, mostly `[experts, …, …]`, and are no linear layers."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = {getattr(text, name, None) for name in EXPERT_COUNTS} - {None}
    return [
        name
        for name, parameter in model.named_parameters()
        if (parameter.ndim == 3 and parameter.shape[0] in counts)
        or (parameter.ndim > 1 and "experts." in name and not name.endswith((".weight", ".bias")))
    ]


def _refuse_fused_experts(model: nn.Module) -> None:
    if found := _fused_experts(model):
        raise TypeError(
            f"{found[0]!r} {list(model.get_parameter(found[0]).shape)} is a fused weight of several experts, not a linear "
            "layer, and 'all-linear' would pass over it without a word: list the linear layers to adapt in "
            "target_modules, or adapt the experts with PEFT: LoraConfig(target_parameters=[…])."
        )


def _fused(model: nn.Module, unknown: Sequence[str]) -> str:
    found = [name for name in _fused_experts(model) if name.rpartition(".")[2] in unknown]
    if not found:
        return ""
    return f" {found[0]!r} is a fused weight of several experts: PEFT adapts it with target_parameters, this package does not."


def _endings(names: Iterable[str]) -> str:
    return (
        ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "no linear layer at all"
    )
