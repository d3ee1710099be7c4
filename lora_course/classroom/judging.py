"""The check of a graded problem: a student's function against the family's own, on fresh inputs.

It runs where the student's code doesn't: `learner` is a function of this process in tests and a `Remote` when grading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lora_course.classroom.equal import copied, difference
from lora_course.classroom.families import Choices, Draw, Family

Status = Literal["right", "wrong", "not attempted", "failed"]


@dataclass(frozen=True)
class Verdict:
    """failed: no answer could be judged (it didn't load, took too long, its process ended)."""

    status: Status
    message: str = ""


class StudentError(Exception):
    """An error that a student's function raised: `kind` is the error's type."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}" if text else kind)
        self.kind = kind


class Ended(Exception):
    """A student's process is gone or over a limit; the text says which, for the student to read."""


@dataclass
class Outcome:
    """What one call gave: the result (or the arguments that it may change), gradients, damage."""

    result: Any
    gradients: list[Tensor]
    damage: str = ""


def judge(
    family: Family, choice: Choices, learner: Callable, seed: str, explain: bool = True
) -> Verdict:
    """Calls the learner's function on the family's cases and compares. Never raises for what the student wrote.

    explain: look for the rule that a wrong answer misses; takes as long as a dozen checks.
    """
    cases = family.cases(Draw(seed), choice)
    upstream = torch.Generator().manual_seed(Draw(seed + "/gradient").getrandbits(60))
    weights = torch.rand(1 << 12, generator=upstream) + 0.5
    outcomes: list[Outcome] = []
    try:
        for case in cases:
            outcomes.append(_call(family, learner, case, weights))
            if outcomes[-1].damage:
                return Verdict("wrong", outcomes[-1].damage)
    except Ended as ended:
        return Verdict("failed", str(ended))
    except (StudentError, NotImplementedError) as error:
        if not outcomes and getattr(error, "kind", "") in ("", "NotImplementedError"):
            return Verdict("not attempted", "The stub is as it was.")
        return Verdict("wrong", f"Your function stopped with {error}")
    except Exception as error:  # a function of this process, in tests
        return Verdict("wrong", f"Your function stopped with {type(error).__name__}: {error}")
    if not family.changes and all(o.result is None or o.result is ... for o in outcomes):
        return Verdict("not attempted", "Your function returns nothing.")
    reasons = compare(family, choice, cases, outcomes, weights)
    wrong = [i for i, reason in enumerate(reasons) if reason]
    if not wrong:
        return Verdict("right")
    if explain and (named := _explained(family, choice, cases, outcomes, weights)):
        return Verdict("wrong", named)
    first = reasons[wrong[0]]
    return Verdict(
        "wrong", f"Wrong in {len(wrong)} of {len(cases)} cases; in the first of them: {first}."
    )


def compare(
    family: Family, choice: Choices, cases: Sequence[tuple], outcomes: Sequence[Outcome], weights: Tensor
) -> list[str]:  # fmt: skip
    """For each case what is different from the family's own answer under `choice`; "" where nothing is."""
    reasons = []
    for case, found in zip(cases, outcomes, strict=True):
        right = _call(family, family.function(choice), case, weights)
        reason = difference(found.result, right.result, family.tolerance)
        if not reason and family.gradient:
            reason = difference(found.gradients, right.gradients, family.tolerance)
            reason = reason and f"the value is right, its gradient is not ({reason})"
        reasons.append(reason)
    return reasons


def _call(family: Family, learner: Callable, case: tuple, weights: Tensor) -> Outcome:
    given = [copied(value) for value in case]
    for i in family.gradient:
        given[i].requires_grad_()
    with torch.enable_grad():
        result = learner(*given)
        if family.changes:
            result = [given[i] for i in family.changes]
    damage = ""
    for i, (before, after) in enumerate(zip(case, given, strict=True)):
        if i not in family.changes and difference(after, before, 0):
            damage = "Your function changes an argument that it was only lent: work on a copy."
    gradients = _gradients(result, [given[i] for i in family.gradient], weights)
    return Outcome(copied(result), gradients, damage)


def _gradients(result: Any, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Of a weighted sum of the result, one for each input; zeros where no graph leads."""
    zeros = [torch.zeros_like(x) for x in inputs]
    parts = [r for r in (result if isinstance(result, list | tuple) else [result]) if isinstance(r, Tensor)]
    parts = [r for r in parts if r.requires_grad]
    if not inputs or not parts:
        return zeros
    total = sum((weights[: r.numel()].reshape(r.shape) * r).sum() for r in parts)
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [z if g is None else g for g, z in zip(found, zeros, strict=True)]


def _explained(
    family: Family, choice: Choices, cases: Sequence[tuple], outcomes: Sequence[Outcome], weights: Tensor
) -> str:  # fmt: skip
    """A wrong answer that is right under another choice of one convention names that convention."""
    book = {name: family.book.get(name, choice[name]) for name in choice}
    for name, others in family.neighbours(choice).items():
        if any(not any(compare(family, o, cases, outcomes, weights)) for o in others):
            return f"All is right but one rule. Read it again: “{family.sentence(choice, name)}”"
    usable = all(book[name] in family.conventions[name] for name in book)
    if usable and not any(compare(family, book, cases, outcomes, weights)):
        return "This is the chapter's answer. The problem states other rules: compare them one by one."
    return ""
