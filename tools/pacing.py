"""What the instructors' guide says of order and minutes, read from the chapters' own lines."""

import re
from dataclasses import dataclass
from pathlib import Path

from tools.chapter_style import Chapter
from tools.chapters import Result, chapters, title

NEEDS = re.compile(r"\*\*You need\*\*(.*?)\*\*Time\*\*", re.DOTALL)
LINKED = re.compile(r"\]\((\d_\d_\w+)\.md")
PLANS = {  # a course → its sessions, each with its chapters
    "Workshop, one day": {"morning": ["0.1", "1.1"], "afternoon": ["2.1", "3.3"]},
    "Module, four weeks": {
        "week 1": ["0.1", "1.1"], "week 2": ["1.2"], "week 3": ["2.1"], "week 4": ["3.3", "4.3"],
    },
    "Course, ten weeks": {
        "week 1": ["0.1"], "week 2": ["1.1"], "week 3": ["1.2"], "week 4": ["2.1"], "week 5": ["2.2", "3.1"],
        "week 6": ["3.2"], "week 7": ["3.3"], "week 8": ["4.1", "4.2"], "week 9": ["4.3", "4.4"], "week 10": ["5.1"],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """A chapter as a teacher plans it. needs: stems that its "You need" names. Minutes as its source has them."""

    stem: str
    title: str
    needs: tuple[str, ...]
    reading: int
    exercises: int

    @property
    def number(self) -> str:
        return ".".join(self.stem.split("_")[:2])


def lessons(root: Path) -> list[Lesson]:
    found = []
    for path in chapters(root):
        chapter = Chapter(path)
        needed = NEEDS.search(chapter.prose)
        if needed is None:
            raise ValueError(
                f"{path.name} does not say '**You need** … **Time** …' in one paragraph"
            )
        stems = tuple(dict.fromkeys(LINKED.findall(needed[1])))
        found.append(Lesson(path.stem, title(path), stems, *chapter.minutes))
    return found


def order(root: Path, results: list[Result]) -> str:
    """A line a chapter: what it builds on, and its minutes."""
    lines = ["| chapter | builds on | to read | exercises with a check |", "|---|---|---|---|"]
    for lesson in lessons(root):
        needs = ", ".join(
            f"[{'.'.join(s.split('_')[:2])}](../notebooks/{s}.ipynb)" for s in lesson.needs
        )
        lines.append(
            f"| [{lesson.title}](../notebooks/{lesson.stem}.ipynb) | {needs or '–'} | {lesson.reading} min | {lesson.exercises} min |"
        )
    return "\n".join(lines)


def plans(root: Path, results: list[Result]) -> str:
    """Each course's sessions, with the minutes of their chapters."""
    by_number = {lesson.number: lesson for lesson in lessons(root)}
    parts = []
    for name, sessions in PLANS.items():
        lines = [
            f"**{name}.**",
            "",
            "| when | chapters | reading | exercises |",
            "|---|---|---|---|",
        ]
        taught = []
        for when, numbers in sessions.items():
            chosen = [by_number[number] for number in numbers]
            taught += chosen
            lines.append(
                f"| {when} | {', '.join(numbers)} | {sum(c.reading for c in chosen)} min | {sum(c.exercises for c in chosen)} min |"
            )
        total = sum(c.reading for c in taught), sum(c.exercises for c in taught)
        lines.append(f"| together | | {total[0] / 60:.1f} h | {total[1] / 60:.1f} h |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
