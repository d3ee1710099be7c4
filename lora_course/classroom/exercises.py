"""The frame of an exercise: what is asked, on which inputs, and how a learner's answer is told right from wrong.

**How to write a check.** A check is four things: the inputs, the right answer, the likely mistakes, and, where reading the
result is not enough, how it is used.

    def gates(logits, k):                                  # the right answer: its parameters name the arguments
        ...

    @exercise("2.1-a", right=gates, mistakes={
        "The gates don't sum to one: divide the kept probabilities by their sum.":
            lambda logits, k: keep(logits.softmax(-1), k),
    })
    def check_top_k(draw):                                 # the inputs: fresh ones at every run
        B, T, E = draw.sizes(3, 3, 8)                      # three sizes that differ
        for k in (1, 2, E):
            yield case(draw.normal(B, T, E), k, hint="It goes wrong with k = 1 or k = E.")

`check_top_k(learner)` then calls the learner's function on every case, each time on copies of its own, and compares what it
returns with what `right` returns. Nothing of the following has to be written:

- Arguments are compared before and after, with everything in them: layers' weights, modes, attributes, `requires_grad`,
  lists, dictionaries, optimisers. What may change is named in `changes`, and is compared with what `right` made of it.
- The random state, the default dtype, the gradient mode and the course's own functions must be left as they were
  (`draws=True` where a function may draw random numbers; a new seed is refused there too). All are put back.
- `gradients=("p",)`: these arguments require a gradient, and the gradients of a random combination of the results are
  compared by value.
- Floats are compared relative to the size of the right ones, so that a NaN never passes and what should be zero is zero;
  tuples may be lists, tensors may be arrays, and results may be of any float type (`comparison.difference`).
- `largest` of a case: no tensor with more elements may be made on the way. `fresh=True`: the result may not share memory
  with the arguments.
- A mistake is named only where it reproduces what the learner returned on *all* cases; where none does, the first case
  that differs says its `hint`, or `otherwise`, and never the right value. So the mistakes are functions like `right`,
  not comparisons, and none can accuse falsely.
- An error in the learner's function is told in one sentence with its line; None is a stub that waits.

`look(result, **arguments)` says how a result is *used*: run a layer that was returned, step an optimiser, merge. What it returns is
compared, for the learner and for `right` alike; in it `mistake(happened, message, *values)` ends the check. It gets the
arguments as the call left them; their values before the call can be had from a case's `note`, which is passed as `note=…` if given.

Cases go from simple to complex, so that the first failure says most. Put in: unequal sizes, every argument at two values at
least, defaults left out, and each boundary at which the stated rule decides (ties, empty, over-full, no bias, rsLoRA, zero
rows). Where the text leaves something open, no case may depend on it.

Layers, optimisers and lists as arguments are copied, watched and passed on like tensors. A grader that keeps the learner's code
in another process passes an `Answer` of its own (see `calls`): keep arguments and results to numbers, strings, tensors, containers,
`nn.Linear`, the package's layers and torch's optimisers, which can be sent.

**What belongs to an exercise.** The chapter's text and stub say shapes, types, and what may change. Its solution is called
`solution_…`, stands on its own (no function of the chapter, only its imports), and calls no check. `tests/exercises/` keeps at least
15 wrong and 6 right answers; `tests/test_exercises.py` runs them, the named mistakes, and mutants of the solution.
"""

import copy
import functools
import inspect
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora_course.classroom.calls import Answer, Mistake, Unanswered, random_states
from lora_course.classroom.comparison import PRECISION, Difference, difference
from lora_course.classroom.draws import Case, Draw, case
from lora_course.classroom.snapshots import changed, snapshot, storages

Status = Literal["not attempted", "wrong", "right"]
Check = Callable[..., "Result"]

__all__ = ["EXERCISES", "Draw", "Exercise", "Result", "case", "exercise", "grade", "mistake"]

EXERCISES: dict[str, Check] = {}
"""Every exercise's check by id, in the order in which they were defined."""


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


def mistake(happened: bool, message: str, *values: Any) -> None:
    """Ends a check as wrong with `message.format(*values)` if `happened`."""
    if happened:
        raise Mistake(message.format(*values) if values else message)


