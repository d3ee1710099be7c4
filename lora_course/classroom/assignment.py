"""An assignment: which problems, worth how much, and the seed that draws them. The file is the instructor's alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_course.classroom.families import Choices, Family, find

FILE = "assignment.json"
FORMAT = 1


@dataclass(frozen=True)
class Assignment:
    """per_student: each student's problems are drawn from the seed and the student's id together."""

    name: str
    seed: str
    problems: tuple[str, ...]
    per_student: bool = False
    format: int = FORMAT

    @property
    def families(self) -> list[Family]:
        return [find(id) for id in self.problems]

    @property
    def points(self) -> int:
        return sum(family.points for family in self.families)

    def seed_of(self, student: str | None = None) -> str:
        """What draws a student's problems: not to be told from the seed, nor the seed from it."""
        text = f"{self.seed}/{student}" if self.per_student else self.seed
        return hashlib.sha256(text.encode()).hexdigest()

    def choices(self, student: str | None = None) -> dict[str, Choices]:
        return {family.id: family.draw(self.seed_of(student)) for family in self.families}

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Assignment:
        """Raises ValueError where the folder holds no assignment of this format."""
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {FILE}: give the folder that `assign` wrote.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            made = cls(**values | {"problems": tuple(values["problems"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no assignment: {error}") from None
        if made.format != FORMAT:
            raise ValueError(f"{path} has format {made.format}; this course reads {FORMAT}.")
        made.families  # noqa: B018  raises for a family that this version doesn't have
        return made
