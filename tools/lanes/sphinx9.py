"""Builds the staged book with plain Sphinx 9, since Jupyter Book 1 is in maintenance and keeps Sphinx at 7.

    python -m tools.lanes.sphinx9       after `make book`

The configuration is the one that Jupyter Book makes from _config.yml; a warning fails the lane.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.chapters import ROOT
from tools.lanes.places import Place

PACKAGES = ("sphinx>=9,<10", "myst-nb>=1.4,<2", "sphinx-book-theme>=1.4,<2", "sphinx-external-toc", "sphinx-togglebutton")  # fmt: skip
JUPYTER_BOOKS_OWN = (
    "sphinx_jupyterbook_latex",
    "sphinx_thebe",
    "sphinx_comments",
    "sphinx_multitoc_numbering",
)


def configuration(stage: Path) -> str:
    """conf.py as Jupyter Book writes it, without the extensions that are its own and hold Sphinx back."""
    program = Path(sys.executable).with_name("jupyter-book")
    subprocess.run([program, "config", "sphinx", stage], check=True, capture_output=True)
    conf = stage / "conf.py"
    text = conf.read_text()
    conf.unlink()
    for extension in JUPYTER_BOOKS_OWN:
        text = text.replace(f"'{extension}', ", "").replace(f", '{extension}'", "")
    # conf.py lies elsewhere, and these paths count from where it lies
    return text.replace("'book/_static", f"'{stage}/book/_static")


def main() -> None:
    stage = ROOT / "build" / "book"
    if not (stage / "_config.yml").exists():
        raise SystemExit("there is no staged book: run `make book` first")
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), course=True)
        place.install(*PACKAGES)
        (Path(folder) / "conf.py").write_text(configuration(stage))
        settings = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [
            place.python,
            "-m",
            "sphinx",
            "-b",
            "html",
            "-c",
            folder,
            "-W",
            "--keep-going",
            "-q",
        ]
        built = subprocess.run([*command, stage, Path(folder) / "html"], env=settings)
        pages = len(list((Path(folder) / "html").rglob("*.html")))
    print(f"{pages} pages with Sphinx 9")
    raise SystemExit(built.returncode)


if __name__ == "__main__":
    main()
