"""The chapters: their sources in reading order, what an execution of one depends on, and the results that are kept."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

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


def key(chapter: Path, root: Path = ROOT) -> str:
    """SHA-256 over all that an execution depends on."""
    digest = hashlib.sha256()
    package = root / "lora_course"
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for path in [chapter, root / "requirements.txt", *sorted(files)]:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(profile().encode())
    return digest.hexdigest()


def cached(chapter: Path, root: Path = ROOT) -> Result | None:
    """The kept result of this very version of a chapter, if there is one."""
    folder = root / "build" / "executed" / f"{chapter.stem}-{key(chapter, root)[:16]}"
    if not (folder / "run.json").exists():
        return None
    return Result(
        chapter.stem, folder, json.loads((folder / "run.json").read_text())["seconds"], fresh=False
    )
