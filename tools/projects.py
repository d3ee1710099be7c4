"""The page of the open projects: book/_data/projects.yml, its numbers filled in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_course import experiments
from lora_course.lab import study
from tools.chapters import Result, title
from tools.project_numbers import NUMBERS

LINES = ("question", "measurement", "evidence", "conclusion")  # of the rubric, 0 to 3 points each
MOST = 3
SAMPLES = ("good", "middling")


def projects(root: Path) -> list[dict[str, Any]]:
    """The projects as written, with the number of their chapter as `number`."""
    found = yaml.safe_load((root / "book" / "_data" / "projects.yml").read_text())
    return [project | {"number": ".".join(project["chapter"].split("_")[:2])} for project in found]


def filled(text: str, numbers: Mapping[str, Any]) -> str:
    """A text with its {names} replaced. Braces of formulas have to be doubled."""
    return text.format_map(numbers)


def anchor(number: str) -> str:
    return f"project-{number.replace('.', '-')}"


def graded(points: Mapping[str, Sequence[Any]]) -> str:
    """The line under a sample answer: its sum, then each line of the rubric with points and reason."""
    total = sum(given for given, _ in points.values())
    reasons = "; ".join(f"{line} {given}, {why}" for line, (given, why) in points.items())
    return f"*Graded {total} of {MOST * len(points)}*: {reasons}."


def source(number: str) -> str:
    """The sentences that name a project's record, and say when it was made and repeated; "" while there is none."""
    name = f"{number.replace('.', '_')}_project"
    if name not in experiments.NAMES or name in experiments.UNDER_WAY:
        return ""
    return f" Record `{name}`. {study.provenance(study.load_study(name))}"


def page(root: Path, results: list[Result]) -> str:
    """Every project: question, deliverable, two graded answers, and what was measured."""
    parts = []
    for project in projects(root):
        number, stem, numbers = project["number"], project["chapter"], NUMBERS[project["number"]]()
        chapter = title(root / "notebooks" / f"{stem}.md")
        parts += [
            f"({anchor(number)})=\n## {number} {project['name'].capitalize()}",
            f"Exercise {project['exercise']} of [{chapter}](../notebooks/{stem}.ipynb), {project['time']}. {project['question']}",
            f"**Hand in.** {project['hand_in']}",
        ]
        for place, sample in enumerate(SAMPLES, 1):
            answer = filled(project[sample]["answer"], numbers)
            parts += [f"> **Answer {place}.** {answer}", graded(project[sample]["points"])]
        parts.append(f"**What came out.** {filled(project['measured'], numbers)}{source(number)}")
    return "\n\n".join(parts)
