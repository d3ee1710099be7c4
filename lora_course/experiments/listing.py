"""The recorded studies as a list, told from their records alone: nothing here takes long to import."""

import json
from pathlib import Path

STUDIES = Path(__file__).resolve().parents[1] / "data" / "studies"


def record_path(name: str) -> Path:
    """The course's own record of a study."""
    return STUDIES / f"{name}.json"


def summary(name: str, title: str, path: Path | None = None) -> str:
    """One line: the study, the runs of its record, and when they were made and verified."""
    path = path or record_path(name)
    record = (
        json.loads(path.read_text(encoding="utf-8"))
        if path.exists()
        else {"made": [], "verified": None, "runs": {}}
    )
    dates = [made["date"] for made in record["made"]]
    verified = record["verified"]
    state = "not verified"
    if verified:
        state = f"{'verified' if verified['holds'] else 'DID NOT HOLD on'} {verified['date']}"
    runs = len(record["runs"])
    return f"{name:18} {runs:4} runs, {max(dates, default='never'):10}  {state:22}  {title}"
