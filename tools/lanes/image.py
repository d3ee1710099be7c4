"""A hosted image imitated: its packages at its versions, its way to be recognised, and chapters from one file each.

    python -m tools.lanes.image colab-gpu 0_1_lora 3_2_distillation
    python -m tools.lanes.image kaggle --set-up-only

The list under tests/images/ says what is there; of it are installed the packages that the course or PEFT can meet. torch is
the one of this environment, unless --torch says to install the list's from the index that pip is set to. Nothing but the
package index is reached. Fails if torch or numpy changed, if `pip check` says more than before, or if a cell raises.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from tools.chapters import ROOT
from tools.lanes.places import Place, build_wheel, stems

# What the course needs, what those need, and neighbours on the image that state versions of them.
MET = (Path(__file__).parent / "met.txt").read_text().split()
UNTOUCHED = ("torch", "numpy", "pandas", "pyarrow", "datasets", "accelerate")
COLAB = """import importlib.machinery, sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.modules["google.colab"].__spec__ = importlib.machinery.ModuleSpec("google.colab", None)
"""


def pins(name: str, torch: bool) -> list[str]:
    """`package==version` of what is installed from an image's list."""
    wanted = {package.lower() for package in MET} | ({"torch"} if torch else set())
    lines = (ROOT / "tests" / "images" / f"{name}.txt").read_text().splitlines()
    found = [re.sub(r"\+cu\d+$", "", line) for line in lines if "==" in line]
    return [line for line in found if line.partition("==")[0].lower() in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", choices=("colab-gpu", "kaggle"))
    parser.add_argument("stems", nargs="*", metavar="STEM")
    parser.add_argument("--set-up-only", action="store_true", help="only the set-up cell")
    parser.add_argument("--torch", action="store_true", help="install the list's torch")
    parser.add_argument(
        "--python", default=sys.executable, help="the image's Python, such as python3.13"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(run(given, Path(folder)))


def run(given: argparse.Namespace, folder: Path) -> str | int:
    wheel = build_wheel(folder / "wheel")
    place = Place(folder, beside=not given.torch, python=given.python)
    place.install(*pins(given.image, given.torch), alone=True)
    # What the list leaves to the system, or names by another package.
    place.install(
        "backcall", "pickleshare", "pytz", "tzdata", *["setuptools", "ipykernel"] * given.torch
    )
    before, conflicts = place.versions(), place.conflicts()
    settings = {
        "LORA_COURSE_SOURCE": str(wheel),
        "LORA_COURSE_PROFILE": "tiny",
        "HF_HUB_OFFLINE": "1",
    }
    settings |= {"KAGGLE_KERNEL_RUN_TYPE": "Batch"} if given.image == "kaggle" else {}
    failures = []
    startup = COLAB if given.image.startswith("colab") else ""
    wanted = stems(given.stems)
    for stem in wanted[:1] if given.set_up_only else wanted:
        failure = place.run_notebook(
            stem, settings, startup, cells=1 if given.set_up_only else None
        )
        print(failure or f"{stem}: passed", flush=True)
        failures += [stem] if failure else []
    after = place.versions()
    changed = {
        name: (before.get(name), version)
        for name, version in after.items()
        if before.get(name) != version
    }
    print("changed:", ", ".join(f"{name} {old} → {new}" for name, (old, new) in changed.items()))
    failures += [f"{name} changed" for name in UNTOUCHED if name in changed]
    failures += sorted(place.conflicts() - conflicts)
    return f"failed: {'; '.join(failures)}" if failures else 0


if __name__ == "__main__":
    main()
