"""Writes notebooks/*.ipynb from notebooks/*.md, the one direction in which the pairs are kept in step, and the chapters' forms.

python -m tools.pairs           write them
python -m tools.pairs --check   say which differ; exit 1 if any does
"""

import hashlib
from collections import Counter
from pathlib import Path

import jupytext
import nbformat

from tools import chapters, crosslinks, facts

ROOT = Path(__file__).resolve().parent.parent
FOLDED = {"hide-input", "hide-cell"}


def notebook_text(chapter: Path) -> str:
    """The .ipynb of a chapter, without outputs; the same text on every call and every machine.

    Cell ids come from the cells' text, so that a small edit makes a small diff. What the book folds is folded on Colab (`cellView`) and
    in JupyterLab (`source_hidden`) too. Links between pages lead to the published book, since beside a notebook on Colab there is none;
    while none is published they lead to the sources beside the notebook.
    """
    known = facts.read()
    home = known.book if known.published else None
    notebook = jupytext.read(chapter)
    notebook.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,md:myst"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = crosslinks.for_notebook(cell.source, chapter.stem, home)
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        cell.id = digest if not seen[digest] else f"{digest}-{seen[digest]}"
        seen[digest] += 1
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if FOLDED & set(cell.metadata.get("tags", [])):
                cell.metadata["cellView"] = "form"
                cell.metadata["jupyter"] = {"source_hidden": True}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return nbformat.writes(notebook) + "\n"


def stale_pairs(root: Path = ROOT) -> dict[Path, str]:
    """The notebooks that don't say what their chapter says, with the text they should have."""
    wanted = {
        path.with_suffix(".ipynb"): notebook_text(path)
        for path in sorted((root / "notebooks").glob("*.md"))
    }
    return {
        path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text
    }


def stale_forms(root: Path = ROOT) -> dict[Path, str]:
    """data/forms.json with the text that it should have, where it has another."""
    path, text = root / "lora_course" / "data" / "forms.json", chapters.forms(root)
    return {} if path.exists() and path.read_text() == text else {path: text}


if __name__ == "__main__":
    facts.write_or_check(
        lambda: stale_pairs() | stale_forms(),
        __doc__.splitlines()[0],
        "out of step with its .md; run `make notebooks`",
    )
