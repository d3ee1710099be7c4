"""What `lora-course assign` writes: notebooks for students, and all that an instructor needs beside them.

Everything follows from the problems and the seed: written again, it is the same to the byte.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from lora_course.classroom.assignment import FILE, Assignment
from lora_course.classroom.draws import Draw
from lora_course.classroom.families import Choices, Family, of_chapter
from lora_course.classroom.handouts import readme, rubric
from lora_course.classroom.practice import literal, rounded
from lora_course.classroom.roster import Roster
from lora_course.classroom.submissions import KEY, file_of

CHAPTERS = {
    "0.1": ("0_1_lora", "LoRA", "the update $s\\,BA$, its scale $s$, its parameters, and merging"),
    "1.1": ("1_1_qlora", "QLoRA", "blocks, their constants, codebooks, and double quantisation"),
    "1.2": ("1_2_adalora", "AdaLoRA", "triplets, sensitivity and uncertainty, and the budget"),
    "2.1": ("2_1_experts", "Mixtures of adapters", "router, top-k gates, and the balance loss"),
    "2.2": ("2_2_progressive", "Progressive LoRA", "stages, the jagged schedule, and merge-and-restart"),
    "3.1": ("3_1_adaptive", "Adaptive rank", "the sensitivity of a pair, and how ranks are handed out"),
    "3.2": ("3_2_distillation", "Distillation", "temperature, KL, and the mixture of teachers"),
    "3.3": ("3_3_continual", "Continual learning", "the matrix R, reservoirs, and merging adapters"),
    "4.1": ("4_1_sparse", "Sparse LoRA", "gates, the proximal step, and masks"),
    "4.2": ("4_2_hierarchical", "Nested LoRA", "prefixes of a rank, and their weights"),
    "4.3": ("4_3_quantized", "Quantised adapters", "grids, straight-through gradients, and packing"),
    "4.4": ("4_4_fused", "Fused LoRA", "the backward pass by hand, and batches of adapters"),
    "5.1": ("5_1_comparison", "Comparison", "paired differences, the front, and equal budgets"),
}  # fmt: skip
"""File, short title, and what the problems need, of each chapter."""

WRITTEN = ("student", "solutions", "rubric.md", "gradescope.zip", "otter")
"""What an assignment's folder holds beside the assignment."""


def assign(
    chapters: Sequence[str],
    seed: str,
    out: Path,
    name: str = "",
    problems: Sequence[str] = (),
    roster: Path | None = None,
) -> Assignment:
    """Writes an assignment of all families of the chapters, or of `problems` among them, into a folder.

    roster: gives each student of the table a notebook with problems of their own.
    Raises ValueError for a chapter without problems, a seed without content, a name that no file can have, or a folder that
    holds another assignment or files that would be written over.
    """
    if not seed.strip():
        raise ValueError("--seed is empty: give a phrase that only you know.")
    families = [family for chapter in dict.fromkeys(chapters) for family in of_chapter(chapter)]
    ids = [family.id for family in families]
    if unknown := [id for id in problems if id not in ids]:
        raise ValueError(f"no problem {', '.join(unknown)} in these chapters; there are {', '.join(ids)}.")  # fmt: skip
    made = Assignment(
        name or out.resolve().name,
        seed,
        tuple(id for id in ids if not problems or id in problems),
        per_student=roster is not None,
    )
    if Path(made.name).name != made.name:
        raise ValueError(f"{made.name!r} can't name files: give a --name without slashes.")
    if (out / FILE).exists():
        if Assignment.load(out) != made:
            raise ValueError(
                f"{out} holds another assignment: a new seed or other problems would change what students have. Take another folder."
            )
    elif there := [name for name in WRITTEN if (out / name).exists()]:
        raise ValueError(
            f"{out} holds {', '.join(there)}, which would be written over: take another folder."
        )
    students = list(Roster.read(roster).students()) if roster else [None]
    out.mkdir(parents=True, exist_ok=True)
    made.save(out)
    for folder in ("student", "solutions"):
        (out / folder).mkdir(exist_ok=True)
    for student in students:
        stem = f"{made.name}-{file_of(student)}" if student else made.name
        notebook = student_notebook(made, student)
        write_notebook(out / "student" / f"{stem}.ipynb", notebook)
        write_notebook(out / "solutions" / f"{stem}-solutions.ipynb", solution_notebook(made, student))  # fmt: skip
    (out / "student" / "README.md").write_text(readme(made), encoding="utf-8")
    (out / "rubric.md").write_text(rubric(made), encoding="utf-8")
    from lora_course.classroom.gradescope import write_zip
    from lora_course.classroom.otter import write_source

    write_zip(out / "gradescope.zip", made)
    if roster is None:
        write_source(out / "otter", made)
    return made


