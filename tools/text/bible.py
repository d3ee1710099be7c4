"""The King James Version, out of the form that the `bible-kjv` program keeps it in."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tools.text.documents import Document

BIBLE_BOOKS = [
    "Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1 Samuel", "2 Samuel", "1 Kings",
    "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther", "Job", "Psalms", "Proverbs", "Ecclesiastes",
    "Song of Solomon", "Isaiah", "Jeremiah", "Lamentations", "Ezekiel", "Daniel", "Hosea", "Joel", "Amos", "Obadiah", "Jonah",
    "Micah", "Nahum", "Habakkuk", "Zephaniah", "Haggai", "Zechariah", "Malachi", "Matthew", "Mark", "Luke", "John", "Acts",
    "Romans", "1 Corinthians", "2 Corinthians", "Galatians", "Ephesians", "Philippians", "Colossians", "1 Thessalonians",
    "2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Philemon", "Hebrews", "James", "1 Peter", "2 Peter", "1 John",
    "2 John", "3 John", "Jude", "Revelation",
]  # fmt: skip

# Books that tell the same story word for word (the Gospels; Kings and Chronicles) all stay in train.
BIBLE_HELD_OUT = {
    "validation": {"Esther", "Ecclesiastes", "Daniel", "Romans", "James"},
    "test": {"Judges", "Proverbs", "Job", "Galatians", "Revelation"},
}


def unpack_bible(data: bytes) -> str:
    """Unpack `bible.data`: windows of 64 KiB, each an LZW stream (`compress`) without its 3-byte magic."""
    (windows,) = struct.unpack(">I", data[0x58:0x5C])
    starts = [*struct.unpack(f">{windows}I", data[0x5C : 0x5C + 4 * windows]), len(data)]
    parts = [
        subprocess.run(
            ["gzip", "-dc"], input=b"\x1f\x9d\x90" + data[a:b], capture_output=True
        ).stdout
        for a, b in zip(starts, starts[1:])
    ]
    return b"".join(parts).decode("ascii")


def bible(sources: dict[str, Path]) -> Iterator[Document]:
    """The King James Version, one document a chapter."""
    text = unpack_bible((sources["bible-kjv-text"] / "usr/lib/bible.data").read_bytes())
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in text.splitlines():
        if verse := re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line):
            book, chapter, number, words = verse.groups()
            chapters.setdefault((book, chapter), []).append(f"{number} {words.strip()}")
    abbreviations = list(dict.fromkeys(book for book, _ in chapters))
    assert len(abbreviations) == len(BIBLE_BOOKS), abbreviations
    for (book, chapter), verses in chapters.items():
        name = BIBLE_BOOKS[abbreviations.index(book)]
        split = next((s for s, books in BIBLE_HELD_OUT.items() if name in books), "train")
        yield Document(
            split, f"{name} {chapter}", f"{name} {chapter}\n\n" + "\n".join(verses) + "\n"
        )
