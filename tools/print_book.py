"""The book as one PDF: a single page, built by Sphinx from the stage that `make book` left, printed by Chromium.

python -m tools.print_book      _build/<name>-<version>.pdf
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools import facts
from tools.chapters import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-pdf-header-footer",
    "--no-proxy-server",
)
PATIENCE = 120_000  # milliseconds of the page's own time, in which MathJax sets 13 chapters


def pdf_path() -> Path:
    known = facts.read()
    return ROOT / "_build" / f"{known.name}-{known.version}.pdf"


def print_book() -> Path:
    """Builds the single page and prints it.

    Raises SystemExit where `make book` has left no stage, or no browser is installed.
    """
    stage = ROOT / "build" / "book"
    if not (stage / "_config.yml").exists():
        raise SystemExit("there is no staged book: run `make book` first")
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"printing needs one of {', '.join(BROWSERS)}")
    program = Path(sys.executable).with_name("jupyter-book")
    settings = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [program, "build", stage, "--path-output", ROOT, "--builder", "singlehtml"]
    subprocess.run(command, env=settings, cwd=ROOT, check=True)
    page = ROOT / "_build" / "singlehtml" / "index.html"
    pdf_path().unlink(missing_ok=True)
    subprocess.run(
        [browser, *FLAGS, f"--virtual-time-budget={PATIENCE}", f"--print-to-pdf={pdf_path()}", page.as_uri()],
        check=True,
    )  # fmt: skip
    if not pdf_path().exists():
        raise SystemExit(f"{browser} wrote no {pdf_path()}")
    return pdf_path()


if __name__ == "__main__":
    print(print_book())
