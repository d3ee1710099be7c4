"""The set-up cell and what it rests on, in small environments that have the images' versions."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import jupytext
import peft.import_utils
import pytest
from packaging.requirements import Requirement

from lora_course.machine import environment
from lora_course.machine.environment import installed, wanting
from tests.images import Image, course_wheel, wheel
from tools import facts
from tools.chapters import chapters

CELL = jupytext.read(chapters()[0]).cells[[c.cell_type for c in jupytext.read(chapters()[0]).cells].index("code")].source  # fmt: skip
NEEDED = [Requirement(text) for text in facts.project()["dependencies"]]
LISTS = Path(__file__).parents[1] / "images"
OLD_TORCHAO = "0.10.0"


def lowest(need: Requirement) -> str:
    return next(part.version for part in need.specifier if part.operator in (">=", "=="))


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """All that the course needs, but an older PEFT, no bitsandbytes, and a torchao that PEFT refuses; the index has newer ones."""
    there = {need.name: lowest(need) for need in NEEDED if need.name != "bitsandbytes"}
    there |= {"peft": "0.20.0", "torchao": OLD_TORCHAO, "gradio": "6.24.0"}
    made = Image(tmp_path, there)
    for need in NEEDED:
        wheel(made.index, need.name, lowest(need))
    for name in ("torch", "numpy", "gradio"):
        wheel(made.index, name, "99.0")
    for version in ("0.16.1", "0.18.0"):
        wheel(made.index, "torchao", version, ("torch",))
    course_wheel(made.index)
    return made


def source(image: Image) -> str:
    return str(next(image.index.glob("lora_course-*.whl")))


@pytest.mark.parametrize("hosted", ["colab", "kaggle"])
def test_the_cell_installs_what_is_missing_mends_torchao_and_touches_nothing_else(
    image: Image, hosted: str
) -> None:
    before = image.versions()
    run = image.run(CELL, hosted, LORA_COURSE_SOURCE=source(image))
    assert run.returncode == 0, run.stderr
    after = image.versions()
    assert after["torchao"] == "0.16.1" and after["peft"] == "0.21"
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"lora-course", "peft", "bitsandbytes", "torchao"}
    (line,) = run.stdout.splitlines()
    for part in ("peft 0.21 (was 0.20.0)", "torchao 0.16.1 (was 0.10.0)", "bitsandbytes 0.49 (new)", f"torch {before['torch']}"):  # fmt: skip
        assert part in line
    again = image.run(CELL, hosted, LORA_COURSE_SOURCE="/nowhere.whl")
    version = facts.read().version
    assert (again.stdout, again.returncode) == (f"lora-course {version} is ready.\n", 0)


def test_a_newer_transformers_moves_its_own_within_their_major_version(tmp_path: Path) -> None:
    """Fault 34: huggingface-hub 2 came along, and diffusers and gradio want 1."""
    there = {need.name: lowest(need) for need in NEEDED}
    there |= {"transformers": "5.0.0", "huggingface-hub": "1.11.0", "tokenizers": "0.22.2"}
    image = Image(tmp_path, there)
    wheel(image.index, "transformers", "5.23.0", ("huggingface-hub>=1.31,<3", "tokenizers>=0.23"))
    for name, version in {"huggingface-hub": "1.40.0", "tokenizers": "0.23.3"}.items():
        wheel(image.index, name, version)
    wheel(image.index, "huggingface-hub", "2.4.0")
    course_wheel(image.index)
    run = image.run(CELL, "kaggle", LORA_COURSE_SOURCE=source(image))
    assert run.returncode == 0, run.stderr
    said = run.stdout
    for part in ("transformers 5.23.0 (was 5.0.0)", "huggingface-hub 1.40.0 (was 1.11.0)"):
        assert part in said
    assert "transformers" not in said.partition("as they were")[2]
    after = image.versions()
    assert after["huggingface-hub"] == "1.40.0" and after["tokenizers"] == "0.23.3"


def test_a_torchao_that_is_not_there_is_not_brought(image: Image) -> None:
    for path in image.site.glob("torchao*"):
        subprocess.run(["rm", "-r", path], check=True)
    run = image.run(CELL, LORA_COURSE_SOURCE=source(image))
    assert run.returncode == 0 and "torchao" not in image.versions(), run.stderr


def test_a_package_that_the_session_has_loaded_asks_for_a_restart_until_there_was_one(
    image: Image,
) -> None:
    cell_again = f"""
