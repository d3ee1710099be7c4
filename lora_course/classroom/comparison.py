"""Whether what a learner returned is what was asked for: by value and shape, whatever it is written in.

A number may be Python's, numpy's or a tensor of one element; a tensor may be an array or a list; a tuple may be a list;
64-bit, 32-bit and 16-bit floats are all taken, each at its own precision. A NaN is never equal to anything.
"""

import itertools
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_course.classroom.wire import Opaque, native

PRECISION = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative tolerance of a result in a type of fewer bits than 32: a few of its steps."""


@dataclass(frozen=True)
class Difference:
    """text: one sentence on it, without the right answer.    in_kind: another type, shape or structure, not another value."""

    text: str
    in_kind: bool = False


def difference(
    found: Any,
    expected: Any,
    tolerance: float = 1e-4,
    whole: bool = False,
    what: str = "it",
    floor: float = 0.0,
) -> Difference | None:
    """How `found` differs from `expected`, or None.

    Floats are equal where |found − expected| ≤ tolerance · (|expected| + root mean square of expected): what should be
    zero throughout must be zero. Whole numbers, truth values and strings are compared exactly.

    whole: a whole number must come as one (`int`, a numpy integer, a tensor of integers), not as a float of that value.
    what: what `found` is called in the sentence.    floor: an absolute difference of tensors that counts as none.
    """
    try:
        return _difference(found, expected, tolerance, whole, what, floor)
    except Exception:  # a value with a comparison of its own, a tensor without data
        kind = type(found).__name__
        return Difference(f"{_start(what)} is a {kind} that can't be read as a value.", True)


def _difference(
    found: Any, expected: Any, tolerance: float, whole: bool, what: str, floor: float
) -> Difference | None:
    if isinstance(expected, (Tensor, np.ndarray)):
        return _tensors(found, torch.as_tensor(expected), tolerance, what, floor)
    if isinstance(expected, (bool, np.bool_)):
        return _truth(found, bool(expected), what)
    if isinstance(expected, numbers.Number):
        return _numbers(found, expected, tolerance, whole, what)
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or set(found) != set(expected):
            got = f"the keys {_keys(found)}" if isinstance(found, Mapping) else described(found)
            return Difference(
                f"A dictionary with the keys {list(expected)} is expected for {what}; it is {got}.",
                True,
            )
        parts = [(found[k], expected[k], f"{what} [{k!r}]") for k in expected]
    elif isinstance(expected, (set, frozenset)):
        listed = _listed(found)
        if listed is None:
            return Difference(f"Names are expected for {what}; it is {described(found)}.", True)
        same = len(listed) == len(expected) and all(item in listed for item in expected)
        return None if same else Difference(f"{_start(what)} holds others than were asked for.")
    elif isinstance(expected, (list, tuple)):
        listed = None if isinstance(found, Mapping) else _listed(found)
        if listed is None or len(listed) != len(expected):
            return Difference(
                f"{len(expected)} values are expected for {what}; it is {described(found)}.", True
            )
        parts = [
            (f, e, f"{what} [{i}]") for i, (f, e) in enumerate(zip(listed, expected, strict=True))
        ]
    else:
        same = found is expected if expected is None else bool(found == expected)
        return None if same else Difference(f"{_start(what)} is {described(found)}.", True)
    for part in parts:
        if problem := difference(part[0], part[1], tolerance, whole, part[2], floor):
            return problem
    return None


def _keys(found: Mapping) -> str:
    text = str(list(itertools.islice(found, 12)))
    return text if len(text) <= 120 else f"{text[:120]}…"


def _listed(value: Any) -> list[Any] | None:
    """What is in it, in order; None where there is nothing to go through, as in a string or a tensor of one number."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return None
    try:
        return list(value)
    except Exception:  # a tensor [], a generator that stops with an error of its own
        return None


def described(value: Any) -> str:
    """What something is, in a few words."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 8:
        return f"a tensor of {value.ndim} dimensions"
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a tensor of shape {list(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, (bool, complex)):
        return f"{value!r}"
    if isinstance(value, numbers.Number):
        return _told(value) if abs(_float(value)) > 1e12 else f"{value}"
    return f"a {value.name if isinstance(value, Opaque) else type(value).__name__}"


def as_tensor(value: Any) -> Tensor | None:
    """`value` as a tensor on the CPU without a graph; None where it is none and can't become one."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(_plain(value))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    tensor = tensor.detach().cpu()
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def _plain(value: Any) -> Any:
    """What torch understands: arrays as it takes them, and lists of numbers for lists of tensors and arrays."""
    if isinstance(value, np.ndarray):
        value = native(value)
    if isinstance(value, (list, tuple)):
        return [item.tolist() if isinstance(item, np.ndarray) else _plain(item) for item in value]
    return value.detach().cpu().tolist() if isinstance(value, Tensor) else value


