"""What claims come to with seeds that nobody had used when rates were searched and texts were written."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RECORDS, VERDICTS = FOLDER / "records", FOLDER / "verdicts.json"
SEEDS = (5, 6, 7, 8, 9)


def verdicts(path: Path = VERDICTS) -> dict[str, dict[str, Any]]:
    """By claim: `holds`, and the `values` with the other seeds, of the claims that were tried so."""
    return json.loads(path.read_text())["claims"] if path.exists() else {}
