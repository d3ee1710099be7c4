"""What lanes share: the course's wheel, an environment of its own, and a committed notebook run in it from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools.chapters import ROOT, chapters

NO_NETWORK = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PIP_NO_INDEX": "1",
    **{f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")},
}  # fmt: skip
"""Settings under which whatever asks for a network finds none."""


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, from a copy, since setuptools writes beside the sources."""
    copy = folder / "copy"
    copy.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lora_course", copy / "lora_course", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, copy], check=True)
    return next(folder.glob("*.whl"))


class Place:
    """A virtual environment in a folder, with a Jupyter kernel in it.

    beside: also finds what is installed in this environment, behind its own (torch, say, which is large).
    course: so too the course; else only what the lane installs of it counts.
    """

    def __init__(
        self,
        folder: Path,
        beside: bool = True,
        python: str = sys.executable,
        course: bool = False,
    ) -> None:
        self.folder, self.python = folder, folder / "python" / "bin" / "python"
        if python == sys.executable:
            venv.create(folder / "python", with_pip=True, symlinks=os.name != "nt")
        else:
            subprocess.run([python, "-m", "venv", folder / "python"], check=True)
        if beside:
            site = subprocess.run(
                [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                capture_output=True, text=True, check=True,
            ).stdout.strip()  # fmt: skip
            (folder / "beside").mkdir()
            for path in Path(sysconfig.get_path("purelib")).iterdir():
                if course or "lora_course" not in path.name:
                    (folder / "beside" / path.name).symlink_to(path)
            (Path(site) / "beside.pth").write_text(f"{folder / 'beside'}\n")

    def install(self, *packages: str, alone: bool = False) -> None:
        command = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, *["--no-deps"] * alone, *packages], check=True)

    def versions(self) -> dict[str, str]:
        """Distribution → version, of what Python finds first."""
        code = "import importlib.metadata as m, json; print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in reversed(list(m.distributions()))}))"
        found = subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, check=True
        )
        return json.loads(found.stdout)

    def conflicts(self) -> set[str]:
        """The lines of `pip check`."""
        run = subprocess.run([self.python, "-m", "pip", "check"], capture_output=True, text=True)
        return set(run.stdout.splitlines()) if run.returncode else set()

    def run_notebook(
        self, stem: str, settings: dict[str, str], startup: str = "", cells: int | None = None
    ) -> str | None:
        """Runs the committed notebook in an empty folder; what failed, or None.

        startup: code the kernel runs first. cells: only so many of its code cells.
        """
        work = self.folder / f"work-{stem}"
        shutil.rmtree(work, ignore_errors=True)
        (work / "empty").mkdir(parents=True)
        profile = work / "ipython" / "profile_default" / "startup"
        profile.mkdir(parents=True)
        (profile / "00.py").write_text(startup)
        kernel = work / "jupyter" / "kernels" / "lane"
        kernel.mkdir(parents=True)
        keep = {
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONPATH", "LORA_COURSE_PROFILE")
        }
        environment = settings | {
            "IPYTHONDIR": str(work / "ipython"),
            "LORA_COURSE_CLAIMS": str(work),
        }
        arguments = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (kernel / "kernel.json").write_text(json.dumps({"argv": arguments, "display_name": "lane", "language": "python", "env": environment}))  # fmt: skip
        os.environ.clear()
        os.environ.update(keep | {"JUPYTER_PATH": str(work / "jupyter")})
        notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
        notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:cells]
        client = NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="lane",
            resources={"metadata": {"path": str(work / "empty")}},
        )
        try:
            client.execute()
        except (CellExecutionError, RuntimeError) as error:  # a cell raised, or the kernel died
            return f"{stem}: {str(error).strip()[-1500:]}"
        finally:
            nbformat.write(notebook, work / f"{stem}.ipynb")
        return None


def stems(given: list[str]) -> list[str]:
    return given or [path.stem for path in chapters()]