def _tensors(
    found: Any, expected: Tensor, tolerance: float, what: str, floor: float
) -> Difference | None:
    expected = expected.detach()
    tensor = None if isinstance(found, (str, Mapping, nn.Module)) else as_tensor(found)
    if tensor is not None and expected.ndim == 0 and tensor.numel() == 1:
        tensor = tensor.reshape(())  # a scalar may come as a tensor of one element, as a number may
    if tensor is None or tensor.shape != expected.shape:
        return Difference(
            f"A tensor of shape {list(expected.shape)} is expected for {what}; it is {described(found)}.",
            True,
        )
    if expected.dtype == torch.bool or tensor.dtype == torch.bool:
        if tensor.dtype != expected.dtype and tensor.numel():
            kind = "truth values" if expected.dtype == torch.bool else "numbers"
            return Difference(
                f"A tensor of {kind} is expected for {what}; it is {described(found)}.", True
            )
        return None if torch.equal(tensor, expected) else _wrong_values(tensor, expected, what)
    if not expected.is_floating_point():
        same = not tensor.is_complex() and bool((tensor == expected).all())
        return None if same else _wrong_values(tensor, expected, what)
    if tensor.is_complex():
        return Difference(f"Real numbers are expected for {what}; it is {described(found)}.", True)
    if tensor.isnan().any() and not expected.isnan().any():
        return Difference(f"There is a NaN in {what}.")
    allowed = max(tolerance, PRECISION.get(tensor.dtype, 0))
    f, e = tensor.double(), expected.double()
    finite = e.isfinite()
    size = e[finite].square().mean().sqrt() if finite.any() else e.new_zeros(())
    near = (f == e) | ((f - e).abs() <= allowed * (e.abs() + size) + floor) & finite
    return None if bool(near.all()) else _wrong_values(f, e, what)


def _wrong_values(found: Tensor, expected: Tensor, what: str) -> Difference:
    f, e = found.double(), expected.double()
    error = ((f - e).norm() / e.norm()).item() if e.norm() else float("inf")
    rate = f"; the relative error is {error:.2g}" if error < float("inf") else ""
    return Difference(f"The values of {what} are not those that were asked for{rate}.")


def _scalar(found: Any) -> Any:
    """The number in `found`, as Python's own; None where there is none."""
    if isinstance(found, Tensor):
        return found.item() if found.numel() == 1 else None
    if isinstance(found, (np.ndarray, np.generic)):
        return found.item() if found.size == 1 else None
    return found if isinstance(found, numbers.Number) else None


def _numbers(
    found: Any, expected: Any, tolerance: float, whole: bool, what: str
) -> Difference | None:
    number = _scalar(found)
    if number is None or isinstance(number, (complex, bool)):
        return Difference(f"A number is expected for {what}; it is {described(found)}.", True)
    if whole and not isinstance(number, int):
        return Difference(f"A whole number is expected for {what}; it is {described(found)}.", True)
    if isinstance(expected, (int, np.integer)):
        same = number == expected
    else:
        number = _float(number)
        dtype: Any = getattr(found, "dtype", None)
        precise = PRECISION.get(dtype, tolerance)
        same = abs(number - expected) <= max(precise * abs(expected), 1e-7) or number == expected
    return None if same else Difference(f"{_start(what)} is {_told(number)}, which is wrong.")


def _float(number: Any) -> float:
    """A decimal, a fraction, or a whole number of any size as a float."""
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")


def _told(number: Any) -> str:
    value = _float(number)
    beyond = isinstance(number, int) and value in (float("inf"), float("-inf"))
    return "beyond 1e308" if beyond else f"{value:.6g}"


def _truth(found: Any, expected: bool, what: str) -> Difference | None:
    value = _scalar(found)
    if not isinstance(value, bool):
        return Difference(f"True or False is expected for {what}; it is {described(found)}.", True)
    return None if value is expected else Difference(f"{_start(what)} is {value}, which is wrong.")


def _start(what: str) -> str:
    return what[:1].upper() + what[1:]
