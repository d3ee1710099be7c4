"""What a training sets on the model object itself, and gives back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate sets on a model that it wraps; TRL sets a `forward` too."""


@contextlib.contextmanager
def kept_as_it_is(model: nn.Module, forward: Callable[..., Any] | None = None) -> Iterator[None]:
    """Within it a Trainer may wrap `model.forward`, switch its cache off and train or evaluate; after it these and each module's mode are as before.

    forward: what `model.forward` is within it, where it is not the model's own.
    """
    before = {name: vars(model)[name] for name in PREPARED if name in vars(model)}
    use_cache = uses_cache(model)
    modes = [(module, module.training) for module in model.modules()]
    if forward is not None:
        model.forward = forward
    try:
        yield
    finally:
        for name in PREPARED:
            vars(model).pop(name, None)
        vars(model).update(before)
        set_use_cache(model, use_cache)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def kept_factors(model: nn.Module) -> Iterator[None]:
    """After it, what is trained has the type and the numbers that it had: TRL casts a 4-bit model's to bf16."""
    before = [(p, p.data) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for parameter, data in before:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)


def forward_set_on(model: nn.Module) -> Callable[..., Any] | None:
    """The `forward` that was set on a model object, which a copy of the model would share; None where it has its class's."""
    return vars(model).get("forward")


def uses_cache(model: nn.Module) -> bool | None:
    """`config.use_cache` of a model; None where it has no such field."""
    return getattr(getattr(model, "config", None), "use_cache", None)


def set_use_cache(model: nn.Module, use_cache: bool | None) -> None:
    """Sets `config.use_cache` where a model has it."""
    if uses_cache(model) is not None:
        model.config.use_cache = use_cache  # type: ignore[union-attr]  # a configuration of transformers
