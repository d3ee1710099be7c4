"""One call of a learner's function, watched: the side on which the learner's code lives.

    answer = Answer(their_function)
    answer.call({"logits": logits, "k": 2})          # what it returns, or Mistake, or Unanswered

A check knows of the learner no more than this method. A grader that keeps the learner's code in another process passes a
subclass whose `call` sends the arguments there, runs `Answer.call` there, writes what became of the arguments back into
those of the caller, and returns the result or raises what was raised.
"""

import builtins
import contextlib
import inspect
import linecache
import math
import random
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FROM_TORCH = ("not implemented for", "Could not run")
"""Words of the NotImplementedErrors that torch itself raises, for a dtype or device: a mistake, not a stub."""


class Mistake(Exception):
    """What a learner's answer does wrong; its text names the likely mistake."""


class Unanswered(Exception):
    """The stub is still a stub."""


class Answer:
    """What a learner wrote, in this process: a function, or anything else that can be called."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.names = _namespaces()

    def call(
        self, arguments: dict[str, Any], draws: bool = False, largest: int | None = None
    ) -> Any:
        """The learner's function on `arguments`, in their order, or by name where it asks for names.

        draws: it may draw random numbers.    largest: no tensor of more elements may be made on the way.

        Raises:
            Unanswered: there is no function, or it raises NotImplementedError.
            Mistake: it can't be called so, stops, leaves the process changed (random state, default dtype, gradient mode,
                replaced functions; all are put back), or makes a larger tensor.
        """
        if self.function is None or self.function is ...:
            raise Unanswered
        if not callable(self.function):
            raise Mistake(f"A function is expected, not a {type(self.function).__name__}.")
        positional, keywords = bind(self.function, arguments)
        outside = random_states()
        torch.default_generator.manual_seed(
            secrets.randbits(60)
        )  # one that no function sets by accident
        before = _state(draws, self.names)
        watch = _LargestMade() if largest else None
        try:
            with watch or contextlib.nullcontext():
                result = self.function(*positional, **keywords)
        except (Exception, SystemExit) as error:
            stub = isinstance(error, NotImplementedError)
            if stub and not any(words in str(error) for words in FROM_TORCH):
                raise Unanswered from None
            raise Mistake(told(error, self.function)) from None
        finally:
            changed = _restore(before)
            for state, put_back in outside.values():
                put_back(state)
        if changed:
            raise Mistake(f"Your function leaves {changed} changed for everything that runs later.")
        if watch and largest and watch.elements > largest:
            raise Mistake(
                f"A tensor of {watch.elements:,} elements was made on the way; the text asks for a way that "
                f"needs none of more than {largest:,} here."
            )
        return result


def bind(function: Callable, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`arguments` as positional and keyword ones that `function` takes: positional as far as they go.

    Raises Mistake where they can't be given to it.
    """
    names, values = list(arguments), list(arguments.values())
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return tuple(values), {}
    for split in range(len(names), -1, -1):
        keywords = dict(zip(names[split:], values[split:], strict=True))
        with contextlib.suppress(TypeError):
            signature.bind(*values[:split], **keywords)
            return tuple(values[:split]), keywords
    raise Mistake(f"Your function takes {signature}; it is called with ({', '.join(names)}).")


def told(error: BaseException, function: Callable) -> str:
    """One sentence on an error of the learner's function: where in their code, and what."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if code is not None and frame.f_code.co_filename == code.co_filename
    ]
    where = ""
    if code is not None and lines:
        number = lines[-1]
        text = linecache.getline(code.co_filename, number).strip()
        where = f" in line {number}" + (f", `{text}`," if text else "")
    words = (str(error).strip().splitlines() or [""])[0][:160].rstrip(".")
    return f"Your function stops{where} with {type(error).__name__}{': ' if words else ''}{words}."


class _LargestMade(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation makes; a view makes none."""

    elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        for leaf in () if getattr(operation, "is_view", False) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def _settings() -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], Any]]]:
    """What a function might leave changed: its name, how to read it, how to put it back."""
    yield "torch's default dtype", torch.get_default_dtype, torch.set_default_dtype
    yield "the gradient mode", torch.is_grad_enabled, torch.set_grad_enabled
    yield "torch's default device", torch.get_default_device, _set_device
    yield (
        "the detection of anomalies",
        torch.is_anomaly_enabled,
        torch.autograd.set_detect_anomaly,
    )
    yield "the number of threads", torch.get_num_threads, torch.set_num_threads
    yield "numpy's handling of errors", np.geterr, lambda kinds: np.seterr(**kinds)
    yield (
        "torch's use of deterministic algorithms",
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    )


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def random_states() -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """The states of the three global generators: how each reads now, comparable, and how to put it back."""
    state = torch.get_rng_state()
    drawn: Any = np.random.get_state()
    return {
        "torch's random state": (state.numpy().tobytes(), lambda _: torch.set_rng_state(state)),
        "numpy's random state": (
            (drawn[1].tobytes(), drawn[2:]),
            lambda _: np.random.set_state(drawn),
        ),
        "Python's random state": (random.getstate(), random.setstate),
    }


def _namespaces() -> list[tuple[Any, dict[str, Any]]]:
    """What the checks compute with, and a learner's function must not replace."""
    own = [module for name, module in sys.modules.items() if name.startswith(__package__)]
    guarded = [*own, torch, torch.Tensor, torch.nn.functional, torch.linalg, builtins, math]
    return [(owner, dict(vars(owner))) for owner in guarded]


def _state(draws: bool, names: list[tuple[Any, dict[str, Any]]]) -> tuple[Any, ...]:
    settings = [(name, read(), read, put) for name, read, put in _settings()]
    return settings, random_states(), names, torch.initial_seed(), draws


def _restore(before: tuple[Any, ...]) -> str:
    """Puts everything back; what had to be, in words, or ""."""
    settings, states, namespaces, seed, draws = before
    changed = []
    for name, value, read, put in settings:
        if read() != value:
            put(value)
            changed.append(name)
    for owner, names in namespaces:
        get = vars(owner).get
        replaced = [name for name, value in names.items() if get(name, ...) is not value]
        for name in replaced:
            setattr(owner, name, names[name])
            changed.append(f"{getattr(owner, '__name__', owner)}.{name}")
    seeded = torch.initial_seed() != seed
    now = random_states()
    for name, (value, put) in states.items():
        if now[name][0] != value:
            put(value)
            if not draws or (seeded and name.startswith("torch")):
                changed.append(name)
    return " and ".join(changed[:3])
