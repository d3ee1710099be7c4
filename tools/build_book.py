"""Executes what changed, stages the book under build/book and builds it into _build/html.

    python -m tools.build_book

The stage is the repository's own layout (book/, notebooks/, _config.yml, _toc.yml), with executed chapters in the place of
sources and with the generated parts of the pages filled in. Files that did not change are not touched, so that Sphinx reads
only what did; where nothing changed at all, Sphinx is not started.
"""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat

from tools import pages, run_chapters
from tools.playpage import pack
from tools.run_chapters import ROOT, Result, say


def published(result: Result) -> str:
    """An executed chapter as the book shows it and offers it for download: no progress bars, no traces of the execution."""
    notebook = nbformat.read(result.notebook, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "skip-execution" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = [
                tag for tag in cell.metadata["tags"] if tag != "skip-execution"
            ]
        if "solution" in cell.metadata.get("tags", []):
            cell.metadata["mystnb"] = {
                "code_prompt_show": "Show the solution",
                "code_prompt_hide": "Hide the solution",
            }
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata.pop("jupytext", None)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    return nbformat.writes(notebook) + "\n"


def staged_files(root: Path, results: list[Result]) -> Iterator[tuple[str, bytes]]:
    """Path in the stage → content, of every file that the book is built from."""
    for name in ("_config.yml", "_toc.yml"):
        yield name, (root / name).read_bytes()
    for path in sorted((root / "book").rglob("*")):
        name = path.relative_to(root)
        if path.is_dir() or "_data" in name.parts:
            continue
        content = path.read_bytes()
        yield (
            name.as_posix(),
            pages.fill(content.decode(), root, results).encode()
            if path.suffix == ".md"
            else content,
        )
    for name, content in pack.packed(root):
        yield f"book/_static/play/data/{name}", content
    for module in pages.api_modules(root):
        yield f"book/api/{pages.api_stem(module)}.md", pages.api_page(module).encode()
    for result in results:
        yield f"notebooks/{result.stem}.ipynb", published(result).encode()


def stage(root: Path, results: list[Result]) -> tuple[str, str]:
    """Write the stage, touching only what changed; return a hash of everything the book is made from, and one of its frame.

    The frame is what shapes every page: settings, theme, and which pages there are. When it changes, Sphinx starts afresh,
    as it would leave pages in place that it does not think of as changed.
    """
    target = root / "build" / "book"
    digest, frame = hashlib.sha256(), hashlib.sha256()
    for distribution in (
        "jupyter-book",
        "sphinx-book-theme",
        "pydata-sphinx-theme",
        "myst-nb",
        "Sphinx",
    ):
        frame.update(importlib.metadata.version(distribution).encode())
    frame.update((ROOT / "tools" / "sphinx_extension.py").read_bytes())
    wanted = set()
    for name, content in staged_files(root, results):
        path = target / name
        wanted.add(path)
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        frame.update(content if name.startswith("_") else name.encode())
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for path in [p for p in target.rglob("*") if p.is_file()]:
        if path not in wanted:
            path.unlink()
    for path in sorted((root / "lora_course").rglob("*.py")):  # the API pages quote its docstrings
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(frame.digest())
    return digest.hexdigest(), frame.hexdigest()


def build(root: Path = ROOT) -> Path:
    """Execute, stage and build; return the start page.

    Raises:
        run_chapters.ChapterFailed: a chapter does not run.
        subprocess.CalledProcessError: the build printed a warning or an error.
    """
    start = time.perf_counter()
    results = run_chapters.execute_all(root)
    digest, frame = stage(root, results)
    html = root / "_build" / "html"
    stamp = root / "build" / "book.sha256"
    built = stamp.read_text() if stamp.exists() and (html / "index.html").exists() else ""
    if built == f"{digest}\n{frame}\n":
        say(f"the book is up to date ({time.perf_counter() - start:.0f} s)")
    else:
        stamp.unlink(missing_ok=True)
        if not built.endswith(f"{frame}\n"):
            shutil.rmtree(root / "_build", ignore_errors=True)
        say("building the pages")
        subprocess.run(
            [
                str(Path(sys.executable).with_name("jupyter-book")),
                "build",
                str(root / "build" / "book"),
                "--path-output",
                str(root),
                "--warningiserror",
                "--keep-going",
            ],
            env=os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
            cwd=root,
            check=True,
        )
        stamp.write_text(f"{digest}\n{frame}\n")
        say(
            f"built in {time.perf_counter() - start:.0f} s, of which chapters {sum(r.seconds for r in results if r.fresh):.0f} s"
        )
    return html / "index.html"


def main() -> None:
    try:
        index = build()
    except run_chapters.ChapterFailed as failure:
        raise SystemExit(str(failure)) from None
    except subprocess.CalledProcessError:
        raise SystemExit("the pages were not built: see the warnings above") from None
    say(f"open {index.relative_to(ROOT)}  (file://{index})")


if __name__ == "__main__":
    main()
