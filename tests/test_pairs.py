"""notebooks/*.ipynb say what notebooks/*.md say, and nothing else."""

from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from lora_course.lab.claims import BOOK
from tests.toy_chapter import TOY
from tools import facts, pairs
from tools.chapters import ROOT, chapters

SOLUTION = (
    TOY
    + "\n```{code-cell} ipython3\n:tags: [hide-input]\n\nplumbing = 1\n```\n"
    + "\n```{code-cell} ipython3\n:tags: [solution, hide-cell]\n\n#@title Solution\n1 + 1\n```\n"
    * 2
)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "9_9_toy.md").write_text(SOLUTION)
    return tmp_path


def test_pairs_are_in_step() -> None:
    stale = [path.name for path in pairs.stale_pairs()]
    assert not stale, f"run `make notebooks`: {stale} differ from their .md"


def test_forms_are_in_step_and_an_edit_of_code_is_seen(toy: Path) -> None:
    assert not pairs.stale_forms(), "run `make notebooks`: a chapter's code has changed"
    ((path, text),) = pairs.stale_forms(toy).items()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert not pairs.stale_forms(toy)
    source = toy / "notebooks" / "9_9_toy.md"
    source.write_text(SOLUTION.replace("plumbing = 1", "plumbing = 2"))
    assert path in pairs.stale_forms(toy)


def test_every_notebook_has_its_source() -> None:
    sources = {path.stem for path in chapters()}
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == sources


def test_the_notebook_is_valid_without_outputs_and_the_same_each_time(toy: Path) -> None:
    text = pairs.notebook_text(toy / "notebooks" / "9_9_toy.md")
    assert text == pairs.notebook_text(toy / "notebooks" / "9_9_toy.md")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert all(
        not cell.outputs and cell.execution_count is None
        for cell in notebook.cells
        if cell.cell_type == "code"
    )


def test_what_the_book_folds_is_folded_on_colab_and_in_jupyterlab(toy: Path) -> None:
    notebook = nbformat.reads(pairs.notebook_text(toy / "notebooks" / "9_9_toy.md"), as_version=4)
    plumbing = next(cell for cell in notebook.cells if cell.source == "plumbing = 1")
    for folded in (plumbing.metadata, notebook.cells[-1].metadata):
        assert folded["cellView"] == "form" and folded["jupyter"] == {"source_hidden": True}
    assert "cellView" not in notebook.cells[1].metadata


@pytest.mark.parametrize(
    ("published", "led"),
    [(True, f"{BOOK}/notebooks/0_1_lora.html#the-idea"), (False, "0_1_lora.md#the-idea")],
)
def test_links_between_pages_lead_to_the_book_from_colab_once_there_is_one(
    toy: Path, monkeypatch: pytest.MonkeyPatch, published: bool, led: str
) -> None:
    known = replace(facts.read(), published=published)
    monkeypatch.setattr(facts, "read", lambda: known)
    source = toy / "notebooks" / "9_9_toy.md"
    source.write_text(SOLUTION.replace("# A toy", "# A toy\n\n[0.1](0_1_lora.md#the-idea)"))
    notebook = nbformat.reads(pairs.notebook_text(source), as_version=4)
    assert f"[0.1]({led})" in notebook.cells[0].source


def test_an_edit_of_either_side_is_seen(toy: Path) -> None:
    source, notebook = toy / "notebooks" / "9_9_toy.md", toy / "notebooks" / "9_9_toy.ipynb"
    assert notebook in pairs.stale_pairs(toy)
    notebook.write_text(pairs.stale_pairs(toy)[notebook])
    assert not pairs.stale_pairs(toy)
    source.write_text(SOLUTION.replace("A toy", "Another"))
    assert notebook in pairs.stale_pairs(toy)
    source.write_text(SOLUTION)
    notebook.write_text(notebook.read_text().replace("A toy", "Another"))
    assert notebook in pairs.stale_pairs(toy)
