"""The data card, `lora_course/data/text/README.md`."""

from __future__ import annotations

from pathlib import Path

from tools.text.documents import SPLITS, Document, repeated_lines

CARD = """\
# Text of the course

Five domains of real text, one Parquet file each, with the columns `split` (train, validation, test), `source` (the work
or section) and `text` (a document). Read one with `datasets.Dataset.from_parquet("glosses.parquet")`.
This page is written by `tools/build_text.py`, which rebuilds the files, byte for byte, from the packages below.

| domain | what | a document is | split | licence |
|---|---|---|---|---|
{what}

## Sizes
Bytes of UTF-8 text and documents in each split; bytes of the Parquet file; how many runs of six lines of the held-out
splits also stand in train (the worse of the two).

| domain | train | validation | test | file | repeated |
|---|---|---|---|---|---|
{sizes}

## Sources
| package | version | from | sha256 of the package file |
|---|---|---|---|
{packages}

`postgresql-doc-15` (PostgreSQL licence, © 1996–2023 PostgreSQL Global Development Group, © 1994 Regents of the
University of California) and `jargon-text` (public domain) are only used to pretrain nano; their text is not in these files.

## What was done to the text
- Glosses: underscores became spaces, syntactic markers such as `(a)` were cut, pointers and numbers of WordNet's records left out.
- Bible: book and verse references became a chapter's title and verse numbers.
- Shakespeare, Milton: runs of empty lines were shortened; line numbers and "the end" lines of Milton cut.
- Python: left out are {left_out}, `html/entities.py` and files under 500 characters.

## WordNet's licence
{wordnet}

## Limits
Old texts carry the views of their time, WordNet's glosses those of its authors. Nothing here is meant for
anything but teaching and measuring small language models.
"""


def size_row(name: str, documents: list[Document], path: Path) -> str:
    """A line of the data card's table of sizes."""
    cells = []
    for split in SPLITS:
        texts = [d.text for d in documents if d.split == split]
        cells.append(f"{sum(len(t.encode()) for t in texts):,} in {len(texts):,}")
    overlap = max(repeated_lines(documents).values())
    return f"| {name} | {' | '.join(cells)} | {path.stat().st_size:,} | {overlap:.2%} |"
