"""What a check found, and how an answer is compared with the right one on every case of an exercise."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lora_course.classroom.calls import Answer, Mistake, Unanswered, bind, random_states
from lora_course.classroom.comparison import PRECISION, Difference, difference
from lora_course.classroom.draws import Case, Draw
from lora_course.classroom.snapshots import changed, snapshot, storages

Status = Literal["not attempted", "wrong", "right"]


@dataclass(frozen=True)
class Result:
    """What a check found. `points` are given only for a right answer; `seed` draws the same inputs again."""

    id: str
    status: Status
    message: str
    points: float
    seed: int = 0

    def __str__(self) -> str:
        sign = {"right": "✓", "wrong": "✗", "not attempted": "–"}[self.status]
        words = "not answered yet" if self.status == "not attempted" else self.status
        return f"{sign} {self.id}: {words}" + (f". {self.message}" if self.message else "")

    def _ipython_display_(self) -> None:
        """Nothing: the check has printed it, and a cell that ends with the check would show it twice."""


@dataclass(frozen=True, eq=False)
class Exercise:
    """What `exercise` was given; the text of `exercises` says what each field does.

    sixteen: results of 16 bits are taken. Graded problems take none: their rules can lie nearer to each other than such steps.
    """

    id: str
    points: float
    cases: Callable[[Draw], Iterator[Case]]
    right: Callable[..., Any]
    mistakes: dict[str, Callable[..., Any]] = field(default_factory=dict)
    look: Callable[..., Any] | None = None
    gradients: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    otherwise: str = ""
    whole: bool = False
    draws: bool = False
    fresh: bool = False
    sixteen: bool = True
    tolerance: float = 1e-4

    def judge(self, learner: Any, seed: int) -> Result:
        """The verdict on an answer, on the inputs of `seed`. It never raises for what the learner wrote."""
        answer = learner if isinstance(learner, Answer) else Answer(learner)
        states = random_states()
        try:
            self._compare(answer, self._prepared(seed))
        except Unanswered:
            text = "Replace the stub, let it return its answer, and run the cell again."
            return Result(self.id, "not attempted", text, 0, seed)
        except Mistake as found:
            return Result(self.id, "wrong", str(found), 0, seed)
        finally:
            for state, put_back in states.values():
                put_back(state)
        return Result(self.id, "right", "", self.points, seed)

    @functools.lru_cache(maxsize=4)  # noqa: B019 (exercises live as long as their module)
    def _prepared(self, seed: int) -> list[tuple[Case, dict[str, Any]]]:
        """The cases of a seed, each with the right outcome."""
        try:
            return [
                (this, self._outcome(lambda a: _called(self.right, a), this))
                for this in self.cases(Draw(seed))
            ]
        except Mistake as refused:  # no answer is wrong by that: it must not be told to a learner
            text = f"The check of {self.id} refuses the course's own answer at seed {seed} ({refused}). Please report it, and run the cell again."
            raise RuntimeError(text) from refused

    def _compare(self, answer: Answer, cases: list[tuple[Case, dict[str, Any]]]) -> None:
        """Raises Mistake or Unanswered for an answer that is not right on every case."""
        outcomes: list[tuple[Case, Any]] = []
        first: tuple[Case, Difference] | None = None
        for number, (this, expected) in enumerate(cases):
            try:
                found = self._outcome_of(answer, this)
            except (Mistake, Unanswered) as error:
                if first is None:
                    raise (
                        error if number == 0 or isinstance(error, Mistake) else _nothing()
                    ) from None
                break
            outcomes.append((this, found))
            problem = self._difference(found, expected)
            if problem and first is None:
                first = (this, problem)
        if first is None:
            return
        for message, wrong in self.mistakes.items():
            if all(self._reproduces(wrong, this, found) for this, found in outcomes):
                raise Mistake(message)
        this, problem = first
        raise Mistake(
            problem.text if problem.in_kind else this.hint or self.otherwise or problem.text
        )

    def _difference(self, found: dict[str, Any], expected: dict[str, Any]) -> Difference | None:
        # gradients through a result of 16 bits are no better than the result
        kind: Any = getattr(found.get("what you return"), "dtype", None)
        tolerance = max(self.tolerance, PRECISION.get(kind, 0))
        for what, value in expected.items():
            # a gradient that is zero may be what is left of sums that cancel
            floor = 1e-6 if what.startswith("the gradient") else 0.0
            problem = difference(found[what], value, tolerance, self.whole, what, floor)
            if problem:
                return problem
        return None

    def _reproduces(self, wrong: Callable[..., Any], this: Case, found: Any) -> bool:
        try:
            with np.errstate(all="ignore"):
                made = self._outcome(lambda a: _called(wrong, a), this)
        except Exception:  # a mistake that can't be made on this case
            return False
        return self._difference(found, made) is None

    def arguments(self, this: Case) -> dict[str, Any]:
        """Copies of a case's arguments by name, without gaps; those of `gradients` require one."""
        bound = inspect.signature(self.right).bind(*this.positional, **this.keywords)
        last = list(bound.arguments)[-1]
        bound.apply_defaults()
        names = list(bound.arguments)
        arguments = {name: bound.arguments[name] for name in names[: names.index(last) + 1]}
        arguments = copy.deepcopy(arguments)  # together: an optimiser and its layer stay a pair
        for name in self.gradients:
            arguments[name].requires_grad_()
        return arguments

    def _outcome(self, call: Callable[[dict[str, Any]], Any], this: Case) -> dict[str, Any]:
        """What is compared of one call: the result or what `look` made of it, changed arguments, gradients."""
        arguments = self.arguments(this)
        result = call(arguments)
        outcome = {}
        if self.look:
            note = {} if this.note is None else {"note": this.note}
            outcome["what you return"] = result = self.look(result, **arguments, **note)
        else:
            if not self.changes:
                outcome["what you return"] = result
            outcome |= {f"what you make of `{name}`": arguments[name] for name in self.changes}
        for name, gradient in gradients_of(
            result, {n: arguments[n] for n in self.gradients}
        ).items():
            outcome[f"the gradient of `{name}`"] = gradient
        return outcome

    def _outcome_of(self, answer: Answer, this: Case) -> Any:
        """The same of the learner's call, watched."""

        def call(arguments: dict[str, Any]) -> Any:
            before = {name: snapshot(value, name) for name, value in arguments.items()}
            given = dict(arguments)
            memory = storages(arguments) if self.fresh else {}
            result = answer.call(arguments, self.draws, this.largest)
            for name, was in before.items():
                if name not in self.changes and (
                    places := changed(was, snapshot(given[name], name))
                ):
                    raise Mistake(
                        f"Your function changed what it was given ({places[0]}): work on a copy, and leave it as it was."
                    )
            if (result is None or result is ...) and not self.changes:
                raise Unanswered
            if not self.sixteen and any(
                str(getattr(leaf, "dtype", "")).endswith("float16") for leaf in tree_leaves(result)
            ):
                raise Mistake(
                    "Return numbers of 32 bits or more: in 16 bits one rule can't be told from another."
                )
            if shared := [place for at, place in storages(result).items() if at in memory]:
                part = f" (its {shared[0].lstrip('.')})" if shared[0] else ""
                raise Mistake(
                    f"What you return{part} shares its memory with what you were given: who changes one changes the "
                    "other. Copy it."
                )
            return result

        try:
            return self._outcome(call, this)
        except (Mistake, Unanswered):
            raise
        except Exception as error:  # of `look` or of the gradient, on what the learner returned
            raise Mistake(
                f"What your function returns can't be used as the text says ({type(error).__name__})."
            ) from error


def _called(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    positional, keywords = bind(function, arguments)
    return function(*positional, **keywords)


def _nothing() -> Mistake:
    return Mistake(
        "On some inputs your function returns nothing (None): every way through it needs a return."
    )


def gradients_of(result: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a combination of all results, with the same random weights for everyone who returns those shapes."""
    if not leaves:
        return {}
    results = result if isinstance(result, (list, tuple)) else [result]
    outputs = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
    if not outputs:
        raise Mistake("What you return has no gradient: return a tensor, and keep its graph.")
    generator = torch.Generator().manual_seed(len(outputs))
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    try:
        found = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    except RuntimeError as error:
        text = "The gradient of what you return can't be computed: is something that it needs changed in place?"
        raise Mistake(text) from error
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
