"""What installs packages into this Python: pip, or uv where the environment is of its making and holds no pip."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable


def installer() -> list[str]:
    """The command to which packages are added. Raises RuntimeError with one sentence where there is none."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    if shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable]
    raise RuntimeError(
        f"{sys.executable} has no pip, and no uv is on the path: run python -m ensurepip with it, and this again"
    )


def install(packages: Iterable[str], alone: bool) -> None:
    """Installs packages as pip reads them.    alone: without what they require.

    Raises RuntimeError with one sentence, the installer's own reason in it.
    """
    packages, command = list(packages), installer()
    if alone:  # where uv resolved what they require, --upgrade would replace that too
        command += ["--upgrade", "--no-deps"]
    run = subprocess.run(
        [*command, "--quiet", *packages],
        capture_output=True,
        text=True,
        errors="replace",  # pip writes in Windows' code page when it is piped, uv in UTF-8
        stdin=subprocess.DEVNULL,
    )
    if run.returncode:
        name = "uv" if command[0] == "uv" else "pip"
        said = f"{name} could not install {', '.join(packages)}: {reason(run.stderr)}"
        if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
            said += "; if nothing was reached, switch the internet on (Session options > Internet)"
        raise RuntimeError(said)


def reason(errors: str) -> str:
    """pip's last line that begins with ERROR, since warnings and advice surround it; all of what uv says, in one line."""
    lines = [line for line in errors.splitlines() if line.startswith("ERROR")]
    return lines[-1] if lines else " ".join(errors.split()) or "it did not say why"


def shell_lines(packages: Iterable[str]) -> list[str]:
    """What to paste into a shell, cmd.exe included: to it ' quotes nothing, and < reads a file."""
    python = f'"{sys.executable}"'
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return [f"uv pip install --python {python} {quoted(packages)}"]
    first = [] if importlib.util.find_spec("pip") else ["python -m ensurepip"]
    return [*first, f"python -m pip install --upgrade {quoted(packages)}"]


def cell_line(packages: Iterable[str]) -> str:
    """What to paste into a notebook's cell: `%pip` and `%run` take the notebook's own Python."""
    if importlib.util.find_spec("pip"):
        return f"%pip install --upgrade {quoted(packages)}"
    if shutil.which("uv"):
        return f'!uv pip install --python "{sys.executable}" {quoted(packages)}'
    return "%run -m ensurepip"


def quoted(packages: Iterable[str]) -> str:
    return " ".join(f'"{package}"' for package in packages)
