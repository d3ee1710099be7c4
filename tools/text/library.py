"""CPython's standard library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tools.text.documents import Document

PYTHON_HELD_OUT = {
    "validation": {
        "argparse",
        "calendar",
        "dataclasses",
        "graphlib",
        "heapq",
        "json",
        "shelve",
        "statistics",
        "wsgiref",
    },
    "test": {
        "configparser",
        "fractions",
        "ipaddress",
        "pathlib",
        "queue",
        "sched",
        "string",
        "tempfile",
        "textwrap",
    },
}

# Tables, generated files and documentation in strings; and what other packages repeat.
PYTHON_LEFT_OUT = {
    "test", "encodings", "pydoc_data", "idlelib", "lib2to3", "distutils", "ensurepip", "__phello__", "_sysconfigdata",
    "turtle", "turtledemo", "locale", "keyword", "token", "opcode", "stringprep", "_pydecimal", "pickletools", "mailbox",
    "nntplib", "imaplib", "_compat_pickle", "_osx_support", "_aix_support", "msilib", "telnetlib", "ftplib", "tkinter",
    "optparse", "_pyio", "asyncio", "xmlrpc", "pydoc", "platform",
}  # fmt: skip

PYTHON_LICENCE = "usr/share/doc/libpython3.11-minimal/copyright"


def python(sources: dict[str, Path]) -> Iterator[Document]:
    """CPython 3.11's standard library, one document a file, split by top-level module or package."""
    files = {}
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        root = sources[package] / "usr/lib/python3.11"
        files |= {
            path.relative_to(root).as_posix(): path for path in root.rglob("*.py") if path.is_file()
        }
    for name, path in sorted(files.items()):
        module = name.split("/")[0].removesuffix(".py")
        text = path.read_text(encoding="utf-8")
        if (
            module in PYTHON_LEFT_OUT
            or module.startswith("_sysconfigdata")
            or name == "html/entities.py"
            or len(text) < 500
        ):
            continue
        split = next((s for s, modules in PYTHON_HELD_OUT.items() if module in modules), "train")
        yield Document(split, name, text)
