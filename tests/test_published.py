"""An executed chapter as the book shows it."""

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat import v4

from lora_course.lab.claims import BOOK
from tools import published
from tools.chapters import Result


def toy(folder: Path, parts: list) -> tuple[Path, Result]:
    """A chapter of these parts that ran, and a glossary of one word."""
    (folder / "book").mkdir()
    (folder / "book" / "glossary.md").write_text(
        ":::{glossary}\nrouter (路由器)\n  It routes.\n:::\n"
    )
    nbformat.write(v4.new_notebook(cells=parts), folder / "9_9_toy.ipynb")
    return folder, Result("9_9_toy", folder, 1.0, fresh=True)


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, Result]:
    """A chapter that ran: an exercise, a folded figure, a table with an empty corner, progress on stderr."""
    table = f'<table><tr><th></th></tr></table><a href="{BOOK}/book/ledger.html#claim-9-9-a">a</a>'
    outputs = [
        v4.new_output("stream", name="stderr", text="100%"),
        v4.new_output("display_data", data={"text/html": table}),
    ]
    cells = [
        v4.new_markdown_cell("A router, see [0.1](0_1_lora.md)."),
        v4.new_markdown_cell("**Exercise 9.9-a: why** (easy). Say why."),
        v4.new_code_cell("lab.show(fig, 'x')", outputs=outputs, metadata={"tags": ["hide-input", "skip-execution"]}),
        v4.new_code_cell("# @title Solution", metadata={"tags": ["solution", "hide-cell"]}),
        v4.new_code_cell("1 + 1"),
        v4.new_code_cell("# @title the table of costs\n2", metadata={"tags": ["hide-cell"]}),
    ]  # fmt: skip
    return toy(tmp_path, cells)


def cells(project: tuple[Path, Result]) -> list[dict]:
    root, result = project
    return json.loads(published.notebook(result, root, {"9_9_toy"}))["cells"]


def test_links_terms_and_anchors_are_set(project) -> None:
    first, second, *_ = ("".join(cell["source"]) for cell in cells(project))
    assert 'href="../book/glossary.html#term-router">router</a>' in first
    assert f"[0.1]({BOOK}/notebooks/0_1_lora.html)" in first  # not in this build
    assert second.startswith('<span id="exercise-9-9-a"></span>**Exercise 9.9-a')


def test_folds_say_what_is_in_them(project) -> None:
    _, _, figure, solution, plain, table = cells(project)
    assert figure["metadata"]["mystnb"]["code_prompt_show"] == "Show the code of the figure"
    assert solution["metadata"]["mystnb"]["code_prompt_hide"] == "Hide the solution"
    assert "mystnb" not in plain["metadata"]
    assert table["metadata"]["mystnb"]["code_prompt_show"] == "Show the table of costs"


def test_what_fails_is_a_defect_in_the_sketch_and_a_check_under_check_it(tmp_path: Path) -> None:
    parts = [v4.new_markdown_cell("# 9.9 A toy"), v4.new_markdown_cell("Text.")]
    for heading in ("## The sketch, mended", "## Check it", "### Twice", "## Train it"):
        parts.append(v4.new_markdown_cell(f"{heading}\n\nText."))
        parts.append(v4.new_code_cell("fails(merge)", metadata={"tags": ["hide-cell"]}))
    found = cells(toy(tmp_path, parts))
    names = [
        c["metadata"]["mystnb"]["code_prompt_show"] for c in found if "mystnb" in c["metadata"]
    ]
    assert names == ["Show the defect", "Show the checks", "Show the checks", "Show the defect"]


def test_outputs_are_fit_for_a_page(project) -> None:
    figure = cells(project)[2]
    assert figure["metadata"]["tags"] == ["hide-input"]
    (output,) = figure["outputs"]  # progress bars are gone
    page = "".join(output["data"]["text/html"])
    assert "<th></th>" not in page and "<td></td>" in page
    assert 'href="../book/ledger.html#claim-9-9-a"' in page


def test_a_link_that_a_cell_prints_stays_within_the_book(tmp_path: Path) -> None:
    said = f"**See [the recipe]({BOOK}/notebooks/0_1_lora.html#use-it)** and [a paper](https://arxiv.org/abs/1)."
    output = v4.new_output("display_data", data={"text/markdown": said})
    parts = [
        v4.new_markdown_cell("# 9.9 A toy"),
        v4.new_markdown_cell("Text."),
        v4.new_code_cell("say()", outputs=[output]),
    ]
    (shown,) = cells(toy(tmp_path, parts))[2]["outputs"]
    assert "".join(shown["data"]["text/markdown"]) == (
        '**See <a href="../notebooks/0_1_lora.html#use-it">the recipe</a>** and [a paper](https://arxiv.org/abs/1).'
    )


def test_what_is_set_up_before_the_first_text_is_one_fold(tmp_path: Path) -> None:
    hidden = {"tags": ["hide-input"]}
    figure = v4.new_output("display_data", data={"text/html": "<figure></figure>"})
    parts = [
        v4.new_markdown_cell("# 9.9 A toy"),
        v4.new_code_cell("# %pip install", outputs=[v4.new_output("stream", text="ready\n")], metadata=hidden),
        v4.new_code_cell("import lab", outputs=[v4.new_output("stream", text="cpu\n")], metadata=hidden),
        v4.new_code_cell("lab.show(fig, 'x')", outputs=[figure], metadata=hidden),
        v4.new_markdown_cell("After this chapter …"),
        v4.new_code_cell("y = 1", outputs=[], metadata=hidden),
    ]  # fmt: skip
    _, start, picture, _, later = cells(toy(tmp_path, parts))
    assert "".join(start["source"]) == "# %pip install\n\nimport lab"
    assert [out["text"] for out in start["outputs"]] == [["ready\n"], ["cpu\n"]]
    assert start["metadata"]["tags"] == ["hide-cell"]
    assert picture["metadata"]["tags"] == later["metadata"]["tags"] == ["hide-input"]


def test_folded_cells_that_show_nothing_are_one_fold_with_the_next(tmp_path: Path) -> None:
    hidden, said = {"tags": ["hide-input"]}, [v4.new_output("stream", text="1\n")]
    parts = [
        v4.new_markdown_cell("# 9.9 A toy"),
        v4.new_markdown_cell("Text."),
        v4.new_code_cell("x = 1", metadata=hidden),
        v4.new_code_cell("claims.add('9.9-a')", metadata=hidden),
        v4.new_code_cell("print(x)", outputs=said, metadata=hidden),
        v4.new_code_cell("print(x + 1)", outputs=said, metadata=hidden),
        v4.new_code_cell("y = 2"),
    ]  # fmt: skip
    found = cells(toy(tmp_path, parts))
    sources = ["".join(cell["source"]) for cell in found]
    assert sources[2:] == ["x = 1\n\nclaims.add('9.9-a')\n\nprint(x)", "print(x + 1)", "y = 2"]
    assert found[2]["metadata"]["mystnb"]["code_prompt_show"] == "Show how the claims are checked"


def test_the_name_of_a_tables_rows_stands_in_its_corner() -> None:
    frame = pd.DataFrame({"mean": [1], "most": [2]}, index=["a"]).rename_axis("bits a byte")
    page = published.page_html(frame.to_html())
    head = re.findall(r"<t[hd]>([^<]*)", page.split("</thead>")[0])
    assert head == ["bits a byte", "mean", "most"] and page.count("<tr") == 2
    plain = published.page_html(frame.rename_axis(None).to_html())
    assert re.findall(r"<t[hd]>([^<]*)", plain.split("</thead>")[0]) == ["", "mean", "most"]
