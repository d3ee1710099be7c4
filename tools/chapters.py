"""The chapters: their sources in reading order, what an execution of one depends on, and the results that are kept."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parent.parent

GPU_PROFILES = ("t4", "large")
CELL_TIMEOUT = {"tiny": 600, "smol": 900, "t4": 1800, "large": 7200}  # seconds


def profile() -> str:
    """The profile chapters run under: LORA_COURSE_PROFILE, else `tiny`, so that a book is the same on every machine."""
    name = os.environ.get("LORA_COURSE_PROFILE") or "tiny"
    if name not in CELL_TIMEOUT:
        raise SystemExit(
            f"LORA_COURSE_PROFILE={name!r} is not a profile; choose one of {', '.join(CELL_TIMEOUT)}"
        )
    return name


def chapters(root: Path = ROOT) -> list[Path]:
    """The chapters' sources in reading order."""
    return sorted(
        (root / "notebooks").glob("[0-9]*.md"),
        key=lambda path: [int(n) for n in path.stem.split("_")[:2]],
    )


def title(chapter: Path) -> str:
    """The first heading of a chapter."""
    found = re.search(r"^# (.+)$", chapter.read_text(), re.MULTILINE)
    if not found:
        raise ValueError(f"{chapter.name}: no line `# Title`")
    return found[1]


@dataclass(frozen=True)
class Result:
    """One executed chapter; `fresh` is False where it came out of the cache."""

    stem: str
    folder: Path
    seconds: float
    fresh: bool

    @property
    def notebook(self) -> Path:
        return self.folder / f"{self.stem}.ipynb"

    @property
    def claims(self) -> list[Path]:
        return sorted((self.folder / "claims").glob("*.json"))


def form(chapter: Path) -> str:
    """A short hash of a chapter's code, by which a record tells whether it was made with this code. The set-up cell, which
    takes no time where the course is installed, is left out."""
    code = [cell for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]
    text = "\0".join(cell.source for cell in code if "LORA_COURSE_SOURCE" not in cell.source)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def forms(root: Path = ROOT) -> str:
    """data/forms.json: the form of each chapter, for `preflight`, which has no chapters where the course is installed."""
    found = {chapter.stem: form(chapter) for chapter in chapters(root)}
    return json.dumps(found, indent=1) + "\n"


def record_state(chapter: Path, root: Path = ROOT) -> str:
    """Whether the chapter was timed under this profile, and in its present form: what it prints of that besides minutes."""
    path = root / "lora_course" / "data" / "runs" / f"{profile()}.json"
    runs = json.loads(path.read_text())["chapters"] if path.exists() else {}
    if chapter.stem not in runs:
        return "none"
    return "current" if runs[chapter.stem].get("form") == form(chapter) else "earlier"


def key(chapter: Path, root: Path = ROOT) -> str:
    """SHA-256 over all that an execution depends on.

    Of the records of runs it is their state alone: minutes are measured by executing, so with them in the key no execution
    would ever be kept. When a new form was recorded, the chapter is executed once more, to say so.
    """
    digest = hashlib.sha256()
    package = root / "lora_course"
    runs, known = package / "data" / "runs", package / "data" / "forms.json"
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    files = sorted(p for p in files if p != known and runs not in p.parents)
    for path in [chapter, root / "requirements.txt", *files]:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(profile().encode())
    digest.update(record_state(chapter, root).encode())
    return digest.hexdigest()


def cached(chapter: Path, root: Path = ROOT) -> Result | None:
    """The kept result of this very version of a chapter, if there is one."""
    folder = root / "build" / "executed" / f"{chapter.stem}-{key(chapter, root)[:16]}"
    if not (folder / "run.json").exists():
        return None
    return Result(
        chapter.stem, folder, json.loads((folder / "run.json").read_text())["seconds"], fresh=False
    )
