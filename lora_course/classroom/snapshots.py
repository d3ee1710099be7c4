"""What an argument was before a call, and what of it is another one after: tensors, layers, optimisers and containers."""

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

Snapshot = dict[str, Any]
"""What can be compared, by the place where it stands: `layer.base_layer.weight`, `scores['q'][0]`."""


@dataclass(frozen=True, eq=False)
class _Identity:
    """Equal to the same object only, which it keeps alive."""

    held: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.held is other.held


def snapshot(value: Any, name: str) -> Snapshot:
    """Everything in `value` that a function might change, copied: values, types, shapes, order, identity of parameters,
    gradients, `requires_grad`, train or eval, the plain attributes of layers and objects, an optimiser's groups and state.
    """
    found: Snapshot = {}
    _take(value, name, found, set())
    return found


def changed(before: Snapshot, after: Snapshot) -> list[str]:
    """The places whose content differs, in order."""
    return [
        place
        for place in [*before, *(set(after) - set(before))]
        if place not in before or place not in after or not _same(before[place], after[place])
    ]


def storages(value: Any) -> dict[int, str]:
    """The memory that the tensors in `value` lie in, each with the place of a tensor in it."""
    found: dict[int, str] = {}

    def visit(tensor: torch.Tensor, place: str) -> None:
        if tensor.numel() and not tensor.is_sparse:
            found.setdefault(tensor.untyped_storage().data_ptr(), place)

    _take(value, "", {}, set(), visit)
    return found


def _take(value: Any, place: str, found: Snapshot, seen: set[int], visit=None) -> None:
    simple = isinstance(
        value, (numbers.Number, str, bytes, bool, np.generic, torch.dtype, type(None))
    )
    if not simple:
        if id(value) in seen:
            return
        seen = seen | {id(value)}  # those it lies in: what stands in two places is noted in both
    if isinstance(value, torch.Tensor):
        if visit:
            visit(value, place)
            return
        found[place] = _copied(value)
        packed = getattr(value, "quant_state", None)
        if packed is not None:
            _take(packed.as_dict(), f"{place}.quant_state", found, seen, visit)
    elif isinstance(value, np.ndarray):
        found[place] = (str(value.dtype), value.copy())
    elif simple:
        found[place] = (type(value), value)
    elif isinstance(value, nn.Module):
        _take_module(value, place, found, seen, visit)
    elif isinstance(value, torch.optim.Optimizer):
        _take(value.param_groups, f"{place}.param_groups", found, seen, visit)
        for number, state in enumerate(value.state.values()):
            _take(state, f"{place}.state[{number}]", found, seen, visit)
        found[f"{place}.state"] = [_Identity(parameter) for parameter in value.state]
    elif isinstance(value, Mapping):
        found[f"{place}'s keys"] = [
            _Identity(key) if isinstance(key, torch.Tensor) else key for key in value
        ]
        _each(((f"{place}[{key!r}]", v) for key, v in value.items()), found, seen, visit)
    elif isinstance(value, (list, tuple)):
        found[f"{place}'s length"] = len(value)
        _each(((f"{place}[{i}]", v) for i, v in enumerate(value)), found, seen, visit)
    elif isinstance(value, (set, frozenset)):
        found[place] = frozenset(value)
    elif hasattr(value, "__dict__") and not callable(value):
        _each(((f"{place}.{key}", v) for key, v in vars(value).items()), found, seen, visit)


def _each(items: Iterable[tuple[str, Any]], found: Snapshot, seen: set[int], visit) -> None:
    for place, value in items:
        _take(value, place, found, seen, visit)


def _take_module(module: nn.Module, place: str, found: Snapshot, seen: set[int], visit) -> None:
    """Its own parameters and buffers, the plain attributes, and the same of the modules in it."""
    for key, tensor in {**module._parameters, **module._buffers}.items():
        if tensor is not None:
            found[f"{place}.{key}'s identity"] = _Identity(tensor)
            _take(tensor, f"{place}.{key}", found, seen, visit)
        else:
            found[f"{place}.{key}"] = None
    for key, value in vars(module).items():
        if key == "training":
            found[f"{place}'s train or eval mode"] = value
        elif not key.startswith("_"):
            _take(value, f"{place}.{key}", found, seen, visit)
    found[f"{place}'s hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    for key, child in module._modules.items():
        found[f"{place}.{key}'s identity"] = _Identity(child)
        if child is not None:
            _take(child, f"{place}.{key}", found, seen, visit)


def _copied(tensor: torch.Tensor) -> tuple[Any, ...]:
    grad = None if tensor.grad is None else tensor.grad.detach().clone()
    return tensor.dtype, tensor.requires_grad, tensor.detach().clone(), grad


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same_kind = a.shape == b.shape and a.dtype == b.dtype
        return same_kind and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, float) and isinstance(b, float) and a != a:
        return b != b
    return type(a) is type(b) and a == b
