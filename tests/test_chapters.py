"""Chapters execute under nbmake, once for each version of what they rest on, and a failure says where it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.toy_chapter import TOY
from tools import chapters as tools_chapters
from tools import published, run_chapters

AIM = 120  # seconds on two idle CPU cores; reported, not asserted: a slow machine passes
CHAPTERS = run_chapters.chapters()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project with one variant and one chapter."""
    monkeypatch.delenv("LORA_COURSE_PROFILE", raising=False)
    for name, text in {
        "lora_course/__init__.py": "",
        "lora_course/sparse.py": "ANSWER = 41\n",
        "lora_course/data/text.txt": "text",
        "requirements.txt": "torch\n",
        "notebooks/9_9_toy.md": TOY,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(root: Path) -> run_chapters.Result:
    return run_chapters.execute(root / "notebooks" / "9_9_toy.md", root)


def shown(result: run_chapters.Result) -> str:
    cells = nbformat.read(result.notebook, as_version=4).cells
    return "".join(
        out["data"]["text/plain"]
        for cell in cells
        for out in cell.get("outputs", [])
        if "data" in out
    )


@pytest.mark.slow
def test_a_chapter_executes_once_and_again_when_its_variant_changes(toy: Path) -> None:
    before = {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()}
    first, second = run(toy), run(toy)
    assert first.fresh and not second.fresh and first.folder == second.folder
    assert shown(first).startswith("41")
    assert {path: path.read_bytes() for path in before} == before, "a source was written to"
    (toy / "lora_course" / "sparse.py").write_text("ANSWER = 42\n")
    third = run(toy)
    assert third.fresh and shown(third).startswith("42")
    assert [path.name for path in third.claims] == ["9_9_toy.json"]


@pytest.mark.parametrize(
    "name",
    [
        "notebooks/9_9_toy.md",
        "lora_course/sparse.py",
        "lora_course/data/text.txt",
        "requirements.txt",
    ],
)
def test_the_key_covers_chapter_package_data_and_requirements(toy: Path, name: str) -> None:
    chapter = toy / "notebooks" / "9_9_toy.md"
    before = run_chapters.key(chapter, toy)
    assert run_chapters.key(chapter, toy) == before
    (toy / name).write_text((toy / name).read_text() + "\n")
    assert run_chapters.key(chapter, toy) != before


def test_the_key_covers_the_profile_and_not_compiled_files(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chapter = toy / "notebooks" / "9_9_toy.md"
    before = run_chapters.key(chapter, toy)
    (toy / "lora_course" / "__pycache__").mkdir()
    (toy / "lora_course" / "__pycache__" / "sparse.pyc").write_bytes(b"1")
    assert run_chapters.key(chapter, toy) == before
    monkeypatch.setenv("LORA_COURSE_PROFILE", "smol")
    assert run_chapters.key(chapter, toy) != before


def test_a_re_recording_leaves_executions_as_they_are_unless_the_form_is_a_new_one(
    toy: Path,
) -> None:
    chapter, data = toy / "notebooks" / "9_9_toy.md", toy / "lora_course" / "data"
    (data / "runs").mkdir()

    def key_after(run: dict) -> str:
        (data / "runs" / "tiny.json").write_text(json.dumps({"chapters": run}))
        (data / "forms.json").write_text(tools_chapters.forms(toy))
        return run_chapters.key(chapter, toy)

    now = tools_chapters.form(chapter)
    never, earlier = key_after({}), key_after({"9_9_toy": {"form": "before", "minutes": 1}})
    current = key_after({"9_9_toy": {"form": now, "minutes": 1}})
    assert len({never, earlier, current}) == 3
    assert key_after({"9_9_toy": {"form": now, "minutes": 2}, "1_1_other": {}}) == current
    assert key_after({"9_9_toy": {"minutes": 1}}) == earlier


def test_a_form_is_that_of_the_code_without_prose_and_set_up(toy: Path) -> None:
    chapter = toy / "notebooks" / "9_9_toy.md"
    before = tools_chapters.form(chapter)
    setup = "\n```{code-cell} ipython3\nsource = os.environ['LORA_COURSE_SOURCE']\n```\n"
    chapter.write_text(TOY.replace("# A toy\n", f"# Another\n{setup}"))
    assert tools_chapters.form(chapter) == before
    chapter.write_text(TOY.replace("sparse.ANSWER", "sparse.QUESTION"))
    assert tools_chapters.form(chapter) != before


@pytest.mark.slow
def test_gpu_cells_are_left_out_of_the_run_and_stay_in_the_page_without_output(toy: Path) -> None:
    (toy / "book").mkdir()
    (toy / "book" / "glossary.md").write_text("")
    page = nbformat.reads(published.notebook(run(toy), toy, set()), as_version=4)
    gpu = page.cells[2]
    assert gpu.metadata["tags"] == ["gpu"] and gpu.outputs == [] and "no GPU here" in gpu.source
    assert not any(
        out.get("name") == "stderr" for cell in page.cells for out in cell.get("outputs", [])
    )


@pytest.mark.slow
def test_a_failure_names_chapter_line_and_cell(toy: Path) -> None:
    chapter = toy / "notebooks" / "9_9_toy.md"
    chapter.write_text(TOY.replace("\nsparse.ANSWER\n", "\nsparse.QUESTION\n"))
    with pytest.raises(run_chapters.ChapterFailed) as failure:
        run(toy)
    message = str(failure.value)
    assert message.startswith("notebooks/9_9_toy.md:13: code cell 1 of 3 failed: import os, sys")
    assert "AttributeError" in message and "QUESTION" in message
    assert run_chapters.cached(chapter, toy) is None, "a failed run was kept"


@pytest.mark.slow
def test_a_killed_kernel_is_a_failure_that_names_its_cell(toy: Path) -> None:
    chapter = toy / "notebooks" / "9_9_toy.md"
    chapter.write_text(TOY.replace("\nsparse.ANSWER\n", "\nos.kill(os.getpid(), 9)\n"))
    with pytest.raises(run_chapters.ChapterFailed, match=r"9_9_toy\.md:13: code cell 1 of 3"):
        run(toy)


@pytest.mark.slow
def test_one_bad_chapter_does_not_keep_the_others_from_running(toy: Path) -> None:
    (toy / "notebooks" / "1_1_bad.md").write_text(TOY.replace("\nsparse.ANSWER\n", "\n1 / 0\n"))
    with pytest.raises(
        run_chapters.ChapterFailed, match=r"1 of 2 chapters failed:\n  notebooks/1_1_bad\.md:13"
    ):
        run_chapters.execute_all(toy)
    assert run_chapters.cached(toy / "notebooks" / "9_9_toy.md", toy)


def test_an_unknown_chapter_or_profile_ends_the_command_with_what_there_is() -> None:
    for arguments, settings, expected in [
        (["9_9_none"], {}, "9_9_none"),
        ([], {"LORA_COURSE_PROFILE": "huge"}, "tiny, smol, t4, large"),
    ]:
        command = subprocess.run(
            [sys.executable, "-m", "tools.run_chapters", *arguments],
            cwd=run_chapters.ROOT,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        if CHAPTERS or arguments:
            assert command.returncode != 0 and expected in command.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs_and_saves_claims(
    chapter: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_COURSE_PROFILE", raising=False)
    with capfd.disabled():
        print()
        result = run_chapters.execute(chapter)
        print(f"{chapter.stem}: {result.seconds:.0f} s; the aim is {AIM} on two idle cores")
    assert [path.stem for path in result.claims] == [chapter.stem], (
        "the chapter saves its claims under its own name"
    )
    claims = json.loads(result.claims[0].read_text())["claims"]
    assert claims and all(claim["holds"] or claim["explanation"] for claim in claims), (
        "what does not hold is explained"
    )


@pytest.mark.gpu
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs_on_a_gpu_with_its_gpu_cells(
    chapter: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_COURSE_PROFILE", "t4")
    with capfd.disabled():
        result = run_chapters.execute(chapter)
    cells = nbformat.read(result.notebook, as_version=4).cells
    assert all(cell.execution_count for cell in cells if "gpu" in cell.metadata.get("tags", []))
