"""A study's record with other seeds beside the course's."""

import json
import shutil
from pathlib import Path

from lora_course.experiments import get
from tools.other_seeds import RECORDS, others


def train(name: str, folder: Path = RECORDS) -> Path:
    """Computes the scored runs of a study with `others` of its record's seeds, and lets the record speak of these seeds alone.

    Goes on where an earlier call stopped. Raises ValueError for an unknown study, or one that has no seeds.
    """
    study = get(name)
    if "seeds" not in study.settings:
        raise ValueError(f"{name} draws nothing at random: it has no other seeds")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if not path.exists():
        shutil.copyfile(study.path, path)
    seeds = others(json.loads(study.path.read_text())["settings"]["seeds"])
    study.run(path, seeds=seeds)
    record = json.loads(path.read_text())
    record["settings"]["seeds"] = seeds
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
