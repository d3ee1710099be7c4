"""Links in chapters: plain Markdown in the source, which the book resolves and which lead to the book from anywhere else.

    [the layer](0_1_lora.md#the-idea)      another chapter, or a place in it
    [router](../book/glossary.md#router)   a page of the book; in the glossary, a term
    [claim 2.1-b](#claim-2-1-b)            on the same page: #claim-…, #exercise-…, #figure-…, a heading

Terms of the glossary are linked where a chapter first uses them, if its author has not done so.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from sphinx.util.nodes import _make_id

LINK = re.compile(r"(?<!!)\[((?:[^\[\]\n]|\[[^\[\]\n]*\])+)\]\(([^()\s]+)\)")
# What no rule here may read into: fences, code, mathematics, comments.
OPAQUE = re.compile(
    r"^```.*?^```|<!--.*?-->|``.+?``|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$", re.MULTILINE | re.DOTALL
)
# Where no term is linked: headings, tables, links, addresses, HTML, bold names such as "**Exercise …**".
QUIET = re.compile(r"^#.*$|^\|.*$|<a\b.*?</a>|\[[^\]]*\]\([^)]*\)|<[^>]*>|https?://\S+|\*\*[^*]+\*\*", re.MULTILINE)  # fmt: skip
COMMON = {"layer", "weight", "task", "gradient", "stage", "memory", "learning rate", "gate", "cut"}


def outside(text: str, hidden: re.Pattern, change: Callable[[str], str]) -> str:
    """`change` applied to a text in which what matches `hidden` is out of its reach."""
    held: list[str] = []
    mark = "\x01" if "\x00" in text else "\x00"  # two deep: OPAQUE, then QUIET in what is left

    def put_by(match: re.Match[str]) -> str:
        held.append(match[0])
        return f"{mark}{len(held) - 1}{mark}"

    text = change(hidden.sub(put_by, text))
    return re.sub(f"{mark}(\\d+){mark}", lambda match: held[int(match[1])], text)


def rewritten(text: str, target: Callable[[str, str], str]) -> str:
    """A Markdown text with each link replaced by target(its text, its address)."""
    return outside(
        text, OPAQUE, lambda plain: LINK.sub(lambda found: target(found[1], found[2]), plain)
    )


def page_of(address: str, stem: str) -> tuple[str, str]:
    """Where a link of the chapter `stem` leads: page from the book's root, without its ending, and anchor."""
    path, _, anchor = address.partition("#")
    page = posixpath.normpath(posixpath.join("notebooks", path)) if path else f"notebooks/{stem}"
    page = re.sub(r"\.(md|ipynb)$", "", page)
    if page == "book/glossary" and anchor and not anchor.startswith("term-"):
        anchor = f"term-{anchor}"
    return page, anchor


def for_notebook(text: str, stem: str, book: str | None) -> str:
    """A cell as Colab, Kaggle and GitHub show it: links between pages lead to the published book, or, where there is none
    (None), to the sources in the repository; pages of the API are made with the book, so their list stands for them."""

    def target(words: str, address: str) -> str:
        if "://" in address or address.startswith("mailto:"):
            return f"[{words}]({address})"
        page, anchor = page_of(address, stem)
        if book is None:
            return (
                f"[{words}]({'../book/api/index.md' if page.startswith('book/api/') else address})"
            )
        return f"[{words}]({book}/{page}.html{'#' + anchor if anchor else ''})"

    return rewritten(text, target)


def for_book(text: str, stem: str, book: str, there: set[str]) -> str:
    """A cell as the book shows it. Sphinx resolves links to pages; anchors that outputs make are unknown to it, so a link
    with an anchor is HTML. there: the chapters of this build; links to others lead to the published book."""

    def target(words: str, address: str) -> str:
        if address.startswith(f"{book}/"):
            return html(words, f"../{address.removeprefix(f'{book}/')}")
        if "://" in address or address.startswith("mailto:"):
            return f"[{words}]({address})"
        page, anchor = page_of(address, stem)
        folder, name = posixpath.split(page)
        if folder == "notebooks" and name not in there:
            return f"[{words}]({book}/{page}.html{'#' + anchor if anchor else ''})"
        if anchor:
            return html(words, f"{'' if page == f'notebooks/{stem}' else f'../{page}.html'}#{anchor}")  # fmt: skip
        return f"[{words}]({f'{name}.ipynb' if folder == 'notebooks' else address})"

    return rewritten(text, target)


def html(words: str, address: str) -> str:
    return f'<a class="reference internal" href="{address}">{words}</a>'


def terms(glossary: Path) -> dict[str, str]:
    """Each term of the glossary, in English → its anchor. Entries with several names count for each."""
    found = {}
    body = glossary.read_text().split(":::{glossary}")[-1]
    for entry in re.findall(r"^(?!:::)(\S.*)$", body, re.MULTILINE):
        anchor = "term-" + _make_id(entry)
        found |= dict.fromkeys(names_of(entry), anchor)
    return found


def names_of(entry: str) -> list[str]:
    """The English names of a glossary's entry, without the notes' Chinese one."""
    return re.sub(r"\s*\(.*\)$", "", entry).split(", ")


def pattern_of(name: str) -> re.Pattern:
    return re.compile(rf"(?<![\w-]){re.escape(name)}s?(?![\w-])", re.IGNORECASE)


HEADER = re.compile(r"\A---.*?^---$", re.MULTILINE | re.DOTALL)


def with_uses(glossary: str, chapters: dict[str, str]) -> str:
    """The glossary's page with, under each term that is no everyday word, the chapters that use it. chapters: by stem."""
    prose = {stem: OPAQUE.sub("", HEADER.sub("", text)) for stem, text in chapters.items()}
    plain = {stem: QUIET.sub("", text) for stem, text in prose.items()}

    def entry(match: re.Match[str]) -> str:
        names = [name for name in names_of(match[1]) if name not in COMMON]
        used = [
            f"[{'.'.join(stem.split('_')[:2])}](../notebooks/{stem}.ipynb)"
            for stem, text in plain.items()
            if any(pattern_of(name).search(text) for name in names)
        ]
        return match[0] + (f"\n  In {', '.join(used)}." if used else "")

    return re.sub(r"^(?!:::|#)(\S.*)(?:\n  .+)+", entry, glossary, flags=re.MULTILINE)


def with_terms(cells: list[str], known: dict[str, str]) -> list[str]:
    """Markdown cells in order, with each term of the glossary linked at its first use in running text.

    Left alone: headings, tables, code, mathematics, what is a link already, and terms that are everyday words.
    """
    everything = "\n".join(cells)
    wanted = {
        name: anchor
        for name, anchor in known.items()
        if name not in COMMON and f"glossary.md#{anchor.removeprefix('term-')}" not in everything
    }
    for name in sorted(wanted, key=len, reverse=True):
        pattern = pattern_of(name)
        link = f'<a class="term" href="../book/glossary.html#{wanted[name]}">'

        def change(text: str, pattern: re.Pattern = pattern, link: str = link) -> str:
            return outside(
                text,
                QUIET,
                lambda plain: pattern.sub(lambda found: f"{link}{found[0]}</a>", plain, count=1),
            )

        for place, cell in enumerate(cells):
            linked = outside(cell, OPAQUE, change)
            if linked != cell:
                cells = [*cells[:place], linked, *cells[place + 1 :]]
                break
    return cells
