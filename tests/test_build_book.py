"""`tools.build_book`: what is built again, and what is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import build_book, run_chapters, stage
from tools.chapters import ROOT, Result


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A project of one page and one executed chapter, and what was done for it: "staged", "pages"."""
    for name in ("book/intro.md", "lora_course/lora.py", "build/executed/0_1_toy-1/0_1_toy.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    done: list[str] = []
    folder = tmp_path / "build" / "executed" / "0_1_toy-1"

    def staged(root: Path, results: list[Result], target: Path) -> tuple[str, str]:
        done.append("staged")
        return (root / "book" / "intro.md").read_text(), "frame"

    def pages(root: Path, staged: Path, output: Path) -> None:
        done.append("pages")
        (output / "_build" / "html").mkdir(parents=True, exist_ok=True)
        (output / "_build" / "html" / "index.html").write_text("")

    results = [Result("0_1_toy", folder, 1.0, fresh=False)]
    monkeypatch.setattr(run_chapters, "execute_all", lambda root, only: results)
    monkeypatch.setattr(stage, "stage", staged)
    monkeypatch.setattr(build_book, "_run_sphinx", pages)
    return tmp_path, done


def test_what_did_not_change_is_neither_staged_nor_built(project: tuple[Path, list[str]]) -> None:
    root, done = project
    build_book.build(root)
    assert done == ["staged", "pages"]
    build_book.build(root)
    assert done == ["staged", "pages"]
    (root / "lora_course" / "lora.py").write_text("two")  # no page comes out otherwise
    build_book.build(root), build_book.build(root)
    assert done == ["staged", "pages", "staged"]
    (root / "book" / "intro.md").write_text("two")
    build_book.build(root), build_book.build(root)
    assert done == ["staged", "pages", "staged", "staged", "pages"]
    (root / "build" / "executed" / "0_1_toy-1" / "0_1_toy.ipynb").write_text("two")
    build_book.build(root)
    assert done[5:] == ["staged"]
    (root / "_build" / "html" / "index.html").unlink()
    build_book.build(root)
    assert done[6:] == ["staged", "pages"]


def test_pages_that_failed_are_tried_again(
    project: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, done = project
    build_book.build(root)
    (root / "book" / "intro.md").write_text("two")

    def fails(*_: object) -> None:
        raise subprocess.CalledProcessError(1, "jupyter-book")

    with monkeypatch.context() as broken:
        broken.setattr(build_book, "_run_sphinx", fails)
        with pytest.raises(subprocess.CalledProcessError):
            build_book.build(root)
    build_book.build(root)
    assert done == ["staged", "pages", "staged", "staged", "pages"]


@pytest.mark.slow
def test_the_sources_are_all_that_a_page_comes_from(tmp_path: Path) -> None:
    """Whatever the stage opens lies in what the fingerprint reads."""
    code = """
import sys
from pathlib import Path
from tools import fingerprint, run_chapters, stage
opened = set()
sys.addaudithook(lambda event, given: event == "open" and isinstance(given[0], (str, Path)) and opened.add(str(given[0])))
list(stage.staged_files(run_chapters.ROOT, []))
root = run_chapters.ROOT
inside = [Path(p).resolve().relative_to(root) for p in opened if Path(p).resolve().is_relative_to(root)]
sources = {*fingerprint.SOURCES, ".venv", "build"}
print(sorted({str(p) for p in inside if p.parts[0] not in sources and "__pycache__" not in p.parts}))
print(len(inside))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    missed, count = run.stdout.splitlines()[-2:]
    assert missed == "[]" and int(count) > 20


def test_an_unchanged_book_imports_no_torch() -> None:
    code = "import sys, tools.build_book; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
