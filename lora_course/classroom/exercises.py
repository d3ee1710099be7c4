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

import functools
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from lora_course.classroom.calls import Mistake
from lora_course.classroom.draws import Case, Draw, case
from lora_course.classroom.judge import Exercise, Result

__all__ = ["EXERCISES", "Draw", "Exercise", "Result", "case", "exercise", "grade", "mistake"]

Check = Callable[..., Result]

EXERCISES: dict[str, Check] = {}
"""Every exercise's check by id, in the order in which they were defined."""


def mistake(happened: bool, message: str, *values: Any) -> None:
    """Ends a check as wrong with `message.format(*values)` if `happened`."""
    if happened:
        raise Mistake(message.format(*values) if values else message)


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

        check.points, check.exercise = points, made  # type: ignore[attr-defined]  # a function with two labels
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
