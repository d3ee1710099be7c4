"""Links in chapters: one Markdown source, right in the book, on Colab and on GitHub; terms linked at first use."""

import re
from pathlib import Path

import jupytext
import pytest

from lora_course.lab.claims import BOOK
from tools import crosslinks, pages
from tools.chapters import ROOT, chapters

HOME = "https://book.example/home"
THERE = {"0_1_lora", "2_1_experts"}


@pytest.mark.parametrize(
    ("source", "book", "elsewhere"),
    [
        ("[0.1](0_1_lora.md)", "[0.1](0_1_lora.ipynb)", f"[0.1]({HOME}/notebooks/0_1_lora.html)"),
        (
            "[0.1](0_1_lora.md#the-idea)",
            '<a class="reference internal" href="../notebooks/0_1_lora.html#the-idea">0.1</a>',
            f"[0.1]({HOME}/notebooks/0_1_lora.html#the-idea)",
        ),
        (
            "[1.2](1_2_adalora.md)",  # not in this build
            f"[1.2]({HOME}/notebooks/1_2_adalora.html)",
            f"[1.2]({HOME}/notebooks/1_2_adalora.html)",
        ),
        (
            "[`r`](../book/glossary.md#rank)",
            '<a class="reference internal" href="../book/glossary.html#term-rank">`r`</a>',
            f"[`r`]({HOME}/book/glossary.html#term-rank)",
        ),
        (
            "[ledger](../book/ledger.md)",
            "[ledger](../book/ledger.md)",
            f"[ledger]({HOME}/book/ledger.html)",
        ),
        (
            "[2.1-b](#claim-2-1-b)",
            '<a class="reference internal" href="#claim-2-1-b">2.1-b</a>',
            f"[2.1-b]({HOME}/notebooks/2_1_experts.html#claim-2-1-b)",
        ),
        (
            f"[it]({HOME}/_sources/notebooks/2_1_experts.ipynb)",
            '<a class="reference internal" href="../_sources/notebooks/2_1_experts.ipynb">it</a>',
            f"[it]({HOME}/_sources/notebooks/2_1_experts.ipynb)",
        ),
        *[
            (plain, plain, plain)
            for plain in (
                "[X-LoRA](https://arxiv.org/abs/2402.07148)",
                "`[a](0_1_lora.md)`",
                "```python\n[a](0_1_lora.md)\n```",
                "$A[0](x.md)$",
                "![picture](0_1_lora.md)",
            )
        ],
    ],
)
def test_a_link_is_right_wherever_the_chapter_is_read(source, book, elsewhere) -> None:
    assert crosslinks.for_book(source, "2_1_experts", HOME, THERE) == book
    assert crosslinks.for_notebook(source, "2_1_experts", HOME) == elsewhere


@pytest.mark.parametrize(
    ("source", "beside"),
    [
        ("[the layer](0_1_lora.md#the-idea)", "[the layer](0_1_lora.md#the-idea)"),
        ("[router](../book/glossary.md#router)", "[router](../book/glossary.md#router)"),
        ("[export_peft](../book/api/export_api.md)", "[export_peft](../book/api/index.md)"),
        ("[X-LoRA](https://arxiv.org/abs/2402.07148)", "[X-LoRA](https://arxiv.org/abs/2402.07148)"),
    ],
)  # fmt: skip
def test_before_a_book_is_published_links_lead_to_sources_that_are_there(source, beside) -> None:
    assert crosslinks.for_notebook(source, "2_1_experts", None) == beside
    path = re.search(r"\(([^()#]+)", beside)[1]
    assert "://" in path or (ROOT / "notebooks" / path).exists()


KNOWN = {"rank": "term-rank", "adaptive rank": "term-adaptive-rank", "router": "term-router", "layer": "term-layer"}  # fmt: skip


def term(words: str, anchor: str) -> str:
    return f'<a class="term" href="../book/glossary.html#{anchor}">{words}</a>'