try:
    exec({CELL!r})
except SystemExit as stopped:
    print(stopped)
exec({CELL!r})
"""
    run = image.run(f"import peft\n{cell_again}", LORA_COURSE_SOURCE=source(image))
    assert run.returncode == 1, run.stdout
    for said in (run.stdout, run.stderr):
        assert "older peft is loaded" in said and "restart" in said
    assert image.run(CELL).stdout.endswith("is ready.\n")


def test_a_loaded_package_that_another_one_takes_along_asks_for_a_restart_too(
    tmp_path: Path,
) -> None:
    """Kaggle: who logs in to the hub first has its client loaded, which a newer transformers replaces."""
    there = {need.name: lowest(need) for need in NEEDED}
    image = Image(tmp_path, there | {"transformers": "5.0.0", "huggingface-hub": "1.11.0"})
    wheel(image.index, "transformers", "5.23.0", ("huggingface-hub>=1.31,<3",))
    wheel(image.index, "huggingface-hub", "1.40.0")
    course_wheel(image.index)
    run = image.run(f"import huggingface_hub\n{CELL}", "kaggle", LORA_COURSE_SOURCE=source(image))
    assert run.returncode == 1 and "older huggingface-hub is loaded" in run.stderr


def test_a_clone_on_the_path_is_no_installation(image: Image) -> None:
    """Its folder is found before a distribution is there, and what it needs stands in the distribution's metadata."""
    with zipfile.ZipFile(source(image)) as archive:
        members = [name for name in archive.namelist() if name.startswith("lora_course/")]
        archive.extractall(image.index, members)  # the working directory
    run = image.run(CELL, hosted=None)
    assert run.returncode == 1 and "Install the course first" in run.stderr
    run = image.run(CELL, LORA_COURSE_SOURCE=source(image))
    assert run.returncode == 0 and "peft 0.21 (was 0.20.0)" in run.stdout, run.stderr


def test_no_network_or_a_repository_that_moved_ends_with_a_sentence(image: Image) -> None:
    gone = "https://localhost:9/lora_course-9.9-py3-none-any.whl"
    run = image.run(CELL, "kaggle", LORA_COURSE_SOURCE=gone, PIP_RETRIES="0")
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert f"Nothing came from {gone} (Could not install" in run.stderr
    assert "Connection refused" in run.stderr and "Switch the internet on" in run.stderr
    # the wheel is there, the index is not
    run = image.run(CELL, "kaggle", LORA_COURSE_SOURCE=source(image), PIP_FIND_LINKS="/nowhere")
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "switch the internet on" in run.stderr and "bitsandbytes" in run.stderr


def test_a_wheel_that_pip_refuses_is_not_blamed_on_the_network(image: Image) -> None:
    refused = image.index / Path(source(image)).name.replace("py3-none", "cp399-cp399")
    Path(source(image)).rename(refused)
    run = image.run(CELL, LORA_COURSE_SOURCE=str(refused))
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert f"{refused.name} is not a supported wheel on this platform" in run.stderr


def test_on_a_laptop_it_says_what_to_paste(image: Image) -> None:
    run = image.run(CELL, hosted=None)
    wanted = f'%pip install "{facts.read().url}/releases/download/'
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and wanted in run.stderr
    assert image.run(CELL, LORA_COURSE_SOURCE=source(image)).returncode == 0
    wheel(image.index, "torchao", OLD_TORCHAO)
    pip = [image.python, "-m", "pip", "install", "-q", "--no-index", "--find-links", image.index]
    subprocess.run([*pip, f"torchao=={OLD_TORCHAO}"], check=True, capture_output=True)
    run = image.run(CELL, hosted=None)
    assert run.returncode == 1 and '%pip install --upgrade "torchao<0.17,>=0.16.0"' in run.stderr


def test_a_package_that_would_need_another_torch_is_refused(image: Image) -> None:
    wheel(image.index, "bitsandbytes", "0.60", ("torch>=98",))
    before = image.versions()
    run = image.run(CELL, LORA_COURSE_SOURCE=source(image))
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert f"would need torch>=98, and torch {before['torch']} is here" in run.stderr
    assert image.versions()["torch"] == before["torch"]


