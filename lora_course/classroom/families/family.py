"""A family of graded problems: one template, and the conventions that an instructor's seed draws.

The answer to a book exercise is public. A graded problem asks for something near it, with other conventions: another
rounding, another side of a mask, another block size. Each convention is a table from a choice to the sentence that states
it and the code that does it. So statement, stub, solution and check all come from one place and cannot disagree, and
nothing has to be kept secret but the seed.
"""

from __future__ import annotations

import itertools
import random
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_course.classroom.draws import Draw, case
from lora_course.classroom.judge import Exercise
from lora_course.classroom.plain import plain

Choices = dict[str, str]
"""For each convention the choice that was drawn: `{"power": "2", "rounding": "up"}`."""


@dataclass(frozen=True)
class Family:
    """One template of problems.

    statement: Markdown in which `{convention}` becomes the sentence of the choice.
    answer: source of the solution in which `$convention` becomes the code of the choice; its first function is the one
    that is graded, and its docstring is kept in the stub.
    conventions: `{convention: {choice: (sentence, code)}}`.
    book: the choices that the chapter and the package make or can be told to make, where these are among the choices. A
    drawn problem differs from them in at least two conventions.
    cases: arguments of the calls that a check makes, from a `Draw` and the choices; the first two are small, and show
    up with their results in the student's notebook.
    bugs: for a find-the-bug family `(right, wrong)` pieces of the answer; two of them are planted by the seed.
    degenerate: choices that go together to a problem in which a mistake makes no difference; they are not drawn.
    gradients, changes: arguments whose gradient is compared too; that are changed in place, and compared instead of a
    result.
    """

    id: str
    title: str
    points: int
    minutes: int
    statement: str
    answer: str
    conventions: Mapping[str, Mapping[str, tuple[str, str]]]
    book: Mapping[str, str | tuple[str, ...]]
    cases: Callable[[Draw, Choices], list[tuple]]
    bugs: tuple[tuple[str, str], ...] = ()
    degenerate: Mapping[str, str] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    tolerance: float = 1e-4
    setup: str = (
        "import math\n\nimport torch\nfrom torch import nn\nfrom torch.nn import functional as F"
    )
    compiled: dict[tuple, Callable] = field(default_factory=dict, compare=False, repr=False)

    @property
    def chapter(self) -> str:
        return self.id.split("-")[0]

    @property
    def name(self) -> str:
        """The function that a student writes."""
        return re.findall(r"def (\w+)", self.answer)[0]

    @property
    def kind(self) -> str:
        return "find the bug" if self.bugs else "implement"

    def variants(self) -> list[Choices]:
        """All that can be drawn: what differs from the chapter in two conventions or more."""
        rows = itertools.product(*self.conventions.values())
        every = [dict(zip(self.conventions, row, strict=True)) for row in rows]
        return [
            choice
            for choice in every
            if self.distance(choice) >= 2
            and not (self.degenerate and self.degenerate.items() <= choice.items())
        ]

    def distance(self, choice: Choices) -> int:
        """In how many conventions a choice differs from the chapter's."""
        return sum(value not in self.of_book(name) for name, value in choice.items())

    def of_book(self, name: str) -> tuple[str, ...]:
        """The chapter's choices of a convention, the usual one first."""
        found = self.book[name]
        return (found,) if isinstance(found, str) else found

    def draw(self, seed: str) -> Choices:
        return random.Random(f"{seed}/{self.id}").choice(self.variants())

    def neighbours(self, choice: Choices) -> dict[str, list[Choices]]:
        """For each convention what differs from `choice` in it alone."""
        return {
            name: [choice | {name: value} for value in table if value != choice[name]]
            for name, table in self.conventions.items()
        }

    def sentence(self, choice: Choices, name: str) -> str:
        return self.conventions[name][choice[name]][0]

    def state(self, choice: Choices) -> str:
        """The problem's text."""
        paragraphs = textwrap.dedent(self.statement).strip().split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        for name in self.conventions:
            text = text.replace(f"{{{name}}}", self.sentence(choice, name))
        return text

    def solution(self, choice: Choices) -> str:
        """The right answer's source."""
        lines = []
        for line in textwrap.dedent(self.answer).strip().splitlines():
            for name in sorted(self.conventions, key=len, reverse=True):
                code = self.conventions[name][choice[name]][1]
                if line.strip() == f"${name}":  # a piece of several lines keeps the indentation
                    line = textwrap.indent(code, line[: len(line) - len(line.lstrip())])
                line = line.replace(f"${name}", code)
            lines.append(line)
        return "\n".join(lines) + "\n"

    def planted(self, seed: str, count: int = 2) -> list[tuple[str, str]]:
        """The mistakes that a seed plants, each in a place of its own."""
        order = list(self.bugs)
        random.Random(f"{seed}/{self.id}/bugs").shuffle(order)
        chosen: list[tuple[str, str]] = []
        for right, wrong in order:
            if not any(right in other or other in right for other, _ in chosen):
                chosen.append((right, wrong))
        return chosen[:count]

    def plant(self, source: str, bugs: list[tuple[str, str]]) -> str:
        for right, wrong in bugs:
            if source.count(right) != 1:
                raise ValueError(
                    f"{self.id}: {right!r} is there {source.count(right)} times, not once"
                )
            source = source.replace(right, wrong)
        return source

    def stub(self, choice: Choices, seed: str) -> str:
        """What the student gets: the function without its body, or with two mistakes."""
        if self.bugs:
            return self.plant(self.solution(choice), self.planted(seed))
        head = re.findall(r'\A(def [^\n]*\n    """.*?"""\n)', self.solution(choice), re.DOTALL)[0]
        return head + "    ...\n"

    def function(self, choice: Choices) -> Callable:
        """The solution as a function, compiled once."""
        key = tuple(choice.items())
        if key not in self.compiled:
            self.compiled[key] = self.build(self.solution(choice))
        return self.compiled[key]

    def exercise(self, choice: Choices, explain: bool = True) -> Exercise:
        """The check of a drawn problem. explain: a rule that a wrong answer misses is named."""
        mistakes = {
            f"All is right but one rule. Read it again: “{plain(self.sentence(choice, name))}”{' ' * i}": self.function(other)
            for name, others in self.neighbours(choice).items()
            for i, other in enumerate(others)
        } if explain else {}  # fmt: skip
        book = {name: self.of_book(name)[0] for name in choice}
        if explain and all(value in self.conventions[name] for name, value in book.items()):
            text = "This is the chapter's answer. The problem states other rules: compare them one by one."
            mistakes[text] = self.function(book)
        return Exercise(
            self.id,
            self.points,
            lambda draw: (case(*arguments) for arguments in self.cases(draw, choice)),
            self.function(choice),
            mistakes,
            gradients=self.gradients,
            changes=self.changes,
            tolerance=self.tolerance,
            sixteen=False,
        )

    def build(self, source: str) -> Callable[..., Any]:
        """The graded function of a source that this course wrote: never of a student's."""
        namespace: dict[str, Any] = {}
        exec(compile(f"{self.setup}\n\n{source}", self.id, "exec"), namespace)  # noqa: S102
        return namespace[self.name]
