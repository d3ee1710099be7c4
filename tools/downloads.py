"""Puts what readers download into a folder: the notebooks in one archive, and the book as PDF if `make pdf` printed it.

python -m tools.downloads _build/html
"""

import argparse
import shutil
import zipfile
from pathlib import Path

from tools import facts
from tools.print_book import pdf_path


def collect(folder: Path) -> list[Path]:
    """Writes the files and returns them. The archive's bytes depend on the notebooks alone."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{facts.read().name}-notebooks.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((facts.ROOT / "notebooks").glob("*.ipynb")):
            file.writestr(zipfile.ZipInfo(f"notebooks/{path.name}"), path.read_bytes())
    made = [archive]
    if pdf_path().exists():
        made.append(Path(shutil.copy(pdf_path(), folder)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for path in collect(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
