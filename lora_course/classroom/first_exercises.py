"""The first frame of an exercise, until no chapter uses it any more: a check that looks at a learner's object and says what it found.

    @exercise("1.1-a", points=2)
    def check_codebook(learner):                 # gets what the learner wrote: a function, a class, a value
        codes = learner(4)
        mistake(len(codes) != 16, "4 bits give 16 codes, not {}: one code for each bit pattern.", len(codes))

In the chapter the learner calls `check_codebook(my_codebook)` beside the stub.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

Status = Literal["not attempted", "wrong", "right"]
Check = Callable[[Any], "Result"]

FROM_TORCH = ("not implemented for", "Could not run")
"""Words of the NotImplementedErrors that torch itself raises, for a dtype or device: a mistake, not a stub."""

EXERCISES: dict[str, Check] = {}
"""Every exercise's check by id, in the order in which they were defined."""


@dataclass(frozen=True)
class Result:
    """What a check found. `points` are given only for a right answer."""

    id: str
    status: Status
    message: str
    points: float

    def __str__(self) -> str:
        sign = {"right": "✓", "wrong": "✗", "not attempted": "–"}[self.status]
        return f"{sign} {self.id}: {self.status}" + (f". {self.message}" if self.message else "")

    def _ipython_display_(self) -> None:
        """Nothing: the check has printed it, and a cell that ends with the check would show it twice."""


class Mistake(Exception):
    """Raised by `mistake`; its text names the likely mistake."""


def mistake(happened: bool, message: str, *values: Any) -> None:
    """Ends a check as wrong with `message.format(*values)` if `happened`. Messages of one exercise differ by mistake."""
    if happened:
        raise Mistake(message.format(*values) if values else message)


def exercise(
    id: str, points: float = 1, in_place: bool = False
) -> Callable[[Callable[[Any], None]], Check]:
    """Makes a check of a function that takes the learner's object and calls `mistake` where something is wrong.

    The check prints its result, returns it as a `Result`, and never raises for what the learner wrote: an untouched stub,
    which is None or `...`, returns one of them, or raises NotImplementedError, is "not attempted"; any other error is a wrong answer that
    names the error. in_place: the learner's function is meant to return nothing, so that None says nothing.

    Raises ValueError when the id is taken by another function.
    """

    def make(function: Callable[[Any], None]) -> Check:
        taken = EXERCISES.get(id)
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise ValueError(
                f"the exercise {id!r} is defined already, by {taken.__module__}.{taken.__qualname__}: give it another id"
            )

        @functools.wraps(function)
        def check(learner: Any) -> Result:
            result = _judge(function, learner, id, points, in_place)
            print(result)
            return result

        check.points = points
        EXERCISES[id] = check
        return check

    return make


def grade(answers: dict[str, Any]) -> dict[str, Result]:
    """The same checks on the objects of one learner, by exercise id; an exercise without an answer is "not attempted".

    Raises ValueError for an id that no chapter's check has; import the chapter's module first.
    """
    if unknown := set(answers) - set(EXERCISES):
        raise ValueError(
            f"no exercise {', '.join(sorted(unknown))}; there are {', '.join(EXERCISES) or 'none yet'}"
        )
    return {id: check(answers.get(id)) for id, check in EXERCISES.items()}


def _judge(
    function: Callable[[Any], None], learner: Any, id: str, points: float, in_place: bool
) -> Result:
    untouched = Result(id, "not attempted", "Replace the stub and run the cell again.", 0)
    if learner is None or learner is ...:
        return untouched
    returned: list[bool] = []  # of each call of the learner's function: did anything come back?
    try:
        function(_watched(learner, returned) if isinstance(learner, FunctionType) else learner)
    except (Exception, SystemExit) as error:
        if isinstance(error, NotImplementedError) and not any(
            words in str(error) for words in FROM_TORCH
        ):
            return untouched
        if returned and not any(returned) and not in_place:
            return Result(id, "not attempted", "Your function returns nothing yet.", 0)
        text = (
            str(error)
            if isinstance(error, Mistake)
            else f"It stopped with {type(error).__name__}: {error}"
        )
        return Result(id, "wrong", text, 0)
    return Result(id, "right", "", points)


def _watched(learner: FunctionType, returned: list[bool]) -> Callable:
    @functools.wraps(learner)
    def call(*arguments: Any, **keywords: Any) -> Any:
        result = learner(*arguments, **keywords)
        returned.append(result is not None and result is not ...)
        return result

    return call
