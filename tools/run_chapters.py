"""Executes each chapter once, under nbmake, on a staged copy, and keeps the result until something it rests on changes.

    python -m tools.run_chapters [STEM ...]      e.g. 1_1_qlora; without a name: every chapter

A result is found under build/executed/<stem>-<key>/: the executed notebook, its claims and run.json. The key is a hash of
the chapter's text, all of lora_course/ (code and data), requirements.txt and the profile, so an edited variant
executes its chapters again. Sources are never written to.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat

from tools.chapters import (
    CELL_TIMEOUT,
    GPU_PROFILES,
    ROOT,
    Result,
    cached,
    chapters,
    key,
    profile,
)

NBMAKE = (
    "--nbmake", "--overwrite", "-p", "tools.nbmake_progress", "-p", "no:cacheprovider", "-p", "no:timeout", "-q",
    "-c", os.devnull, "--override-ini", "addopts=",
)  # fmt: skip
KEPT_RESULTS = 3
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class ChapterFailed(Exception):
    """A cell of a chapter raised, ran too long or took its kernel down. The message names chapter, line and cell."""


def execute(chapter: Path, root: Path = ROOT, label: str = "") -> Result:
    """Execute a chapter under nbmake, or return its kept result.

    Raises:
        ChapterFailed: naming the chapter, the line and the cell.
    """
    known = cached(chapter, root)
    if known:
        say(
            f"{label}{chapter.stem}: nothing changed, kept from an earlier run ({known.seconds:.0f} s)"
        )
        return known

    version = key(chapter, root)
    staged = root / "build" / "running" / chapter.stem
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "claims").mkdir(parents=True)
    path = staged / f"{chapter.stem}.ipynb"
    notebook = jupytext.read(chapter)
    gpu = profile() in GPU_PROFILES
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{chapter.stem}-{number:03d}"
        if not gpu and "gpu" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = [*cell.metadata["tags"], "skip-execution"]
    nbformat.write(notebook, path)

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    say(f"{label}{chapter.stem}: executing {len(code)} cells, profile {profile()}")
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *NBMAKE, f"--nbmake-timeout={CELL_TIMEOUT[profile()]}"]
        + ["--rootdir", str(staged), path.name],
        cwd=staged,
        env=environment(root, staged),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if run.returncode:
        raise ChapterFailed(explain(chapter, notebook, staged, run.stdout))

    ran = {"stem": chapter.stem, "key": version, "profile": profile()}
    ran |= {"seconds": round(seconds, 1), "cells": len(code)}
    (staged / "run.json").write_text(json.dumps(ran, indent=1) + "\n")
    folder = root / "build" / "executed" / f"{chapter.stem}-{version[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for item in (path.name, "claims", "run.json"):
        shutil.move(staged / item, folder / item)
    shutil.rmtree(staged)
    forget_old_results(chapter.stem, folder.parent)
    say(f"{label}{chapter.stem}: done in {seconds:.0f} s")
    return Result(chapter.stem, folder, seconds, fresh=True)


def environment(root: Path, staged: Path) -> dict[str, str]:
    """What a chapter's kernel sees: the checkout's package, its profile, a folder for claims, and (without a GPU) no network."""
    paths = [str(root), str(ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in paths if p)),
        "LORA_COURSE_PROFILE": profile(),
        "LORA_COURSE_CLAIMS": str(staged / "claims"),
        "LORA_COURSE_PROGRESS": str(staged / "progress.json"),
        "IPYTHONDIR": str(staged / "ipython"),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if at_once() > 1:
        settings |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if profile() not in GPU_PROFILES:
        settings |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return os.environ | settings


def explain(chapter: Path, notebook: nbformat.NotebookNode, staged: Path, report: str) -> str:
    """What went wrong, in words a person can act on: chapter, line of the source, number of the code cell, traceback."""
    progress = staged / "progress.json"
    if not progress.exists():
        return f"notebooks/{chapter.name} failed before its first cell:\n{report}"
    at = json.loads(progress.read_text())
    cell = notebook.cells[at["index"]]
    number = sum(c.cell_type == "code" for c in notebook.cells[: at["index"] + 1])
    total = sum(c.cell_type == "code" for c in notebook.cells)
    line = chapter.read_text()[: max(chapter.read_text().find(cell.source), 0)].count("\n") + 1
    first = next(iter(cell.source.splitlines()), "")
    report = report if sys.stdout.isatty() else ANSI.sub("", report)
    return (
        f"notebooks/{chapter.name}:{line}: code cell {number} of {total} failed: {first}\n{report}"
    )


def forget_old_results(stem: str, folder: Path) -> None:
    results = sorted(folder.glob(f"{stem}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in results[KEPT_RESULTS:]:
        shutil.rmtree(old)


def execute_all(root: Path = ROOT, stems: list[str] | None = None) -> list[Result]:
    """Execute every chapter; all are tried, then the failures are raised together."""
    wanted = [path for path in chapters(root) if not stems or path.stem in stems]
    unknown = set(stems or []) - {path.stem for path in wanted}
    if unknown:
        raise SystemExit(
            f"no chapter {sorted(unknown)}; there are {[path.stem for path in chapters(root)]}"
        )
    failures: list[str] = []

    def run(numbered: tuple[int, Path]) -> Result | None:
        number, chapter = numbered
        try:
            return execute(chapter, root, label=f"[{number}/{len(wanted)}] ")
        except ChapterFailed as failure:
            failures.append(str(failure))
            say(f"FAILED {failure}")
            return None

    with ThreadPoolExecutor(at_once()) as pool:
        results = [found for found in pool.map(run, enumerate(wanted, start=1)) if found]
    if failures:
        raise ChapterFailed(
            f"{len(failures)} of {len(wanted)} chapters failed:\n"
            + "\n".join("  " + failure.splitlines()[0] for failure in failures)
        )
    return results


def at_once() -> int:
    """How many chapters run at a time: two with one thread each where there are two cores, which take less time together
    than one after the other with two threads (a step of nano: 1.38 s on one thread, 0.84 s on two). One on a GPU.
    """
    return 1 if profile() in GPU_PROFILES or (os.cpu_count() or 1) < 2 else 2


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "stems",
        nargs="*",
        metavar="STEM",
        help="chapters to execute, e.g. 1_1_qlora (all by default)",
    )
    try:
        execute_all(stems=parser.parse_args().stems)
    except ChapterFailed as failure:
        raise SystemExit(str(failure)) from None


if __name__ == "__main__":
    main()