@dataclass(frozen=True)
class Exercise:
    """What `exercise` was given; see the module's text."""

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
    tolerance: float = 1e-4

    def judge(self, learner: Any, seed: int) -> Result:
        """The verdict on an answer, on the inputs of `seed`. It never raises for what the learner wrote."""
        answer = learner if isinstance(learner, Answer) else Answer(learner)
        states = random_states()
        try:
            self._compare(answer, list(self.cases(Draw(seed))))
        except Unanswered:
            text = "Replace the stub, let it return its answer, and run the cell again."
            return Result(self.id, "not attempted", text, 0, seed)
        except Mistake as found:
            return Result(self.id, "wrong", str(found), 0, seed)
        finally:
            for state, put_back in states.values():
                put_back(state)
        return Result(self.id, "right", "", self.points, seed)

    def _compare(self, answer: Answer, cases: list[Case]) -> None:
        """Raises Mistake or Unanswered for an answer that is not right on every case."""
        outcomes: list[tuple[Case, Any]] = []
        first: tuple[Case, Difference] | None = None
        for number, this in enumerate(cases):
            expected = self._outcome(lambda a: self.right(**a), this)
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
        kind = getattr(found.get("what you return"), "dtype", None)
        tolerance = max(self.tolerance, PRECISION.get(kind, 0))
        for what, value in expected.items():
            problem = difference(found[what], value, tolerance, self.whole, what)
            if problem:
                return problem
        return None

    def _reproduces(self, wrong: Callable[..., Any], this: Case, found: Any) -> bool:
        try:
            with np.errstate(all="ignore"):
                made = self._outcome(lambda a: wrong(**a), this)
        except Exception:  # a mistake that can't be made on this case
            return False
        return self._difference(found, made) is None

    def _arguments(self, this: Case) -> dict[str, Any]:
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
        arguments = self._arguments(this)
        result = call(arguments)
        outcome = {}
        if self.look:
            note = {} if this.note is None else {"note": this.note}
            outcome["what you return"] = result = self.look(result, **arguments, **note)
        else:
            if not self.changes:
                outcome["what you return"] = result
            outcome |= {f"what you make of `{name}`": arguments[name] for name in self.changes}
        for name, gradient in _gradients(result, {n: arguments[n] for n in self.gradients}).items():
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
            if shared := [place for at, place in storages(result).items() if at in memory]:
                raise Mistake(
                    f"What you return{shared[0]} shares its memory with what you were given: who changes one changes "
                    "the other. Copy it."
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


def exercise(id: str, *, points: float = 1, right: Callable[..., Any], **rest: Any) -> Callable:
    """Makes a check of a function that yields cases; the module's text says how, `Exercise` what may be given.

    The check prints its result and returns it: `check(learner, seed=None)`, with new inputs at every run unless a seed is
    given. `check.exercise` is the `Exercise`.

    Raises ValueError when the id is taken by another function.
    """

    def make(cases: Callable[[Draw], Iterator[Case]]) -> Check:
        taken = EXERCISES.get(id)
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            cases.__module__,
            cases.__qualname__,
        ):
            raise ValueError(
                f"the exercise {id!r} is defined already, by {taken.__module__}.{taken.__qualname__}: give it another id"
            )
        made = Exercise(id, points, cases, right, **rest)

        @functools.wraps(cases)
        def check(learner: Any, seed: int | None = None) -> Result:
            result = made.judge(learner, secrets.randbits(32) if seed is None else seed)
            print(result)
            return result

        check.points, check.exercise = points, made
        EXERCISES[id] = check
        return check

    return make


def grade(answers: dict[str, Any], seed: int | None = None) -> dict[str, Result]:
    """The same checks on the objects of one learner, by exercise id; an exercise without an answer is "not attempted".

    Raises ValueError for an id that no chapter's check has; import the chapter's module first.
    """
    if unknown := set(answers) - set(EXERCISES):
        raise ValueError(
            f"no exercise {', '.join(sorted(unknown))}; there are {', '.join(EXERCISES) or 'none yet'}"
        )
    return {id: check(answers.get(id), seed) for id, check in EXERCISES.items()}


def _nothing() -> Mistake:
    return Mistake(
        "On some inputs your function returns nothing (None): every way through it needs a return."
    )


def _gradients(result: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a combination of all results, with the same random weights for everyone who returns those shapes."""
    if not leaves:
        return {}
    outputs = [
        t for t in ([result] if isinstance(result, Tensor) else result) if isinstance(t, Tensor)
    ]
    outputs = [t for t in outputs if t.requires_grad]
    if not outputs:
        raise Mistake("What you return has no gradient: return a tensor, and keep its graph.")
    generator = torch.Generator().manual_seed(len(outputs))
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
