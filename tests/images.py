"""Python environments for tests, made in a second: distributions of given names and versions, and an index of wheels."""

import base64
import hashlib
import os
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import packaging
import pip

from tools.facts import ROOT, project


def wheel(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), files: dict | None = None
) -> Path:
    """Writes a pure Python wheel; without `files` it holds an empty module of its name."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    content = dict(files or {}) or {f"{module}/__init__.py": f"__version__ = {version!r}\n"}
    content |= {
        f"{info}/METADATA": "\n".join([*metadata, *(f"Requires-Dist: {need}" for need in requires)]) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
    record = [f"{path},{_digest(text)},{len(text.encode())}" for path, text in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name_inside, text in content.items():
            archive.writestr(name_inside, text)
    return path


def course_wheel(folder: Path, version: str | None = None) -> Path:
    """This checkout's `lora_course.machine` and requirements, as a wheel of the course, of its own version by default."""
    package = ROOT / "lora_course"
    sources = [package / "__init__.py", *(package / "machine").glob("*.py")]
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sources}
    facts = project()
    version = version or facts["version"]
    return wheel(folder, facts["name"], version, tuple(facts["dependencies"]), files)


def uv(folder: Path, does: str) -> Path:
    """A folder for PATH with a `uv` in it that notes what it is asked, then does what is given (a line of sh)."""
    folder.mkdir()
    (folder / "uv").write_text(f'#!/bin/sh\necho "$*" >> {folder}/asked\n{does}\n')
    (folder / "uv").chmod(0o755)
    return folder


class Image:
    """A virtual environment with empty distributions in it, and a folder of wheels as its only package index."""

    def __init__(self, folder: Path, distributions: dict[str, str], with_pip: bool = True) -> None:
        self.index = folder / "index"
        self.index.mkdir(parents=True)
        venv.create(folder / "python", symlinks=os.name != "nt", with_pip=False)
        self.python = folder / "python" / "bin" / "python"
        paths = {"base": str(folder / "python"), "platbase": str(folder / "python")}
        self.site = Path(sysconfig.get_path("purelib", "venv", paths))
        # pip and packaging are those of the environment that runs the tests
        if with_pip:
            (self.site / "pip").symlink_to(Path(pip.__file__).parent)
        # the second as a copy, since a distribution of that name writes into it
        shutil.copytree(Path(packaging.__file__).parent, self.site / packaging.__name__)
        for name, version in distributions.items():
            self.put(wheel(folder / "there", name, version))

    def run(
        self, code: str, hosted: str | None = "colab", **settings: str
    ) -> subprocess.CompletedProcess:
        """Runs code in a fresh Python of the image, which takes itself for Colab, Kaggle or (None) a laptop."""
        keep = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP", "KAGGLE", "LORA"))}  # fmt: skip
        keep |= {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_CONFIG_FILE": os.devnull,
        }
        keep |= {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"} if hosted == "kaggle" else {}
        start = "import sys; sys.modules['google.colab'] = sys\n" if hosted == "colab" else ""
        return subprocess.run(
            [self.python, "-c", start + code], capture_output=True, text=True, env=keep | settings,
            cwd=self.index,
        )  # fmt: skip

    def put(self, distribution: Path) -> None:
        """Unpacks a wheel, as an installation would."""
        with zipfile.ZipFile(distribution) as archive:
            archive.extractall(self.site)

    def versions(self) -> dict[str, str]:
        code = "import importlib.metadata as m\nfor d in m.distributions(): print(d.name.lower(), d.version)"
        return dict(line.split() for line in self.run(code, None).stdout.splitlines())


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("=")
