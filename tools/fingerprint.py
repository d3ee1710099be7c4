"""A hash of all that the book is made from, told without making any of it."""

import hashlib
import importlib.metadata
from pathlib import Path

from tools.chapters import Result

SOURCES = (
    "book", "notebooks", "lora_course", "tools", "benchmarks", "_config.yml", "_toc.yml", "pyproject.toml", "requirements.txt",
)  # fmt: skip
"""What a page can come from, besides the executed chapters."""
DISTRIBUTIONS = ("jupyter-book", "sphinx-book-theme", "pydata-sphinx-theme", "myst-nb", "Sphinx")
"""What gives the pages their shape."""


def fingerprint(root: Path, results: list[Result]) -> str:
    """Of the sources, the executed chapters, and the versions of what builds the pages."""
    digest = hashlib.sha256()
    for distribution in DISTRIBUTIONS:
        digest.update(importlib.metadata.version(distribution).encode())
    for top in [*(root / name for name in SOURCES), *(result.folder for result in results)]:
        for path in sorted([top, *top.rglob("*")]):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
