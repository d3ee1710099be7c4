"""`lora-course book` and `test` run what make runs, in a copy of the repository only."""

import subprocess
from pathlib import Path

import pytest

from lora_course import cli
from lora_course.machine import checkout
from tests.images import ROOT


def test_they_run_in_the_repository_from_any_folder_of_it(monkeypatch) -> None:
    asked = []

    def fake(command: list[str], cwd: Path, env: dict) -> subprocess.CompletedProcess:
        asked.append((command[1:], cwd, env["PYTHONPATH"]))
        assert env["PYTHONUTF8"] == "1"  # chapters and tools are UTF-8, Windows' code page is not
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.chdir(ROOT / "tests" / "lab")
    assert cli.main(["book"]) == 3 and cli.main(["test", "-k", "lora"]) == 3
    assert asked == [
        (["-m", "tools.build_book"], ROOT, str(ROOT)),
        (["-m", "pytest", "-k", "lora"], ROOT, str(ROOT)),
    ]
    recipes = (ROOT / "Makefile").read_text()
    for command in checkout.COMMANDS.values():
        assert f"@$(PY) {' '.join(command)}" in recipes


def test_elsewhere_it_says_where_the_repository_is(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["book"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"lora-course: {tmp_path} lies in no copy")
        and "git clone https://" in error
    )


@pytest.mark.parametrize("name", sorted(checkout.COMMANDS))
def test_help_names_them(name: str, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert f"\n    {name} " in capsys.readouterr().out
