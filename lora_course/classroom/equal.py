"""Whether an answer equals what is expected, whatever it is made of: tensors, arrays, numbers, lists, dictionaries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

PRECISION = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Tolerances of answers in 16 bits: a few units in the last place of a sum."""


def copied(value: Any) -> Any:
    """The same value with nothing shared: tensors without a graph, containers of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(copied(v) for v in value)
    if isinstance(value, dict):
        return {key: copied(v) for key, v in value.items()}
    return value


def difference(found: Any, expected: Any, tolerance: float = 1e-4) -> str:
    """What is different, in a few words; "" where nothing is. NaN never equals a number.

    Lists, tuples, arrays and tensors count as alike where their values do; so do numbers of any type, and True is no 1.
    """
    if isinstance(expected, dict):
        return _dictionaries(found, expected, tolerance)
    if isinstance(expected, str | bytes) or expected is None:
        return "" if found == expected and type(found) is type(expected) else "another value"
    if isinstance(expected, Tensor):
        return _tensors(found, expected, tolerance)
    if isinstance(expected, list | tuple):
        return _sequences(found, expected, tolerance)
    return _numbers(found, expected, tolerance)


def _dictionaries(found: Any, expected: dict, tolerance: float) -> str:
    if not isinstance(found, dict):
        return f"a dictionary is expected, not {kind(found)}"
    if set(found) != set(expected):
        return "other keys"
    for key, value in expected.items():
        if reason := difference(found[key], value, tolerance):
            return f"{key!r}: {reason}"
    return ""


def _sequences(found: Any, expected: list | tuple, tolerance: float) -> str:
    if isinstance(found, Tensor | np.ndarray):
        found = list(found)
    if not isinstance(found, list | tuple):
        return f"{len(expected)} values are expected, not {kind(found)}"
    if len(found) != len(expected):
        return f"{len(expected)} values are expected, not {len(found)}"
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if reason := difference(one, other, tolerance):
            return f"value {i}: {reason}" if len(expected) > 1 else reason
    return ""


def _tensors(found: Any, expected: Tensor, tolerance: float) -> str:
    if isinstance(found, bool | int | float | list | tuple | np.ndarray | np.generic):
        try:
            found = torch.as_tensor(np.asarray(found))
        except (TypeError, ValueError):
            return "no tensor can be made of it"
    if not isinstance(found, Tensor):
        return f"a tensor is expected, not {kind(found)}"
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} where {list(expected.shape)} is expected"
    if expected.dtype == torch.bool:
        if found.dtype != torch.bool:
            return f"true and false are expected, not {str(found.dtype).removeprefix('torch.')}"
        return "" if torch.equal(found, expected) else "another choice"
    if found.dtype == torch.bool:
        return "numbers are expected, not true and false"
    tolerance = max(tolerance, PRECISION.get(found.dtype, 0))
    one, other = found.detach().double(), expected.detach().double()
    both = torch.isfinite(one) & torch.isfinite(other)
    if bool((one.isnan() != other.isnan()).any()):
        return "NaN where a number is expected"
    if not torch.equal(one[~both].nan_to_num(), other[~both].nan_to_num()):
        return "an infinite value"
    if not expected.is_floating_point():
        return "" if torch.equal(one, other) else "other values"
    size = float(other[both].abs().max()) if both.any() else 0.0
    gap = float((one - other)[both].abs().max()) if both.any() else 0.0
    return "" if gap <= tolerance * max(size, 1e-6) else f"values differ by up to {gap:.3g}"


def _numbers(found: Any, expected: bool | int | float, tolerance: float) -> str:
    if isinstance(found, Tensor | np.ndarray | np.generic) and found.size in (1, torch.Size(())):
        found = found.item()
    if isinstance(found, Tensor) and found.numel() == 1 and found.dim() == 0:
        found = found.item()
    if not isinstance(found, bool | int | float):
        return f"a number is expected, not {kind(found)}"
    if isinstance(expected, bool) != isinstance(found, bool):
        return "true or false is expected" if isinstance(expected, bool) else "a number is expected"
    if isinstance(expected, int):
        return "" if found == expected else f"{found:.6g}"
    if math.isnan(found) or math.isinf(found) or math.isinf(expected):
        return "" if found == expected else f"{found}"
    return "" if abs(found - expected) <= tolerance * max(abs(expected), 1e-6) else f"{found:.6g}"


def kind(value: Any) -> str:
    """A value's type in a reader's words."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {getattr(value, 'name', None) or type(value).__name__}"
