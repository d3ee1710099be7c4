"""Worked examples beside a graded problem: they show the rules at work, and are not the check that counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_course.classroom.calls import Answer, Mistake, Unanswered
from lora_course.classroom.comparison import difference

TOLERANCE = 2e-3
"""Examples are printed with four digits."""


def practice(
    function: Callable[..., Any],
    examples: Sequence[tuple[dict[str, Any], Any]],
    changes: Sequence[str] = (),
) -> None:
    """Calls the function on each example's arguments and prints what is different.

    changes: arguments that it changes in place; they are compared, and not the result.
    """
    for number, (arguments, expected) in enumerate(examples, 1):
        try:
            given = copy.deepcopy(arguments)
            found = Answer(function).call(given)
            found = {name: given[name] for name in changes} if changes else found
            if found is None or found is ...:
                raise Unanswered
            problem = difference(found, expected, TOLERANCE)
            text = f"✗ example {number}: {problem.text}" if problem else f"✓ example {number}"
        except Unanswered:
            text = f"– example {number}: not answered yet"
        except Mistake as mistake:
            text = f"✗ example {number}: {mistake}"
        print(text)
    print("Grading uses other inputs, and the corners that the text names.")


def rounded(value: Any) -> Any:
    """A value whose numbers have three decimals, so that it can be printed."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return (value.detach() * 1000).round() / 1000
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, list | tuple):
        return type(value)(rounded(v) for v in value)
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return value


def literal(value: Any) -> str:
    """Source of a value of numbers, strings, tensors, lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        if not value.numel():
            return f"torch.zeros({tuple(value.shape)}, dtype={value.dtype})"
        numbers = value.detach().tolist()
        kind = "" if value.dtype in (torch.float32, torch.bool, torch.int64) else f", dtype={value.dtype}"  # fmt: skip
        return f"torch.tensor({_numbers(numbers)}{kind})"
    if isinstance(value, float):
        return _numbers(value)
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {literal(v)}" for key, v in value.items()) + "}"
    return repr(value)


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_numbers, value))}]"
    if isinstance(value, float):
        text = (
            f"{value:.4g}" if value == value and abs(value) != float("inf") else f'float("{value}")'
        )
        return text if any(c in text for c in ".en") else text + ".0"
    return repr(value)
