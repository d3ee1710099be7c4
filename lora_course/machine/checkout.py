"""`lora-course book` and `lora-course test`: what `make book` and `make test` do after installing, on every system."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

COMMANDS = {"book": ["-m", "tools.build_book"], "test": ["-m", "pytest"]}


def run(command: str, arguments: list[str]) -> int:
    """Runs one of `COMMANDS` in the repository that the working directory lies in, and returns its exit status.

    Raises FileNotFoundError outside of a repository: the wheel holds the package, and neither chapters nor tests.
    """
    root = repository(Path.cwd())
    settings = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONUTF8": "1",
    }  # Windows reads files in its code page
    return subprocess.run([sys.executable, *COMMANDS[command], *arguments], cwd=root, env=settings).returncode  # fmt: skip


def repository(folder: Path) -> Path:
    """The folder at or above `folder` that holds the chapters."""
    for path in (folder, *folder.parents):
        if (path / "notebooks").is_dir() and (path / "tools" / "build_book.py").is_file():
            return path
    urls = importlib.metadata.metadata("lora-course").get_all("Project-URL") or []
    home = next((text.split(", ")[1] for text in urls if text.startswith("Repository")), "")
    raise FileNotFoundError(
        f"{folder} lies in no copy of the course's repository: git clone {home}, and run this in there"
    )
