"""A document, the split it lies in, and how documents are written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "validation", "test")


class Document(NamedTuple):
    """One row: the split it belongs to, the work or section it comes from, and its text."""

    split: str
    source: str
    text: str


def drawn(name: str, percent: int) -> str:
    """Draw a split for a section from its name: `percent` per cent for validation, as much for test."""
    draw = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "validation" if draw < percent else "test" if draw < 2 * percent else "train"


def write_parquet(documents: list[Document], path: Path) -> None:
    """Write documents as one row group of zstd at its highest level: small, and the same bytes every time."""
    columns = {field: [getattr(d, field) for d in documents] for field in Document._fields}
    size = 1 << 26  # one page a column, so that documents are compressed together
    pq.write_table(
        pa.table(columns), path, compression="zstd", compression_level=22, use_dictionary=["split"],
        data_page_size=size, row_group_size=len(documents), write_page_index=False, store_schema=False,
    )  # fmt: skip


def repeated_lines(documents: list[Document], run_length: int = 6) -> dict[str, float]:
    """Per held-out split, the share of runs of `run_length` non-empty lines that also stand in train."""

    def runs(text: str) -> set[int]:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return {hash(tuple(lines[i : i + run_length])) for i in range(len(lines) - run_length + 1)}

    train = set().union(*(runs(d.text) for d in documents if d.split == "train"))
    shares = {}
    for split in SPLITS[1:]:
        held = set().union(*(runs(d.text) for d in documents if d.split == split))
        shares[split] = len(held & train) / len(held)
    return shares
