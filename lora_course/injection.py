"""Adapters in a model: put in, counted, switched off, merged, taken out.

    model = inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

One base carries one adapter at a time; a second adapter is a second state (`states`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from peft import LoraConfig
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from lora_course.instead import replace_methods, restore_methods
from lora_course.linears import check_base_comes_along, check_not_sharded
from lora_course.lora import LoRALinear
from lora_course.targets import (
    check_arguments,
    check_fields,
    find_patterns,
    find_targets,
    plain_numbers,
)

Layer = TypeVar("Layer", bound=LoRALinear)


@dataclasses.dataclass
class Injection:
    """What `inject` did to a model; `model.lora_course` holds it, and checkpoints store it."""

    config: LoraConfig
    layer: type[LoRALinear]
    arguments: dict[str, Any]
    trainable: list[str]
    """Names of the base's parameters that were trainable before; `unload` gives them back."""


def inject(
    model: nn.Module, config: LoraConfig, layer: type[LoRALinear] = LoRALinear, **arguments: object
) -> nn.Module:
    """Freeze `model` and wrap each linear layer that `config` targets in `layer`, in place.

    Args:
        model: any module; a Hugging Face causal LM if `target_modules="all-linear"` is to leave its head out.
        config: PEFT's `LoraConfig`. `target_modules` is "all-linear", a list of name endings, or a regular expression;
            `rank_pattern`, `alpha_pattern`, `exclude_modules`, `layers_to_transform` work as in PEFT.
        layer: the class to wrap with.
        arguments: passed on to every layer, for what a variant has beyond `LoraConfig`.

    Returns:
        `model` itself; only the adapter's parameters require gradients.

    Raises:
        ValueError: a target or pattern that matches nothing, a field that `layer` does not obey, a second injection.
        TypeError: a target that is no linear layer. Nothing has been changed then.
    """
    if isinstance(getattr(unwrapped(model), "lora_course", None), Injection):
        raise ValueError(
            "This model carries an adapter already. Take it out with adapter_state(model) if you need it, then call unload(model)."
        )
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError(
            "This model carries a PEFT adapter already. Merge or unload it there first: model = model.unload()."
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "This model is wrapped by DistributedDataParallel, which would not exchange the gradients of parameters that come later: "
            "inject into model.module before wrapping."
        )
    given, model = model, unwrapped(model)
    check_not_sharded(model, "injecting (do it before fully_shard)")
    config = check_fields(model, config, layer)
    check_arguments(layer, arguments)
    r = layer.initial_rank(config)
    targets = find_targets(model, config)
    patterns = find_patterns(config, targets)
    arguments = {name: plain_numbers(value) for name, value in arguments.items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    owners = weight_owners(model)
    try:
        wrapped = {
            name: layer(
                linear,
                r=patterns["rank_pattern"].get(name, r),
                lora_alpha=patterns["alpha_pattern"].get(name, config.lora_alpha),
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
                **arguments,
            ).train(linear.training)
            for name, linear in targets.items()
        }
    except Exception:
        _make_trainable(model, trainable)
        raise
    model.requires_grad_(False)
    for name, module in wrapped.items():
        others = [owner for owner in owners[id(module.base_layer.weight)] if owner != name]
        module.weight_shared_with = others[0] if others else None
        module.register_load_state_dict_pre_hook(check_base_comes_along)
        model.set_submodule(name, module)
        for parameter in (
            p for n, p in module.named_parameters() if not n.startswith("base_layer.")
        ):
            parameter.requires_grad_(not config.inference_mode)
    model.lora_course = Injection(config, layer, arguments, trainable)  # type: ignore[assignment]  # no module, no tensor
    replace_methods(model, wrapped)
    try:
        layer.after_inject(model, wrapped)
    except Exception:
        unload(model)
        raise
    return given


def injection_of(model: nn.Module) -> Injection:
    """What `inject` did to `model`. Raises ValueError if it carries no adapter."""
    found = getattr(unwrapped(model), "lora_course", None)
    if not isinstance(found, Injection):
        raise ValueError("This model carries no adapter: call inject(model, config) first.")
    return found


def adapter_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapter's layers by module name, in the model's order."""
    injection_of(model)
    return {
        name.replace("_orig_mod.", ""): module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, LoRALinear)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` and `DistributedDataParallel` put around one."""
    while isinstance(model, OptimizedModule | DistributedDataParallel):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def layers_of(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """The layers by module name of a model that was injected with `kind`. Raises ValueError if it was with another."""
    found = injection_of(model).layer
    if not issubclass(found, kind):
        raise ValueError(
            f"This model was injected with {found.__name__}: "
            f"inject(model, config, layer={kind.__name__}) is expected."
        )
    return {
        name: module for name, module in adapter_layers(model).items() if isinstance(module, kind)
    }


def check_same_model(owner: object, model: nn.Module, own: nn.Module) -> None:
    """Raise ValueError, naming the class of `owner`, if a callback made for `own` meets the training of `model`."""
    if model is not own:
        name = type(owner).__name__
        raise ValueError(
            f"This {name} was made for another model than the one that is trained: "
            f"make a {name} with that model."
        )


def adapter_parameters(model: nn.Module) -> set[int]:
    """Ids of the adapter's parameters, whatever their layers' bases are; none in a plain model."""
    return {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, LoRALinear)
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }


def trained_besides(model: nn.Module) -> list[str]:
    """Names of parameters that require gradients and are none of the adapter's: no checkpoint or export holds them."""
    injection_of(model)
    own = adapter_parameters(model)
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]


def warn_of_what_is_left(model: nn.Module, folder: str | Path) -> None:
    """Warn where more than the adapter is trained, which what is written to `folder` does not hold."""
    if found := trained_besides(model):
        warnings.warn(
            f"{found[0]!r} ({len(found)} in all) requires a gradient and is no part of the adapter: {folder} does not hold it. "
            "Save it yourself, or adapt that layer.",
            stacklevel=3,
        )


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Which modules hold each parameter, by its id: more than one name, and the modules share it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is its base. Raises RuntimeError if it is merged."""
    layers = adapter_layers(model)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise RuntimeError(
            f"{merged[0]!r} is merged: switching the adapter off would not remove it. Call unmerge(model) first."
        )
    before = {name: layer.enabled for name, layer in layers.items()}
    for layer in layers.values():
        layer.enabled = False
    try:
        yield model
    finally:
        for name, layer in layers.items():
            layer.enabled = before[name]


def merge(model: nn.Module) -> nn.Module:
    """`merge()` on every layer, all or none. Raises as the layer does, before any weight has changed."""
    layers = adapter_layers(model)
    for name, layer in layers.items():
        layer.check_merge(name)
    for layer in layers.values():
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """`unmerge()` on every layer that is merged. Raises RuntimeError if none is."""
    merged = [layer for layer in adapter_layers(model).values() if layer.merged]
    if not merged:
        raise RuntimeError("No layer of this model is merged: there is nothing to take back.")
    for layer in merged:
        layer.unmerge()
    return model


def unload(model: nn.Module) -> nn.Module:
    """Give the plain model back: the base as it was, or with the update inside if it is merged.

    `merge` and `unload` is the way to serve. What was trainable before `inject` is trainable again.
    """
    model, info = unwrapped(model), injection_of(model)
    info.layer.before_unload(model, adapter_layers(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.base_layer)
    _make_trainable(model, info.trainable)
    del model.lora_course
    restore_methods(model)
    return model


def _make_trainable(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.is_floating_point():  # or quantize_model has made it integers since
            parameter.requires_grad_(True)