@pytest.mark.parametrize(
    ("cells", "linked"),
    [
        (["A router. The router.", "Router"], [f"A {term('router', 'term-router')}. The router.", "Router"]),
        (["# Rank\n\nRanks grow"], [f"# Rank\n\n{term('Ranks', 'term-rank')} grow"]),
        (["an adaptive rank"], [f"an {term('adaptive rank', 'term-adaptive-rank')}"]),
        (["| rank |\n|---|\n| 8 |", "by rank"], ["| rank |\n|---|\n| 8 |", f"by {term('rank', 'term-rank')}"]),
        (["[the rank](x.md) `rank` $rank$ **Rank** frank rank-one"],) * 2,
        (["[it](../book/glossary.md#rank)", "a rank"],) * 2,  # its author has linked it
        (["a layer"],) * 2,  # an everyday word
    ],
)  # fmt: skip
def test_a_term_is_linked_at_its_first_use_in_running_text_and_nowhere_else(cells, linked) -> None:
    assert crosslinks.with_terms(cells, KNOWN) == linked


def test_terms_have_an_anchor_for_each_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "glossary.md").write_text(
        "# G\n\n:::{glossary}\nNF4 (4位NormalFloat)\n  Sixteen\n\nforward KL, reverse KL (正向KL散度)\n  Two\n:::\n"
    )
    found = crosslinks.terms(tmp_path / "glossary.md")
    assert set(found) == {"NF4", "forward KL", "reverse KL"}
    assert found["forward KL"] == found["reverse KL"]


def test_the_glossary_lists_the_chapters_that_use_a_term() -> None:
    page = "# Glossary\n\nText.\n\n:::{glossary}\nforward KL, reverse KL (正向KL散度)\n  Two.\n  Lines.\n\nlayer (层)\n  One.\n:::\n"
    prose = {"3_2_x": "By reverse KL.", "1_1_y": "`forward KL` a layer", "2_1_z": "# Forward KL"}
    assert crosslinks.with_uses(page, prose) == page.replace(
        "  Lines.", "  Lines.\n  In [3.2](../notebooks/3_2_x.ipynb)."
    )


def anchors(chapter: Path) -> set[str]:
    """What a link into a chapter may name: headings, exercises, figures and claims, as its source states them."""
    text = chapter.read_text()
    slug = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    dashed = {
        "exercise": re.findall(r"^\*\*Exercise (\d+\.\d+-\w+)", text, re.MULTILINE),
        "figure": re.findall(r'number="(\d+\.\d+-\d+)"', text),
        "claim": re.findall(r'["\'](\d+\.\d+-[a-z]+)["\']', text),
    }
    return slug | {f"{kind}-{id.replace('.', '-')}" for kind, ids in dashed.items() for id in ids}


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.stem)
def test_links_between_pages_lead_to_what_is_there(chapter: Path) -> None:
    api = {f"book/api/{pages.api_stem(module)}" for module in pages.api_modules(ROOT)}
    known = set(crosslinks.terms(ROOT / "book" / "glossary.md").values())
    for cell in jupytext.read(chapter).cells:
        if cell.cell_type != "markdown":
            continue
        plain = crosslinks.OPAQUE.sub("code", cell.source)  # a link may be all code
        for _, address in crosslinks.LINK.findall(plain):
            if "://" in address:
                assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", address), f"{address}: no https"
                continue
            page, anchor = crosslinks.page_of(address, chapter.stem)
            assert page in api or (ROOT / f"{page}.md").exists(), f"{chapter.name}: {address}"
            if anchor and page == "book/glossary":
                assert anchor in known, f"{chapter.name}: {address}: no such term"
            elif anchor and page.startswith("notebooks/"):
                assert anchor in anchors(ROOT / f"{page}.md"), f"{chapter.name}: {address}"


def test_the_book_is_at_the_address_that_the_project_states() -> None:
    assert f'Documentation = "{BOOK}"' in (ROOT / "pyproject.toml").read_text()
