"""One submission graded: the checks in this process, the student's code in its sandbox."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_course.classroom.assignment import Assignment
from lora_course.classroom.calls import Mistake, Unanswered
from lora_course.classroom.confinement import Kind, Limits
from lora_course.classroom.families import Choices, Family
from lora_course.classroom.remote import Remote
from lora_course.classroom.sandbox import Ended, Sandbox
from lora_course.classroom.submissions import (
    LONGEST,
    Entry,
    Unreadable,
    digest,
    find_answer,
    read_cells,
)


@dataclass
class Line:
    """One problem of one student."""

    status: str
    points: float
    message: str
    flags: list[str] = field(default_factory=list)
    answer: str = ""


@dataclass
class Record:
    """One student's result. reason: why nothing of it could be graded; "" where something could."""

    student: str
    file: str
    digest: str
    run: str
    reason: str = ""
    flags: list[str] = field(default_factory=list)
    problems: dict[str, Line] = field(default_factory=dict)

    @property
    def points(self) -> float:
        return sum(line.points for line in self.problems.values())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        lines = {id: Line(**line) for id, line in values["problems"].items()}
        return cls(**values | {"problems": lines})


class Boxes:
    """Sandboxes of one submission: one, and another where it was lost."""

    def __init__(self, kind: Kind, limits: Limits) -> None:
        self.kind, self.limits = kind, limits
        self.box: Sandbox | None = None

    def get(self) -> Sandbox:
        if self.box is None:
            self.box = Sandbox(self.kind, self.limits)
        return self.box

    def drop(self) -> None:
        if self.box is not None:
            self.box.close()
        self.box = None


def grade_submission(
    assignment: Assignment,
    student: str,
    entry: Entry,
    run: str,
    kind: Kind,
    limits: Limits,
    only: Iterable[str] = (),
    before: Record | None = None,
) -> Record:
    """Grades the problems of `only`, by default all; the others' lines are those of `before`, if it is of the same file.

    run: what draws this run's inputs. It never raises for what a student handed in.
    """
    record = Record(student, entry.name, digest(entry.path), run, flags=list(entry.flags))
    if before and before.digest != record.digest:
        before = None
    only = set(only) or set(assignment.problems)
    try:
        cells = read_cells(entry.path)
    except Unreadable as reason:
        record.reason, cells = str(reason), []
    choices = assignment.choices(student)
    boxes = Boxes(kind, limits)
    try:
        for family in assignment.families:
            if family.id not in only and before and family.id in before.problems:
                record.problems[family.id] = before.problems[family.id]
            elif record.reason:
                record.problems[family.id] = Line("failed", 0, record.reason)
            else:
                seed = hashlib.sha256(f"{run}/{student}/{family.id}".encode()).digest()
                number = int.from_bytes(seed[:6], "little")
                line = grade_problem(family, choices[family.id], cells, boxes, number)
                record.problems[family.id] = line
    finally:
        boxes.drop()
    return record


def grade_problem(
    family: Family, choice: Choices, cells: list[dict[str, Any]], boxes: Boxes, seed: int
) -> Line:
    found = find_answer(cells, family.id, family.name)
    line = Line("not attempted", 0, "", found.flags, found.answer or "")
    if found.answer is None:
        line.message = f"No cell defines {family.name}: was it deleted or renamed?"
        return line
    if len(found.answer) > LONGEST:
        text = f"The answer has {len(found.answer):,} characters, more than {LONGEST:,}: hand in the function alone."
        return Line("failed", 0, text, found.flags)
    opening = {
        "kind": "open", "name": family.name, "answer": found.answer, "own": found.own, "setup": family.setup,
    }  # fmt: skip
    remote = None
    try:
        remote = Remote(boxes.get(), opening, boxes.limits.seconds)
        if remote.trouble:
            line.status, line.message = "failed", f"{remote.trouble}."
        else:
            result = family.exercise(choice).judge(remote, seed)
            line.status, line.points, line.message = result.status, result.points, result.message
            if remote.ended:  # whatever the last call gave, the process didn't last
                line.status, line.points = "failed", 0
        if not remote.ended:
            remote.close()
    except Ended as ended:
        if remote is None:
            line.status, line.points, line.message = "failed", 0, str(ended)
    except (Mistake, Unanswered):  # an answer where none was asked for
        line.status, line.points, line.message = "failed", 0, "What it sends is no answer."
    except Exception as error:
        line.status, line.points = "failed", 0
        line.message = (
            f"The grader itself stopped here ({type(error).__name__}: {str(error)[:150]})."
        )
        line.flags.append("the grader stopped: look at this answer by hand")
    if remote is None or remote.ended:
        boxes.drop()
    return line
