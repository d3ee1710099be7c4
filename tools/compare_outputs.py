"""What a change moved in what the chapters say: two folders of executed notebooks, cell by cell, times left out.

    python -m tools.compare_outputs ../before/build/executed build/executed

Of each chapter the latest execution in a folder counts. Cells are paired by their code, so one that was added or edited does
not shift the others. Exits with 1 where an output differs or a chapter is missing.
"""

import difflib
import re
import sys
from pathlib import Path

import nbformat

MACHINE = re.compile(
    r"[\d.,]+(e-?\d+)?(?= ?(ms|µs|s|seconds?|min|minutes?|hours?)\b)|(?<=free: )[\d.]+|\d{4}-\d\d-\d\d|/tmp/\S+|0x[0-9a-f]+"
)


def latest(folder: str) -> dict[str, Path]:
    found = sorted(Path(folder).glob("*/*.ipynb"), key=lambda path: path.stat().st_mtime)
    return {path.stem: path for path in found}


def said(output: nbformat.NotebookNode) -> list[str]:
    """The lines of an output, as a reader sees them; a picture is a line of its own."""
    data = {"text/plain": output.get("text", "")} | output.get("data", {})
    kinds = ("image/png", "text/html", "text/markdown", "text/plain")
    text = next((data[kind] for kind in kinds if kind in data), "")
    return [MACHINE.sub("…", line) for line in re.split(r"\n|<[^>]*>", text) if line.strip()]


def cells(path: Path) -> list[tuple[str, list[str]]]:
    """Of each code cell its source and its outputs' lines; what went to the error stream, such as progress, is left out."""
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return [(c.source, [x for o in c.outputs if o.get("name") != "stderr" for x in said(o)]) for c in code]  # fmt: skip


def compare(before: Path, after: Path) -> tuple[int, list[str]]:
    """The number of cells of equal code, and where their outputs differ: the cell's first line and the lines."""
    (old, new), found = (cells(before), cells(after)), []
    pairs = difflib.SequenceMatcher(None, [c[0] for c in old], [c[0] for c in new], autojunk=False)
    same = [(old[i + k], new[j + k]) for i, j, size in pairs.get_matching_blocks() for k in range(size)]  # fmt: skip
    for (source, a), (_, b) in same:
        lines = [x[:150] for x in difflib.unified_diff(a, b, n=0, lineterm="")][2:]
        found += [f"  {source.splitlines()[0]}", *(f"    {x}" for x in lines)] if lines else []
    return len(same), found


def main(before: str, after: str) -> set[str]:
    """Prints what differs, and returns the chapters that do or that are in one folder alone."""
    old, new = latest(before), latest(after)
    failed = old.keys() ^ new.keys()
    for chapter in sorted(old.keys() & new.keys()):
        count, found = compare(old[chapter], new[chapter])
        print(f"{chapter}: {count} cells of equal code", *found, sep="\n")
        failed |= {chapter} if found else set()
    return failed


if __name__ == "__main__":
    if moved := main(*sys.argv[1:]):
        raise SystemExit(f"differ or are missing: {', '.join(sorted(moved))}")
