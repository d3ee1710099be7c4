"""The generated parts of the book's pages, from a small project."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes
from docutils.utils import new_document

from tools import other_seeds, pages, sphinx_extension
from tools.chapters import ROOT, Result
from tools.ledger import carried_over
from tools.sphinx_extension import Search, escape, first_sentences, mark_chinese, render

CLAIM = {
    "id": "a",
    "statement": "NF4 beats | FP4",
    "source": "QLoRA",
    "expected": "less",
    "predicate": "mean(a) < mean(b)",
    "values": {"a": [1.0, 2.0]},
    "outcome": "a 1.5",
    "holds": True,
    "explanation": "",
}


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, list[Result]]:
    folder = tmp_path / "build" / "executed" / "1_1_qlora-0"
    (folder / "claims").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"cells": 7, "profile": "tiny", "seconds": 150.0}))
    (folder / "claims" / "1_1_qlora.json").write_text(
        json.dumps(
            {
                "chapter": "1_1_qlora",
                "profile": "tiny",
                "claims": [
                    CLAIM,
                    CLAIM
                    | {"id": "b", "holds": False, "explanation": "too small a model"}
                    | {"kind": "chosen", "evidence": "smol"},
                ],
            }
        )
    )
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "1_1_qlora.md").write_text(
        "# QLoRA\n\nSee [it](https://arxiv.org/abs/2305.14314).\n"
    )
    (tmp_path / "book" / "_data").mkdir(parents=True)
    (tmp_path / "book" / "_static").mkdir()
    (tmp_path / "book" / "_static" / "ahead.svg").write_text(
        (ROOT / "book" / "_static" / "ahead.svg").read_text()
    )
    (tmp_path / "book" / "_data" / "coverage.yml").write_text(
        (ROOT / "book" / "_data" / "coverage.yml").read_text()
    )
    (tmp_path / "book" / "_data" / "bibliography.yml").write_text(
        "- {arxiv: '2305.14314', authors: A, title: T, year: 2023}\n- {arxiv: '2303.10512', authors: A, title: U, year: 2023}\n"
    )
    return tmp_path, [Result("1_1_qlora", folder, 150.0, fresh=False)]


def test_the_ledger_has_a_line_a_claim_that_opens_with_anchor_and_classes_for_the_filter(
    project: tuple[Path, list[Result]],
) -> None:
    text = pages.ledger(*project)
    assert "1 of 2 hold" in text
    held, failed = text.split("::::{dropdown} ")[1:]
    assert held.startswith("a · ✓ holds · NF4 beats | FP4\n:name: claim-a\n")
    assert ":class-container: claim chapter-1-1 verdict-holds model-tiny" in held
    assert failed.startswith("b · ✗ not seen") and "verdict-fails model-smol" in failed
    assert "`mean(a) < mean(b)`" in held and "a: 1, 2" in held and "too small a model" in failed
    assert "chosen after seeing" in failed and "chosen after seeing" not in held
    assert 'href="../notebooks/1_1_qlora.html#claim-b"' in failed


def test_claims_on_the_chat_model_are_held_against_nanos(
    project: tuple[Path, list[Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, results = project
    monkeypatch.setattr(other_seeds, "verdicts", dict)
    assert "None of" in carried_over(results)
    path = results[0].folder / "claims" / "1_1_qlora.json"
    chapter = json.loads(path.read_text())
    chapter["claims"] += [CLAIM | {"id": id, "holds": holds} for id, holds in (
        ("1.1-b", True), ("1.1-s", True), ("1.2-a", True), ("1.2-s", False),
    )]  # fmt: skip
    path.write_text(json.dumps(chapter))
    text = carried_over(results)
    assert " 2 were stated" in text and ": 1 hold on both models, 0 on neither" in text
    assert "1 on one of the two: [1.2-s](#claim-1-2-s) (on nano [1.2-a](#claim-1-2-a))" in text
    again = {"1.1-b": {"held": True, "holds": False, "values": {}}}
    monkeypatch.setattr(
        other_seeds, "verdicts", lambda: again
    )  # what they refute is not held on nano
    assert ": 0 hold on both models, 0 on neither" in carried_over(results)


def test_run_times_name_each_chapter_and_add_up(project: tuple[Path, list[Result]]) -> None:
    text = pages.run_times(*project)
    assert (
        "| [QLoRA](../notebooks/1_1_qlora.ipynb) | 7 | `tiny` | 2.5 min |" in text
        and "**2.5 min**" in text
    )


def test_coverage_links_what_exists_only(project: tuple[Path, list[Result]]) -> None:
    rows = pages.coverage(*project).splitlines()
    assert len(rows) == 2 + 11
    assert "[1.1 QLoRA](../notebooks/1_1_qlora.ipynb)" in rows[2] and rows[3].count("to come") == 3


def test_the_bibliography_lists_cited_papers_with_their_chapters(
    project: tuple[Path, list[Result]],
) -> None:
    text = pages.bibliography(*project)
    assert "arXiv:2305.14314" in text and "In: [QLoRA]" in text and "2303.10512" not in text


def test_the_picture_links_the_chapters_that_exist(project: tuple[Path, list[Result]]) -> None:
    text = pages.picture(*project)
    assert text.count('class="ready"') == 1 and "../notebooks/1_1_qlora.html" in text
    assert text.count('class="system"') == 11


def test_an_unknown_generated_part_is_refused(project: tuple[Path, list[Result]]) -> None:
    assert pages.fill("<!-- generated: run times -->", *project).startswith("| chapter |")
    with pytest.raises(ValueError, match="recipes"):
        pages.fill("<!-- generated: recipes -->", *project)


@pytest.mark.parametrize(
    ("plain", "rst"),
    [
        ("a `list[int]` of", "a ``list[int]`` of"),
        ("several `A`s", "several ``A``\\ s"),
        ("|w·∇w| * 2", r"\|w·∇w\| \* 2"),
        ("field_ and field_name", r"field\_ and field_name"),
        ("already ``code``.", "already ``code``."),
        ("`|x|` stays", "``|x|`` stays"),
    ],
)
def test_docstrings_are_read_as_plain_text(plain: str, rst: str) -> None:
    assert escape(plain) == rst


def test_an_indented_block_of_a_docstring_stays_as_it_is_written() -> None:
    text = "One |x|.\n\n    y = *A* x\n    for a_ in b:\n        use(a_)\n\nThen `c`.\n\nArgs:\n    x: a *b*.\n\n    y: of x."
    assert render(text) == (
        "One \\|x\\|.\n\n::\n\n    y = *A* x\n    for a_ in b:\n        use(a_)\n\n\nThen ``c``.\n\n"
        "Args:\n    x: a \\*b\\*.\n\n    y: of x."
    )


def test_search_knows_the_parts_of_chinese_terms_and_english_as_before() -> None:
    search = Search({})
    assert {"持续学习", "持续", "续学", "学习", "continual"} <= set(
        search.split("continual 持续学习")
    )
    assert search.split("LoRA is low") == ["LoRA", "is", "low"]


def paragraph(*texts: str) -> nodes.document:
    document = new_document("page")
    for text in texts:
        document += nodes.paragraph("", "", nodes.Text(text))
    return document


def test_chinese_is_marked_for_screen_readers() -> None:
    page = paragraph("adapter (适配器) and LoRA")
    mark_chinese(None, page, "page")
    (marked,) = page.findall(nodes.inline)
    assert marked.astext() == "适配器" and marked["classes"] == ["language-zh"]
    assert page.astext() == "adapter (适配器) and LoRA"


@pytest.mark.parametrize("published", [True, False])
def test_a_page_states_its_address_once_something_is_there(published: bool, monkeypatch) -> None:
    known = replace(sphinx_extension.KNOWN, published=published)
    monkeypatch.setattr(sphinx_extension, "KNOWN", known)
    app = SimpleNamespace(config=SimpleNamespace(html_title="A course"))
    context: dict[str, str] = {"title": "A page"}
    sphinx_extension.describe(app, "book/intro", "page.html", context, paragraph("Words. " * 20))
    assert 'content="Words. Words.' in context["metatags"]
    assert (f'content="{known.book}/book/intro.html"' in context["metatags"]) == published


def test_a_description_is_the_first_paragraph_of_prose_cut_between_words() -> None:
    badges = "Open in Colab · Open in Kaggle · Executed notebook · Source, and much more of it here"
    text = "One adapter learns one thing well. " * 8
    page = paragraph(badges, text)
    page.children[1].insert(0, nodes.raw("", '<a class="term">', format="html"))
    described = first_sentences(page)
    assert described.startswith("One adapter learns") and described.endswith(" …")
    assert len(described) <= 162
