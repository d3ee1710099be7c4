"""The record of a study: one JSON file that is whole after every run, and that says where each of its runs was made."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_course.arguments import compute_dtype
from lora_course.files import replace_file, writing

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class Record:
    """The file of a study.

    It holds `study` (its name), `settings`, `made` (where and with what which runs were made), `verified` (the last time a
    witness was run again, see `Study.verify`) and `runs` (values by key). It is read anew before each write, so two calls
    for different arms can share it.

    path: the file; it need not be there yet. settings: those of the study, as JSON would give them back.
    overwrite: start anew where the file is there already; it stays until the first run of the new record is computed.
    Raises ValueError where the file is no record, or one of another study or of other settings; `seeds` may differ, as more
    seeds are more runs and no other ones.
    """

    def __init__(
        self, path: str | Path, name: str, settings: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self.new = {
            "study": name,
            "settings": as_json(settings),
            "made": [],
            "verified": None,
            "runs": {},
        }
        self.anew = overwrite  # what is there stays until the new record's first run is computed
        self._refuse_another()

    def read(self) -> dict[str, Any]:
        """All of the record."""
        there = self.path.exists() and not self.anew
        return json.loads(self.path.read_text(encoding="utf-8")) if there else as_json(self.new)

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        return self.read()["runs"]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the record, and after them those of the settings that it lacks."""
        both = self.read()["settings"].get("seeds", []) + self.new["settings"].get("seeds", [])
        return list(dict.fromkeys(both))

    def add(self, key: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a run, and returns its values as they will be read."""
        facts, new = facts_of_this_run(), as_json(values)
        with writing(self.path.parent):  # or a run that another call writes meanwhile is lost
            record = self.read()
            for made in record["made"]:
                made["keys"] = [other for other in made["keys"] if other != key]
            record["made"] = [made for made in record["made"] if made["keys"]]
            if not record["made"] or record["made"][-1] | {"keys": None} != facts | {"keys": None}:
                record["made"].append({**facts, "keys": []})
            record["made"][-1]["keys"].append(key)
            record["runs"][key] = new
            self._write(record)
        return new

    def dtype(self) -> str:
        """In which precision a CPU made its runs, so that more of them, or a witness, are made in the same.

        The first records do not say; they are of processors without bf16.
        """
        made = self.read()["made"]
        found = made[0].get("dtype", "float32") if made else str(compute_dtype("cpu"))
        return found.removeprefix("torch.")

    def note(self, **fields: Any) -> None:
        """Writes fields beside the runs, such as `verified`."""
        with writing(self.path.parent):
            self._write(self.read() | as_json(fields))

    def _write(self, record: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        replace_file(self.path, text.encode())
        self.anew = False

    def _refuse_another(self) -> None:
        try:
            there = self.read()
            name, settings = there["study"], there["settings"]
            there["made"], there["runs"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.path} is no record of a study: give the path of a new file, or of one that `lora-course study run` wrote"
            ) from None
        if name != self.new["study"]:
            raise ValueError(
                f"{self.path} is the record of {name}, not of {self.new['study']}: give another file"
            )
        old, new = (
            {k: v for k, v in s.items() if k != "seeds"} for s in (settings, self.new["settings"])
        )
        if different := changed(old, new):
            raise ValueError(
                f"{self.path} holds runs of other settings: {'; '.join(different)}. Give another file (--out FILE), or "
                "start this one anew (--overwrite)"
            )


def as_json(values: Any) -> Any:
    """What is read back after `values` were written."""
    return json.loads(json.dumps(values))


def changed(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Where two settings differ, in words."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed(a, b, f"{path}{key}.")
        elif a != b:
            found.append(f"{path}{key} is {a} there and {b} here")
    return found


def facts_of_this_run() -> dict[str, Any]:
    """Date, commit, versions, and what of the machine moves a number: the dtype of its matrix products, device, threads."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": str(compute_dtype()).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


@functools.cache  # the code that runs stays what it was when it was imported
def commit() -> str | None:
    """The commit of the code that runs, with " and changes" where a file of the package differs from it; None outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py", "data/nano", "data/text")
        return git("rev-parse", "--short=7", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def largest_difference(recorded: Any, again: Any) -> float:
    """The largest |difference| of two numbers, or of lists or dictionaries of them; inf where their shapes differ."""
    if isinstance(recorded, Mapping) and isinstance(again, Mapping):
        if set(recorded) != set(again):
            return float("inf")
        return max((largest_difference(recorded[key], again[key]) for key in recorded), default=0.0)
    if isinstance(recorded, Sequence) and isinstance(again, Sequence):
        if isinstance(recorded, str) or isinstance(again, str):
            return 0.0 if recorded == again else float("inf")
        if len(recorded) != len(again):
            return float("inf")
        pairs = zip(recorded, again, strict=True)
        return max((largest_difference(a, b) for a, b in pairs), default=0.0)
    if not all(isinstance(value, int | float) for value in (recorded, again)):
        return 0.0 if recorded == again else float("inf")
    difference = abs(recorded - again)
    return difference if difference == difference else float("inf")  # NaN is no agreement


def beginning(whole: Any, part: Any) -> Any:
    """Of values those that a part of them has too: its keys, and as many first entries as its lists have.

    A part with nothing in it is the beginning of nothing: the whole is given back, from which the part differs.
    """
    if isinstance(part, dict | list) and not part:
        return whole
    if isinstance(whole, dict) and isinstance(part, dict):
        return {key: beginning(whole[key], part[key]) for key in part if key in whole}
    if isinstance(whole, list) and isinstance(part, list):
        return [beginning(a, b) for a, b in zip(whole, part, strict=False)]
    return whole
