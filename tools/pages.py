"""The generated parts of the book's pages: a line `<!-- generated: NAME -->` in book/*.md is replaced by what NAME makes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from benchmarks import report
from tools import pacing, projects, record_runs
from tools.chapters import Result, title
from tools.ledger import carried_over, ledger, on_other_seeds
from tools.limits import limits
from tools.playpage import tables as playpage

MARKER = re.compile(r"^<!-- generated: ([a-z ]+) -->$", re.MULTILINE)
ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})")


def fill(text: str, root: Path, results: list[Result]) -> str:
    """A page with its generated parts filled in."""

    def part(match: re.Match[str]) -> str:
        if match[1] not in PARTS:
            raise ValueError(
                f"<!-- generated: {match[1]} -->: unknown; there are {', '.join(sorted(PARTS))}"
            )
        return PARTS[match[1]](root, results)

    return MARKER.sub(part, text)


def data(root: Path, name: str) -> list[dict]:
    return yaml.safe_load((root / "book" / "_data" / name).read_text())


def sources(root: Path, results: list[Result]) -> dict[str, Path]:
    return {result.stem: root / "notebooks" / f"{result.stem}.md" for result in results}


def picture(root: Path, results: list[Result]) -> str:
    """The picture of what is ahead, inline so that it follows the theme's colours; chapters that exist are links."""
    namespace = "http://www.w3.org/2000/svg"
    ElementTree.register_namespace("", namespace)
    svg = ElementTree.parse(root / "book" / "_static" / "ahead.svg").getroot()
    there = {result.stem for result in results}
    for parent in list(svg.iter()):
        for index, child in enumerate(list(parent)):
            if child.get("class") == "system" and child.get("id") in there:
                link = ElementTree.Element(
                    f"{{{namespace}}}a",
                    {"href": f"../notebooks/{child.get('id')}.html", "class": "ready"},
                )
                parent.remove(child)
                link.append(child)
                parent.insert(index, link)
    text = re.sub(r"\n\s*", "\n", ElementTree.tostring(svg, encoding="unicode"))
    return f'```{{raw}} html\n<figure class="ahead">{text}</figure>\n```'


def chapter_list(root: Path, results: list[Result]) -> str:
    if not results:
        return "The first chapter is being written."
    lines = ["| chapter | runs in |", "|---|---|"]
    for result in results:
        source = root / "notebooks" / f"{result.stem}.md"
        lines.append(
            f"| [{title(source)}](../notebooks/{result.stem}.ipynb) | {seconds(result.seconds)} |"
        )
    return "\n".join(lines)


def run_times(root: Path, results: list[Result]) -> str:
    """Each chapter, how long it ran for this edition of the book, and in how many cells."""
    if not results:
        return "*No chapter yet.*"
    lines = ["| chapter | code cells | profile | run time |", "|---|---|---|---|"]
    for result in results:
        run = json.loads((result.folder / "run.json").read_text())
        source = root / "notebooks" / f"{result.stem}.md"
        lines.append(
            f"| [{title(source)}](../notebooks/{result.stem}.ipynb) | {run['cells']} | `{run['profile']}` | {seconds(run['seconds'])} |"
        )
    lines.append(f"| **all** | | | **{seconds(sum(result.seconds for result in results))}** |")
    return "\n".join(lines)


def seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


def coverage(root: Path, results: list[Result]) -> str:
    """Each heading of the notes → chapter, class and test, linked where they exist."""
    there = {result.stem for result in results}
    lines = ["| the notes | chapter | in code | tests |", "|---|---|---|---|"]
    for row in data(root, "coverage.yml"):
        stem = row["chapter"]
        chapter = (
            f"[{stem.replace('_', '.', 1).split('_')[0]} {row['title']}](../notebooks/{stem}.ipynb)"
            if stem in there
            else "to come"
        )
        code, tests = [], []
        for module, names in answers(row).items():
            if exists(root, module):
                link = f"[`lora_course.{module}`](api/{api_stem(module)}.md)"
                code.append(f"{link}: {', '.join(f'`{name}`' for name in names)}")
            for tested in (f"tests/test_{module}.py", f"tests/{module}/"):
                tests += [f"`{tested}`"] if (root / tested).exists() else []
        lines.append(
            f"| {row['heading']} <br> {row['english']} | {chapter} "
            f"| {'; '.join(code) or 'to come'} | {', '.join(tests) or 'to come'} |"
        )
    return "\n".join(lines)


def answers(row: dict[str, Any]) -> dict[str, list[str]]:
    """The names that answer a heading of the notes, by module."""
    return {row["module"]: row["names"], **row.get("beside", {})}


def exists(root: Path, module: str) -> bool:
    """Whether the package has the module, as a file or as a folder."""
    path = root / "lora_course" / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def bibliography(root: Path, results: list[Result]) -> str:
    """The papers that chapters link to, with the chapters that do."""
    cited: dict[str, list[str]] = {}
    for stem, path in sources(root, results).items():
        for number in dict.fromkeys(ARXIV.findall(path.read_text())):
            cited.setdefault(number, []).append(stem)
    lines = []
    for paper in data(root, "bibliography.yml"):
        if paper["arxiv"] not in cited:
            continue
        where = ", ".join(
            f"[{title(sources(root, results)[stem])}](../notebooks/{stem}.ipynb)"
            for stem in cited[paper["arxiv"]]
        )
        lines.append(
            f"- {paper['authors']} ({paper['year']}). *{paper['title']}*. "
            f"[arXiv:{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']}). In: {where}."
        )
    return "\n".join(lines) or "*No chapter yet.*"


def api_modules(root: Path) -> list[str]:
    """The modules that get an API page: the ground floor, the variants that exist, merging, the studies' core, and the lab."""
    first = ["lora", "injection", "states", "checkpoint", "export", "training"]
    rest = [module for row in data(root, "coverage.yml") for module in answers(row)]
    lab = sorted(f"lab.{path.stem}" for path in (root / "lora_course" / "lab").glob("[a-z]*.py"))
    core = [f"experiments.{name}" for name in ("study", "arms", "rates", "record", "comparison")]
    return [
        name
        for name in dict.fromkeys([*first, *rest, "merging", *core, *lab])
        if exists(root, name)
    ]


def api_stem(module: str) -> str:
    return f"{module.replace('.', '_')}_api"


def api_page(module: str) -> str:
    name = f"lora_course.{module}"
    return f"# `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"


def api_list(root: Path, results: list[Result]) -> str:
    return (
        "\n".join(
            f"- [`lora_course.{module}`]({api_stem(module)}.md)" for module in api_modules(root)
        )
        or "*None yet.*"
    )


def benchmarks(root: Path, results: list[Result]) -> str:
    """What `make bench` measured last."""
    return report.page(root / "lora_course" / "data" / "benchmarks.json")


PARTS: dict[str, Callable[[Path, list[Result]], str]] = {
    "picture": picture,
    "chapters": chapter_list,
    "run times": run_times,
    "recorded runs": lambda root, results: record_runs.table(root),
    "coverage": coverage,
    "bibliography": bibliography,
    "carried over": lambda root, results: carried_over(results),
    "other seeds": lambda root, results: on_other_seeds(results),
    "limits": lambda root, results: limits(results),
    "ledger": ledger,
    "api": api_list,
    "benchmarks": benchmarks,
    "play": playpage.tables,
    "play tasks": playpage.tasks,
    "order": pacing.order,
    "plans": pacing.plans,
    "projects": projects.page,
}
