"""What claims come to with seeds that nobody had used when rates were searched and texts were written."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RECORDS, VERDICTS = FOLDER / "records", FOLDER / "verdicts.json"
SHIFT = 5  # more than a study counts up from a seed: neither its own runs nor its search saw what comes out


def others(seeds: list[int]) -> list[int]:
    """Seeds as many and as far apart as a study's: 5 to 9 for 0 to 4, and 5, 15, 25 for 0, 10, 20."""
    return [seed + SHIFT for seed in seeds]


def verdicts(path: Path = VERDICTS) -> dict[str, dict[str, Any]]:
    """By claim: `holds`, and the `values` with the other seeds, of the claims that were tried so."""
    return json.loads(path.read_text())["claims"] if path.exists() else {}
