"""The settings of the adapters that the page holds, and the file of what came out."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_course.files import replace_file
from lora_course.lab.tasks import task

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "book" / "_data" / "play"
RECORD = FOLDER / "record.json"
SETTINGS: dict[str, Any] = {
    "model": "nano", "domains": ["bible", "shakespeare", "milton", "python"], "cut_domain": "shakespeare", "r": 16,
    "lora_alpha": 32, "target_modules": "all-linear", "steps": 480, "batch": 8, "length": 128, "train_bytes": 1_600_000,
    "rates": [4e-3, 8e-3], "nested_rates": [8e-3, 1.6e-2], "nested_ranks": [1, 2, 4, 8, 16],
    "router_steps": 80, "router_rate": 0.3, "seed": 0,
    "validation_bytes": 20_000, "test_bytes": 10_000, "curve_bytes": 6_000, "group_size": 64,
    "cuts": [1, 2, 4, 8, 16], "scales": [0.0, 0.5, 1.0, 1.5, 2.0], "bits": [8, 4, 2], "merged": ["shakespeare", "python"],
    "tasks": ["pronunciation", "plural"], "task_steps": 400, "task_batch": 64, "task_rate": 5e-3, "task_length": 44,
    "task_words": 500,
}  # fmt: skip
SETTINGS["apart"] = [
    name for name in SETTINGS["tasks"] if task(name).apart
]  # asked letter by letter
DOMAINS, CUT = SETTINGS["domains"], SETTINGS["cut_domain"]
SCORED = ["glosses", *DOMAINS]
SAMPLE_BYTES = 800


class Record:
    """The numbers by key in one file, written after each: a run that is killed goes on where it was.

    Raises ValueError where the file holds results of other settings.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": SETTINGS, "runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != SETTINGS:
                raise ValueError(
                    f"{path} holds results of other settings: move it away to begin anew."
                )

    def run(self, key: str, function: Callable[[], Any]) -> Any:
        """The result of `key`; computed and written first if there is none yet."""
        runs = self.content["runs"]
        if key not in runs:
            began = time.perf_counter()
            runs[key] = function()
            packages = ("torch", "transformers", "peft")
            head = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
            )
            self.content |= {
                "versions": {name: importlib.metadata.version(name) for name in packages},
                "base_sha256": base_sha256(),
                "commit": head.stdout.strip(),
                "date": datetime.date.today().isoformat(),
            }
            replace_file(self.path, (json.dumps(self.content, indent=1) + "\n").encode())
            print(f"{time.perf_counter() - began:6.1f} s  {key}  {brief(runs[key])}", flush=True)
        return runs[key]


def base_sha256() -> str:
    """Of the weights that the adapters were trained on: the chapters' own."""
    weights = ROOT / "lora_course" / "data" / "nano" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def brief(result: Any) -> str:
    return json.dumps(result)[:140]
