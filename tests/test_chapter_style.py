"""The measurable part of a chapter's style."""

import re
from pathlib import Path

import pytest

from tests.toy_chapter import FRONT_MATTER
from tools import chapter_style, facts, launch
from tools.chapter_style import CELL, COLUMNS, ORDER, TIME, WORDS, Chapter
from tools.chapters import chapters
from tools.crosslinks import OPAQUE

CHAPTERS = [Chapter(path) for path in chapters()]
each = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.path.stem)


@each
def test_no_visible_line_is_wider_than_a_page(chapter: Chapter) -> None:
    assert not chapter.wide, f"wider than {COLUMNS} columns: {chapter.wide}"


@each
def test_a_visible_cell_is_one_thought(chapter: Chapter) -> None:
    assert not chapter.long, f"cells of more than {CELL} lines begin with: {chapter.long}"


@each
def test_claims_are_checked_in_folded_cells(chapter: Chapter) -> None:
    flow = [line for lines in chapter.visible for line in lines if "claims.add(" in line]
    assert not flow, "fold the cells that check claims (hide-input)"


@each
def test_whoever_pastes_a_recipe_is_told_how_to_install_the_course(chapter: Chapter) -> None:
    used = chapter.path.read_text().partition("\n## Use it\n")[2].partition("\n## ")[0]
    known = facts.read()
    assert launch.installs(known, f"pip install git+{known.url}") in used


@each
def test_a_chapter_is_read_in_one_sitting(chapter: Chapter) -> None:
    assert chapter.words <= WORDS


@each
def test_a_chapter_asks_before_it_shows_and_again_at_the_end(chapter: Chapter) -> None:
    """Three questions before a look, five of the self-test, and a bug to find."""
    before, after, bugs = chapter.recall
    assert before >= 3 and after >= 5 and bugs >= 1


@each
def test_sections_stand_in_the_order_of_every_chapter(chapter: Chapter) -> None:
    found = [name for heading in chapter.headings for name in ORDER if heading.startswith(name)]
    assert found == list(ORDER), f"{found} of {chapter.headings}"


@each
def test_every_claim_is_linked_from_the_sentence_that_states_it(chapter: Chapter) -> None:
    wanted = {f"claim-{id.replace('.', '-')}" for id in chapter.claims}
    assert wanted and wanted <= chapter.linked, f"no link to {sorted(wanted - chapter.linked)}"


@each
def test_figures_are_numbered_in_order_and_one_moves(chapter: Chapter) -> None:
    assert chapter.figures == list(range(1, len(chapter.figures) + 1))
    source = chapter.path.read_text()
    assert len(re.findall(r"\b(?:lab|moving)\.show\(", source)) == len(chapter.figures)
    assert "moving.show(" in source


@each
def test_a_figure_that_moves_is_in_sight(chapter: Chapter) -> None:
    """Drawn when it has a width: a folded output has none."""
    moving = [cell for cell in chapter.cells if "moving.show(" in cell.source]
    folded = [c for c in moving if {"hide-cell", "hide-output"} & set(c.metadata.get("tags", []))]
    assert moving and not folded


@each
def test_the_time_it_takes_is_the_rules(chapter: Chapter) -> None:
    stated = TIME.search(chapter.prose)
    assert stated, "state **Time**: N minutes to read, M for the exercises"
    assert (int(stated[1]), int(stated[2])) == chapter.minutes


@each
def test_what_is_said_and_shown_as_code_is_not_taken_for_something_else(chapter: Chapter) -> None:
    """`say` shows CommonMark, in which a dollar is a dollar; code in prose that is not fenced would get links to terms."""
    said = [c.source for c in chapter.cells if c.cell_type == "code" and "say(" in c.source]
    assert not [line for source in said for line in source.splitlines() if "$" in line]
    assert not re.findall(r"\]\(\w+\.md", "".join(said)), "what a cell says has no links to pages"
    assert not re.findall(r"\n\n    \S.*", OPAQUE.sub("", chapter.prose))


TOY = (
    FRONT_MATTER
    + """# 9.9 A toy

One two `three four` $five$ [six](#claim-9-9-a).

```{code-cell} ipython3
x = 1

y = 2
```

```{code-cell} ipython3
:tags: [hide-input]

claims.add(
    "9.9-a", "s", "own", "e", {"x": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}, "mean(x) > 2 and mean(x) < 100"
)
lab.show(fig, "x", number="9.9-1")
```

## Exercises

**Exercise 9.9-a: one** (easy, 5 minutes). Do it.

**Exercise 9.9-b: two** (hard, 20 minutes). Do it.
"""
)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "9_9_toy.md"
    path.write_text(TOY)
    return path


def test_what_is_measured_is_what_a_reader_sees(toy: Path) -> None:
    chapter = Chapter(toy)
    assert chapter.visible == [["x = 1", "y = 2"]] and not chapter.wide and not chapter.long
    assert chapter.claims == {"9.9-a"} and chapter.linked == {"claim-9-9-a"}
    assert chapter.figures == [1] and chapter.headings == ["Exercises"]
    assert chapter.words == 8 and chapter.minutes == (5, 25)


def test_wide_lines_long_cells_and_long_chapters_are_found(toy: Path) -> None:
    cell = "\n".join(["z = 3"] * CELL)
    source = TOY.replace("y = 2", f"{cell}\n{'w' * (COLUMNS + 1)}")
    recipe = f"```python\n{'r' * COLUMNS}\n{'r' * (COLUMNS + 1)}\n```"
    more = f"{'word ' * WORDS}\n\n{recipe}\n\n## Exercises"
    toy.write_text(source.replace("## Exercises", more))
    chapter = Chapter(toy)
    assert chapter.wide == [letter * (COLUMNS + 1) for letter in "wr"]
    assert chapter.long == ["x = 1"]
    assert chapter.words > WORDS
    reading = chapter.words / chapter_style.WORDS_A_MINUTE
    assert reading < chapter.minutes[0] <= reading + 2 + 5
