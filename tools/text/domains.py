"""The five domains: how each is read, and what the data card says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tools.text.bible import bible
from tools.text.documents import Document
from tools.text.library import python
from tools.text.verse import milton, shakespeare
from tools.text.wordnet import SECTION, glosses


class Domain(NamedTuple):
    """How a domain is read, and what the data card says of it."""

    read: Callable[[dict[str, Path]], Iterator[Document]]
    packages: tuple[str, ...]
    what: str
    document: str
    rule: str
    licence: str


DOMAINS = {
    "glosses": Domain(
        glosses, ("wordnet-base",), "WordNet 3.0: words, part of speech, gloss and examples",
        f"{SECTION} consecutive synsets of one lexicographer file, one a line",
        "by section: sha256 of the section's name modulo 100 (0–2 validation, 3–5 test)",
        "WordNet 3.0 licence (permissive, notice required; below)",
    ),
    "bible": Domain(
        bible, ("bible-kjv-text",), "The Bible, King James Version",
        "a chapter", "by book; the Gospels, and Kings and Chronicles, all in train, as they repeat each other",
        "public domain (the translation is of 1611; in the United Kingdom the Crown holds printing rights)",
    ),
    "shakespeare": Domain(
        shakespeare, ("shakespeare",), "Shakespeare's plays and poems, modern spelling (Project Gutenberg's texts, headers removed)",
        "a scene, or a poem's file", "by work; the folio editions are left out, as they repeat the plays",
        "public domain; the collection: Creative Commons Attribution 2.5, © 2005–2008 Open Knowledge Foundation",
    ),
    "milton": Domain(
        milton, ("shakespeare",), "Milton's Paradise Lost (original spelling) and Paradise Regained (Project Gutenberg's texts)",
        "a book of the poem", "by book of the poem",
        "public domain; the collection: Creative Commons Attribution 2.5, © 2005–2008 Open Knowledge Foundation",
    ),
    "python": Domain(
        python, ("libpython3.11-minimal", "libpython3.11-stdlib"), "CPython 3.11's standard library, without tests, tables and generated files",
        "a source file", "by top-level module or package",
        "Python Software Foundation License 2.0 (© 2001–2023 Python Software Foundation); its text and older notices: `LICENSE-python.txt`",
    ),
}  # fmt: skip
