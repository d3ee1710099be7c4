"""Wrong and right answers to every exercise, by chapter; `tests/test_exercises.py` runs them all.

alpha = Answers(check_alpha)
alpha.wrong("the old α", lambda new_r, r, lora_alpha, use_rslora=False: lora_alpha)

@alpha.right("through the scale")
def _(new_r, r, lora_alpha, use_rslora=False): ...

alpha.equivalent("min(1, x) → min(1, x, 2)", "no x is larger than 1")     # a mutant of the solution that is right too
"""

from collections.abc import Callable
from typing import Any

from lora_course.classroom.exercises import Check

ANSWERS: dict[str, "Answers"] = {}
"""By exercise id, as the chapters' files are imported."""


class Answers:
    """Answers to one exercise, each with a label."""

    def __init__(self, check: Check) -> None:
        self.check, self.id = check, check.exercise.id
        self.wrongs: list[tuple[str, Any]] = []
        self.rights: list[tuple[str, Any]] = []
        self.equivalents: dict[str, str] = {}
        ANSWERS[self.id] = self

    def wrong(self, label: str, answer: Any = None) -> Any:
        return _add(self.wrongs, label, answer)

    def right(self, label: str, answer: Any = None) -> Any:
        return _add(self.rights, label, answer)

    def equivalent(self, mutant: str, reason: str) -> None:
        """A change of the solution, as `mutants` names it, that no check can refuse, because it changes nothing asked for."""
        self.equivalents[mutant] = reason


def _add(answers: list[tuple[str, Any]], label: str, answer: Any) -> Any:
    def add(function: Callable) -> Callable:
        answers.append((label, function))
        return function

    return add if answer is None else add(answer)