def repository() -> str:
    """The address in the package's metadata."""
    urls = metadata("lora-course").get_all("Project-URL") or []
    return next(url.split(", ", 1)[1] for url in urls if url.startswith("Repository"))


def markdown(id: str, text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": id, "metadata": {}, "source": text.strip()}


def code(id: str, source: str, problem: str = "", role: str = "setup") -> dict[str, Any]:
    mark = {"role": role} | ({"problem": problem} if problem else {})
    return {
        "cell_type": "code", "execution_count": None, "id": id, "metadata": {KEY: mark}, "outputs": [],
        "source": source.strip(),
    }  # fmt: skip


def write_notebook(path: Path, cells: list[dict[str, Any]]) -> None:
    notebook = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def student_notebook(assignment: Assignment, student: str | None = None) -> list[dict[str, Any]]:
    choices, seed = assignment.choices(student), assignment.seed_of(student)
    cells = opening(assignment)
    chapter = ""
    for family in assignment.families:
        choice, tag = choices[family.id], family.id.replace(".", "-")
        if family.chapter != chapter:
            chapter = family.chapter
            cells.append(markdown(f"chapter-{chapter.replace('.', '-')}", heading(chapter)))
        cells.append(markdown(f"{tag}-text", problem_text(family, choice)))
        cells.append(code(f"{tag}-answer", family.stub(choice, seed), family.id, "answer"))
        cells.append(code(f"{tag}-check", practice_cell(family, choice, seed), family.id, "check"))
    return cells


def solution_notebook(assignment: Assignment, student: str | None = None) -> list[dict[str, Any]]:
    """The student's notebook with its answers, and which choice each rule is."""
    choices = assignment.choices(student)
    cells = student_notebook(assignment, student)
    for cell in cells:
        mark = cell["metadata"].get(KEY, {})
        if mark.get("role") == "answer":
            cell["source"] = choices_comment(choices[mark["problem"]])
            cell["source"] += find_source(assignment, mark["problem"], choices)
    return cells


def choices_comment(choice: Choices) -> str:
    return "# drawn: " + ", ".join(f"{name} = {value}" for name, value in choice.items()) + "\n"


def find_source(assignment: Assignment, id: str, choices: dict[str, Choices]) -> str:
    family = next(family for family in assignment.families if family.id == id)
    return family.solution(choices[id]).strip()


def heading(chapter: str) -> str:
    file, title, needs = CHAPTERS[chapter]
    link = f"{repository()}/blob/main/notebooks/{file}.ipynb"
    return f"## Chapter {chapter}, {title}\n\nYou need from [the chapter]({link}): {needs}."


def problem_text(family: Family, choice: Choices) -> str:
    head = (
        f"### {family.id}: {family.title} ({family.points} points, about {family.minutes} minutes)"
    )
    return f"{head}\n\n{family.state(choice)}"


def examples(family: Family, choice: Choices, seed: str) -> list[tuple[dict[str, Any], Any]]:
    """The first two cases with numbers that can be printed, and what comes out."""
    right = family.function(choice)
    names = list(inspect.signature(right).parameters)
    made = []
    for case in family.cases(Draw(int(seed[:12], 16)), choice)[:2]:
        arguments = dict(zip(names, rounded(case), strict=False))
        made.append((arguments, expected(family, right, arguments)))
    return made


def expected(family: Family, right: Callable, arguments: dict[str, Any]) -> Any:
    """What a call returns, or what becomes of the arguments that it changes. Those given here stay as they are."""
    given = copy.deepcopy(arguments)
    result = right(**given)
    return {name: given[name] for name in family.changes} if family.changes else result


def practice_cell(family: Family, choice: Choices, seed: str) -> str:
    rows = [
        f"    ({literal(arguments)},\n     {literal(result)}),"
        for arguments, result in examples(family, choice, seed)
    ]
    changes = f", changes={list(family.changes)}" if family.changes else ""
    return "\n".join([f"practice({family.name}, [", *rows, f"]{changes})"])


def opening(assignment: Assignment) -> list[dict[str, Any]]:
    text = f"""
# {assignment.name}

{len(assignment.problems)} problems, {assignment.points} points. The rules of each problem are its own, and often not the chapter's: read every sentence.

- Write each answer into its cell. Keep the function's name and its arguments, and leave arguments as you got them unless the text says otherwise.
- Cells of your own are welcome. When graded, only the answer cells run, and those definitions of yours that they use.
- The examples under an answer show the rules at work. Grading uses other inputs.
"""
    address = repository()
    setup = f"""
import os
import sys

if "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
    %pip install -q "lora-course @ git+{address}"

{assignment.families[0].setup}

from lora_course.classroom.practice import practice
"""
    return [markdown("title", text), code("setup", setup)]