def test_another_version_than_the_chapters_is_said(image: Image) -> None:
    assert image.run(CELL, LORA_COURSE_SOURCE=source(image)).returncode == 0
    other = CELL.replace(f'"{facts.read().version}"', '"0.0.1"')
    assert "written with lora-course 0.0.1" in image.run(other).stdout


@pytest.mark.parametrize("start", ["", "import lora_course\n"])
def test_another_version_on_a_hosted_machine_gives_way_to_the_chapters(
    tmp_path: Path, start: str
) -> None:
    image = Image(tmp_path, {need.name: lowest(need) for need in NEEDED})
    course_wheel(image.index)
    image.put(course_wheel(tmp_path / "older", "0.0.9"))
    run = image.run(f"{start}{CELL}", LORA_COURSE_SOURCE=source(image))
    version = facts.read().version
    if start:
        assert run.returncode == 1 and "lora-course 0.0.9 is loaded" in run.stderr
        assert "restart the session" in run.stderr
        run = image.run(CELL)
    assert run.stdout == f"lora-course {version} is ready.\n", run.stderr


def test_another_version_stays_where_the_chapters_cant_be_had(tmp_path: Path) -> None:
    image = Image(tmp_path, {need.name: lowest(need) for need in NEEDED})
    image.put(course_wheel(tmp_path / "older", "0.0.9"))
    run = image.run(CELL, LORA_COURSE_SOURCE="/nowhere.whl")
    assert run.returncode == 0, run.stderr
    assert "0.0.9 is here.\nlora-course 0.0.9 is ready." in run.stdout


@pytest.mark.parametrize(
    ("here", "asked", "taken"),
    [
        ("0.22.2", "tokenizers==0.23.*", "tokenizers<0.24,==0.23.*"),
        ("0.22.2", "tokenizers>=0.23", "tokenizers<0.24,>=0.23"),
        ("1.4", "hub~=2.1", "hub~=2.1"),
        ("1.4", "hub>2", "hub>2"),
        ("1.4", "hub>=1.5", "hub<2,>=1.5"),
    ],
)
def test_a_requirement_is_kept_near_what_is_there(
    here: str, asked: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = Requirement(asked)
    monkeypatch.setattr(environment, "installed", lambda: {need.name: here})
    assert environment.bounded(need) == taken


def test_every_chapter_begins_with_the_same_cell() -> None:
    for chapter in chapters():
        code = [cell for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]
        assert code[0].source == CELL, chapter.name


@pytest.mark.parametrize(("name", "more"), [("colab-gpu", set()), ("kaggle", {"transformers"})])
def test_the_ranges_are_met_by_the_images_but_for_what_the_cell_installs(
    name: str, more: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = facts.project()["dependencies"]  # the installed ones may be those of another day
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: stated)
    lines = (LISTS / f"{name}.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if "==" in line]
    versions = {name.lower().replace("_", "-"): version for name, version in pins}
    assert {need.name for need in wanting(versions)} == {"peft", "bitsandbytes", "torchao"} | more


@pytest.mark.parametrize(
    ("name", "older", "accepted"),
    [("torchao", "0.15.0", "0.16.0"), ("gptqmodel", "6.0.3", "7.0.0")],
)
def test_what_peft_refuses_is_what_its_own_check_refuses(
    name: str, older: str, accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = getattr(peft.import_utils, f"is_{name}_available").__wrapped__
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: found == name or None)
    monkeypatch.setattr(peft.import_utils, "is_optimum_available", lambda: True)
    here = installed()
    for version, refused in ((older, True), (accepted, False)):
        there = here | {name: version, "optimum": "2.0.0"}
        monkeypatch.setattr(importlib.metadata, "version", there.__getitem__)
        assert [need.name for need in wanting(there)] == [name] * refused
        if refused:
            with pytest.raises(ImportError, match=name):
                check()
        else:
            check()


def test_this_environment_wants_nothing() -> None:
    run = [sys.executable, "-c", "import lora_course.machine.environment as e, sys; print(e.wanting(), 'torch' in sys.modules)"]  # fmt: skip
    assert subprocess.run(run, capture_output=True, text=True).stdout == "[] False\n"
