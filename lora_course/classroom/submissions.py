"""What students hand in: files of any kind, of which only the text of some cells is of interest.

Nothing here parses or runs a student's Python: cells are found by their metadata, or by a name at the start of a line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST = 20 << 20
"""Bytes of a notebook: one that is larger holds outputs that nobody asked for."""

LONGEST = 100_000
"""Characters of an answer cell: a longer one is no answer, and would cost the report its memory."""

KEY = "lora_course"
"""The name in a cell's metadata under which an assignment says what the cell is."""


class Unreadable(Exception):
    """A submission that is no notebook; the text says why."""


@dataclass(frozen=True)
class Found:
    """The answer to one problem: its source, or None; the student's own cells above and below; remarks for the report."""

    answer: str | None
    own: list[str]
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """One student's submission: the name under which it lies there, its notebook, remarks."""

    name: str
    path: Path | None
    flags: tuple[str, ...] = ()


def collect(folder: Path) -> list[Entry]:
    """Every file or folder of a submissions folder. A folder's notebook is its last by name; more than one is flagged."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one that holds the submissions.")
    entries = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and _plain_file(p)]  # fmt: skip
            flags = (
                (f"{len(inside)} notebooks: {_shown(inside[-1])} counts",)
                if len(inside) > 1
                else ()
            )
            entries.append(Entry(_shown(path), inside[-1] if inside else None, flags))
        elif _plain_file(path):
            entries.append(Entry(_shown(path), path))
        else:  # a pipe, a device: reading it might never end
            entries.append(Entry(_shown(path), None, ("it is neither a file nor a folder",)))
    return entries


def _plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _shown(path: Path) -> str:
    """Its name; bytes that are no UTF-8, as old zip programs leave them, as escapes."""
    return os.fsencode(path.name).decode("utf-8", "backslashreplace")


def digest(path: Path | None) -> str:
    """What tells one version of a submission from another."""
    try:
        if path is None or path.stat().st_size > LARGEST:
            return f"none, or {path.stat().st_size if path else 0} bytes"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def read_cells(path: Path | None) -> list[dict[str, Any]]:
    """The code cells of a notebook: `source` and what the assignment's metadata says. Raises Unreadable."""
    if path is None:
        raise Unreadable("There is no notebook (.ipynb) in it.")
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST else b""
    except OSError as error:
        raise Unreadable(f"The file can't be read: {error.strerror}.") from None
    if size == 0:
        raise Unreadable("The file is empty.")
    if size > LARGEST:
        raise Unreadable(
            f"The file has {size >> 20} MB, more than {LARGEST >> 20}: clear its outputs and hand it in again."
        )
    try:
        notebook = json.loads(content.decode("utf-8-sig"))
        cells = notebook["cells"]
        return [_code(cell) for cell in cells if cell.get("cell_type") == "code"]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise Unreadable("The file is no notebook: it can't be read as JSON with cells.") from None


def _code(cell: dict[str, Any]) -> dict[str, Any]:
    source = cell.get("source", "")
    source = "".join(map(str, source)) if isinstance(source, list) else str(source)
    metadata = cell.get("metadata")
    mark = metadata.get(KEY) if isinstance(metadata, dict) else None
    mark = mark if isinstance(mark, dict) else {}
    return {
        "source": source,
        "problem": str(mark.get("problem", "")),
        "role": str(mark.get("role", "")),
    }


def find_answer(cells: list[dict[str, Any]], problem: str, name: str) -> Found:
    """The answer cell by metadata, else by its function's name; of several the last that defines the name.

    `def name` goes before `name = …`, by which a student may have kept a result and not a function.
    """
    define = re.compile(rf"^(async\s+def|def|class)\s+{name}\b", re.MULTILINE)
    assign = re.compile(rf"^{name}\s*=(?!=)", re.MULTILINE)
    marked = [c for c in cells if c["role"] == "answer" and c["problem"] == problem]
    defining = {id(c) for c in cells if define.search(c["source"])}
    assigning = {id(c) for c in cells if assign.search(c["source"])}
    # the cells themselves and not their content: comparing each with each takes hours for 100,000 of them
    among = {id(c) for c in marked}
    others = (defining | assigning) - among
    named = [c for c in cells if id(c) in others and c["role"] not in ("check", "setup")]
    own = [c["source"] for c in cells if not c["role"] and id(c) not in others]
    # an answer cell that no longer defines the function may have been split or moved
    good = next(
        (
            found
            for where, how in [(marked, defining), (marked, assigning), (named, defining)]
            if (found := [c for c in where if id(c) in how])
        ),
        named or marked,
    )
    if not good:
        return Found(None, own)
    flags = []
    if len(good) > 1:
        flags.append(f"{len(good)} cells define {name}: the last counts")
    if id(good[-1]) not in among:
        flags.append(f"{name} was found by its name, not by its cell")
    return Found(good[-1]["source"], own, flags)


def file_of(who: str) -> str:
    """A student's id as the name of a file that any system takes: another one for another id."""
    safe = re.sub(r"[^\w.-]", "_", who).strip(".")
    safe = safe.encode()[:150].decode(errors="ignore")
    return safe if safe == who else f"{safe}-{hashlib.sha256(who.encode()).hexdigest()[:8]}"


def shingles(source: str, length: int = 5) -> frozenset[tuple[str, ...]]:
    """An answer without comments and with names by their order: what two copies share after renaming."""
    text = re.sub(r'""".*?"""|\'\'\'.*?\'\'\'|#[^\n]*', "", source, flags=re.DOTALL)
    names: dict[str, str] = {}
    tokens = [
        names.setdefault(t, f"n{len(names)}") if t[0].isalpha() or t[0] == "_" else t
        for t in re.findall(r"[^\W\d]\w*|\d+\.?\d*|\S", text)
    ]
    return frozenset(tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))


def look_alike(
    answers: dict[str, str], least: float = 0.9, tokens: int = 60
) -> list[tuple[float, str, str]]:
    """Pairs of students whose answers to a problem share most of their shingles, the most alike first."""
    sets = {who: shingles(source) for who, source in answers.items()}
    who = [name for name, s in sets.items() if len(s) >= tokens]
    pairs = []
    for i, one in enumerate(who):
        for other in who[i + 1 :]:
            share = len(sets[one] & sets[other]) / len(sets[one] | sets[other])
            if share >= least:
                pairs.append((share, one, other))
    return sorted(pairs, reverse=True)
