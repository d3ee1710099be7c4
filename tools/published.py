"""An executed chapter as the book shows it: links resolved, folds named, anchors set, no traces of the execution."""

import re
from pathlib import Path

import nbformat

from tools import crosslinks, facts
from tools.chapters import Result

BOOK = facts.read().book
SAID = re.compile(rf"\[([^\[\]]+)\]\({re.escape(BOOK)}/([^()]+)\)")  # a link that a cell prints
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
EXERCISE = re.compile(r"^\*\*Exercise (\d+\.\d+-\w+)", re.MULTILINE)
NAMED = re.compile(  # pandas gives the name of the rows a line of its own
    r"(<thead>\s*<tr[^>]*>\s*)<th></th>((?:\s*<th>[^<]*</th>)+\s*</tr>)\s*<tr>\s*<th>([^<]+)</th>(?:\s*<th></th>)+\s*</tr>"
)
DEFECT, CHECKS = "the defect", "the checks"  # under "Check it" what fails is what should
FOLDS = (  # what a folded cell holds → what its button says; the first that fits
    (r"%pip install", "the set-up, and what runs here"),
    (r"claims\.add\(", "how the claims are checked"),
    (r"\bfigure\(|moving\.show\(|lab\.show\(", "the code of the figure"),
    (r"fails\(", DEFECT),
)


def notebook(result: Result, root: Path, there: set[str]) -> str:
    """The .ipynb that the book is built from, and that it offers for download."""
    book = nbformat.read(result.notebook, as_version=4)
    prose = [cell for cell in book.cells if cell.cell_type == "markdown"]
    texts = [crosslinks.for_book(cell.source, result.stem, BOOK, there) for cell in prose]
    known = crosslinks.terms(root / "book" / "glossary.md")
    for cell, text in zip(prose, crosslinks.with_terms(texts, known), strict=True):
        cell.source = EXERCISE.sub(exercise, text)
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    book.cells = with_one_fold(with_one_set_up(book.cells))
    section = ""
    for cell in book.cells:
        if cell.cell_type == "code":
            code(cell, section)
        elif headings := SECTION.findall(cell.source):
            section = headings[-1]
    book.metadata.pop("jupytext", None)
    book.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    return nbformat.writes(book) + "\n"


def with_one_set_up(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The folded cells above the first heading that only print (installation, imports, what the machine can do) as one, its
    output folded too: a page begins with its picture."""
    head = next((i for i, c in enumerate(cells) if c.cell_type == "markdown" and i), len(cells))
    printing = [
        cell
        for cell in cells[:head]
        if "hide-input" in cell.metadata.get("tags", [])
        and all(output.output_type == "stream" for output in cell.outputs)
    ]
    if not printing:
        return cells
    first, *others = printing
    first.source = "\n\n".join(cell.source for cell in printing)
    first.outputs = [output for cell in printing for output in cell.outputs]
    first.metadata["tags"] = ["hide-cell"]
    return [cell for cell in cells if all(cell is not other for other in others)]


def with_one_fold(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """A folded cell that shows nothing, before another folded cell, as one with it: one line to pass over instead of two."""
    kept: list[nbformat.NotebookNode] = []
    for cell in cells:
        before = kept[-1] if kept else None
        if before and folded(before) and folded(cell) and not before.outputs:
            cell.source = f"{before.source}\n\n{cell.source}"
            kept.pop()
        kept.append(cell)
    return kept


def folded(cell: nbformat.NotebookNode) -> bool:
    return cell.cell_type == "code" and cell.metadata.get("tags") == ["hide-input"]


def exercise(match: re.Match[str]) -> str:
    """The anchor of an exercise before its name: #exercise-2-1-a for 2.1-a."""
    return f'<span id="exercise-{match[1].replace(".", "-")}"></span>{match[0]}'


def code(cell: nbformat.NotebookNode, section: str) -> None:
    """Name the fold, and make outputs fit for a page."""
    tags = cell.metadata.get("tags", [])
    if "skip-execution" in tags:
        cell.metadata["tags"] = [tag for tag in tags if tag != "skip-execution"]
    if name := fold(cell, section):
        cell.metadata["mystnb"] = {
            "code_prompt_show": f"Show {name}",
            "code_prompt_hide": f"Hide {name}",
        }
    for output in cell.outputs:
        if "text/html" in output.get("data", {}):
            output.data["text/html"] = page_html(output.data["text/html"])
        if "text/markdown" in output.get("data", {}):
            output.data["text/markdown"] = SAID.sub(
                r'<a href="../\2">\1</a>', output.data["text/markdown"]
            )


def fold(cell: nbformat.NotebookNode, section: str) -> str:
    """What a folded cell of a section holds, in words; empty where nothing is folded or nothing special is in it."""
    tags = cell.metadata.get("tags", [])
    if "solution" in tags:
        return "the solution"
    if not {"hide-input", "hide-cell"} & set(tags):
        return ""
    if titled := re.match(r"# @title (.+)", cell.source):
        return titled[1]
    name = next((name for pattern, name in FOLDS if re.search(pattern, cell.source)), "")
    return CHECKS if name == DEFECT and section == "Check it" else name


def page_html(text: str) -> str:
    """HTML of an output: links stay within the book; a table's corner says what its rows are, and is no empty header."""
    text = NAMED.sub(r"\1<th>\3</th>\2", text)
    return text.replace(f'href="{BOOK}/', 'href="../').replace("<th></th>", "<td></td>")
