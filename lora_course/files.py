"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def make_folder(folder: str | Path) -> Path:
    """The folder as a path, made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a stopped process leaves the old one."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
