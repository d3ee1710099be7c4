"""`lora_course.machine.installer`: pip, or uv, or a sentence; and the same in the lines to paste."""

import importlib.util
import sys
from pathlib import Path

import pytest

from lora_course.machine import installer
from tests.images import uv

PACKAGES = ["torchao<0.17,>=0.16.0", "peft"]
QUOTED = '"torchao<0.17,>=0.16.0" "peft"'


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")


def with_uv(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str = "") -> None:
    monkeypatch.setenv("PATH", f"{uv(folder / 'bin', does)}:/bin:/usr/bin")


def test_pip_is_taken_where_it_is() -> None:
    assert installer.installer() == [sys.executable, "-m", "pip", "install"]
    assert installer.cell_line(PACKAGES) == f"%pip install --upgrade {QUOTED}"
    assert installer.shell_lines(PACKAGES) == [f"python -m pip install --upgrade {QUOTED}"]


def test_uv_is_taken_where_pip_is_not(no_pip, tmp_path, monkeypatch) -> None:
    with_uv(tmp_path, monkeypatch)
    assert installer.installer() == ["uv", "pip", "install", "--python", sys.executable]
    line = f'uv pip install --python "{sys.executable}" {QUOTED}'
    assert installer.cell_line(PACKAGES) == f"!{line}"
    assert installer.shell_lines(PACKAGES) == [line]


def test_without_either_it_says_how_to_get_pip(no_pip) -> None:
    with pytest.raises(RuntimeError, match="python -m ensurepip"):
        installer.install(PACKAGES, alone=True)
    assert installer.cell_line(PACKAGES) == "%run -m ensurepip"
    assert installer.shell_lines(PACKAGES)[0] == "python -m ensurepip"


def test_the_installers_own_reason_is_in_the_sentence(no_pip, tmp_path, monkeypatch) -> None:
    with_uv(tmp_path, monkeypatch, "echo '  × No solution' >&2; echo '  ╰─▶ for peft' >&2; exit 1")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    with pytest.raises(RuntimeError) as refused:
        installer.install(["peft"], alone=False)
    assert str(refused.value) == "uv could not install peft: × No solution ╰─▶ for peft"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(RuntimeError, match="switch the internet on"):
        installer.install(["peft"], alone=False)


def test_of_pips_lines_the_last_error_counts() -> None:
    errors = "WARNING: slow\nERROR: none such (from versions: none)\nERROR: no peft\n\n[notice] new pip\n"
    assert installer.reason(errors) == "ERROR: no peft"
    assert installer.reason("") == "it did not say why"
