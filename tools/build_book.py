"""Executes what changed, stages the book under build/book and builds it into _build/html.

    python -m tools.build_book                    the whole book
    python -m tools.build_book --only 2_1_experts  a preview with some chapters, under build/preview-html

`tools.stage` says what stands in the stage. Files there that did not change are not touched, so that Sphinx reads only what
did. Where nothing at all changed in the sources, neither the stage nor Sphinx is started.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock

from tools import run_chapters
from tools.chapters import ROOT
from tools.fingerprint import fingerprint
from tools.run_chapters import say

ICON = '<link rel="icon" href="_static/favicon.svg" />'


def build(root: Path = ROOT, only: list[str] | None = None) -> Path:
    """Execute, stage and build; return the start page. only: these chapters alone, as a preview beside the book.
    One process at a time does so; another waits, and finds it done.

    Raises:
        run_chapters.ChapterFailed: a chapter does not run.
        subprocess.CalledProcessError: the build printed a warning or an error.
    """
    (root / "build").mkdir(exist_ok=True)
    with FileLock(root / "build" / ".lock"):
        return _build(root, only)


def _build(root: Path, only: list[str] | None) -> Path:
    start = time.perf_counter()
    results = run_chapters.execute_all(root, only)
    stamp = root / "build" / ("preview.sha256" if only else "book.sha256")
    output = root / "build" / "preview-html" if only else root
    html = output / "_build" / "html"
    built = stamp.read_text().split() if stamp.exists() and (html / "index.html").exists() else []
    sources = fingerprint(root, results)
    if built[:1] == [sources]:
        say(f"the book is up to date ({time.perf_counter() - start:.0f} s)")
        return html / "index.html"
    from tools.stage import stage  # takes seconds, which an unchanged book need not

    staged = root / "build" / ("preview" if only else "book")
    digest, frame = stage(root, results, staged)
    if built[1:] == [digest, frame]:
        say(f"no page differs ({time.perf_counter() - start:.0f} s)")
    else:
        stamp.unlink(missing_ok=True)
        if built[2:] != [frame]:
            shutil.rmtree(output / "_build", ignore_errors=True)
        _run_sphinx(root, staged, output)
        _give_icon(html / "index.html")
        ran = sum(r.seconds for r in results if r.fresh)
        say(f"built in {time.perf_counter() - start:.0f} s, of which chapters {ran:.0f} s")
    stamp.write_text(f"{sources}\n{digest}\n{frame}\n")
    return html / "index.html"


def _run_sphinx(root: Path, staged: Path, output: Path) -> None:
    say("building the pages")
    program = str(Path(sys.executable).with_name("jupyter-book"))
    subprocess.run(
        [program, "build", str(staged), "--path-output", str(output)]
        + ["--warningiserror", "--keep-going"],
        env=os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
        cwd=root,
        check=True,
    )


def _give_icon(redirect: Path) -> None:
    """A page without one makes a browser ask the site for /favicon.ico, and complain."""
    text = redirect.read_text()
    if ICON not in text:
        redirect.write_text(f"{ICON}\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="STEM", help="a preview with these chapters")
    only = parser.parse_args().only
    try:
        index = build(only=only)
    except run_chapters.ChapterFailed as failure:
        raise SystemExit(str(failure)) from None
    except subprocess.CalledProcessError:
        raise SystemExit("the pages were not built: see the warnings above") from None
    say(f"open {index.relative_to(ROOT)}  (file://{index})")


if __name__ == "__main__":
    main()
