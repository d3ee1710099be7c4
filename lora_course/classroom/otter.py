"""A source for otter-assign, for those who use otter-grader: `otter assign hw1.ipynb dist`.

Otter runs its tests in the student's own process, so what the judge of `lora-course grade` withstands, it doesn't. Its hidden tests are
fixed examples, drawn from the assignment's seed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_course.classroom.assign import (
    code,
    examples,
    expected,
    heading,
    markdown,
    opening,
    problem_text,
    write_notebook,
)
from lora_course.classroom.assignment import Assignment
from lora_course.classroom.draws import Draw
from lora_course.classroom.families import Choices, Family
from lora_course.classroom.judge import gradients_of
from lora_course.classroom.practice import literal, rounded

HIDDEN = 12
"""Hidden examples a problem."""


def raw(id: str, text: str) -> dict[str, Any]:
    return {"cell_type": "raw", "id": id, "metadata": {}, "source": text.strip()}


def write_source(folder: Path, assignment: Assignment) -> None:
    folder.mkdir(exist_ok=True)
    write_notebook(folder / f"{assignment.name}.ipynb", source(assignment))
    (folder / "requirements.txt").write_text("lora-course\n", encoding="utf-8")


def source(assignment: Assignment) -> list[dict[str, Any]]:
    """Cells in otter's notebook format, version 1."""
    config = f"# ASSIGNMENT CONFIG\nname: {assignment.name}\nrequirements: requirements.txt\nsolutions_pdf: false\nexport_cell: false"
    cells = [raw("config", config), *opening(assignment)]
    cells[-1]["source"] += (
        "\nfrom lora_course.classroom.comparison import difference as _difference"
    )
    cells[-1]["source"] += "\nfrom lora_course.classroom.judge import gradients_of as _gradients_of"
    seed, chapter = assignment.seed_of(), ""
    for family, choice in zip(assignment.families, assignment.choices().values(), strict=True):
        tag = family.id.replace(".", "-")
        if family.chapter != chapter:
            chapter = family.chapter
            cells.append(markdown(f"chapter-{chapter.replace('.', '-')}", heading(chapter)))
        name = f"q{family.id.replace('.', '').replace('-', '_')}"
        cells += [
            raw(f"{tag}-1", f"# BEGIN QUESTION\nname: {name}\npoints: {family.points}"),
            markdown(f"{tag}-text", problem_text(family, choice)),
            raw(f"{tag}-2", "# BEGIN SOLUTION"),
            code(f"{tag}-answer", answer(family, choice, seed), family.id, "answer"),
            raw(f"{tag}-3", "# END SOLUTION"),
            raw(f"{tag}-4", "# BEGIN TESTS"),
            *tests(family, choice, seed, tag),
            raw(f"{tag}-5", "# END TESTS"),
            raw(f"{tag}-6", "# END QUESTION"),
        ]
    return cells


def answer(family: Family, choice: Choices, seed: str) -> str:
    """Solution and stub in one cell: otter takes the one out, and the marks from the other."""
    stub = family.stub(choice, seed).strip()
    prompt = "\n".join(["", '""" # BEGIN PROMPT', stub.replace('"""', "'''"), '"""; # END PROMPT'])
    return "\n".join(
        ["# BEGIN SOLUTION NO PROMPT", family.solution(choice).strip(), "# END SOLUTION", prompt]
    )


def tests(family: Family, choice: Choices, seed: str, tag: str) -> list[dict[str, Any]]:
    """The two examples for all to see, and hidden ones; all points hang on the hidden ones."""
    right = family.function(choice)
    names = list(inspect.signature(right).parameters)
    cases = family.cases(Draw(int(seed[12:24], 16)), choice)[2 : 2 + HIDDEN]
    given = [dict(zip(names, rounded(case), strict=False)) for case in cases]
    shown = [test(family, right, arguments) for arguments, _ in examples(family, choice, seed)]
    hidden = [test(family, right, arguments) for arguments in given]
    settings = '""" # BEGIN TEST CONFIG\nhidden: {}\npoints: {}\n""" # END TEST CONFIG\n'
    return [
        code(f"{tag}-shown", settings.format("false", 0) + "\n".join(shown), role="check"),
        code(f"{tag}-hidden", settings.format("true", family.points) + "\n".join(hidden), role="check"),
    ]  # fmt: skip


def test(family: Family, right: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Calls the answer, and compares what it returns or changes, and the gradients that the family asks for."""
    result = expected(family, right, arguments)
    changed = f"{{name: given[name] for name in {list(family.changes)}}}"
    found = changed if family.changes else "found"
    lines = [f"given = {literal(arguments)}"]
    lines += [f"given[{name!r}].requires_grad_()" for name in family.gradients]
    lines.append(f"found = {family.name}(**given)")
    lines.append(f"assert _difference({found}, {literal(result)}, 2e-3) is None")
    if family.gradients:
        leaves = copy.deepcopy({name: arguments[name] for name in family.gradients})
        for leaf in leaves.values():
            leaf.requires_grad_()
        slopes = literal(gradients_of(right(**arguments | leaves), leaves))
        of = ", ".join(f"{name!r}: given[{name!r}]" for name in leaves)
        lines.append(f"assert _difference(_gradients_of(found, {{{of}}}), {slopes}, 2e-3) is None")
    return "\n".join(lines)
