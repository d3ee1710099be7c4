"""A study: settings, the runs that belong to them, and a witness that shows that the record still holds."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fnmatch
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_course.experiments.listing import record_path
from lora_course.experiments.precision import precision_of
from lora_course.experiments.record import Record, as_json, beginning, commit, largest_difference

Compute = Callable[..., Mapping[str, Any]]
ROUNDING = (
    "sums in another order (other code, threads or processors, fp32 in place of bf16) move a training; what is allowed is less "
    "than the seeds of the arm lie apart"
)
"""The reason of a training's tolerance."""


@dataclasses.dataclass(frozen=True)
class Witness:
    """The runs that stand for a record: cheap ones, which `Study.verify` runs again.

    Attributes:
        keys: of these runs, at most a minute's work in all.
        within: what of a run is compared, and the largest difference that is allowed: {field: tolerance}. A field may
            hold lists or dictionaries of numbers.
        reason: of the tolerances; that of a training's by default.
        chapter: the chapter that runs a run of this record again each time it is built, so that CI need not; "" where none
            does.
        part: computes the beginning of the one key's run, where a whole run takes more than a minute: dictionaries may
            lack keys, and lists may be shorter than the recorded ones.
    """

    keys: tuple[str, ...]
    within: Mapping[str, float]
    reason: str = ROUNDING
    chapter: str = ""
    part: Compute | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A study that can be run, resumed and verified.

    name: of its record, `lora_course/data/studies/<name>.json`.
    settings: all that decides its numbers, and the seeds.
    body: given a `Runs`, calls it for each run, in the order in which they are to be computed.
    """

    name: str
    settings: Mapping[str, Any]
    body: Callable[[Runs], object]
    witness: Witness

    @property
    def path(self) -> Path:
        return record_path(self.name)

    def run(
        self,
        out: str | Path | None = None,
        *,
        arms: Sequence[str] = (),
        seeds: Sequence[int] = (),
        overwrite: bool = False,
        progress: Callable[[str], object] = print,
    ) -> dict[str, Any]:
        """Computes what the record lacks, writes each run when it is done, and returns the record.

        out: the file; the course's own by default.    arms: only these, as patterns ("dora", "lora/*").
        seeds: more than the settings have.    progress: is given a line after each run.
        Raises ValueError, before any work, for a file of something else or of other settings, an arm that is unknown, or seeds
        for a study that has none.
        """
        settings = dict(self.settings)
        if seeds and "seeds" not in settings:
            raise ValueError(f"{self.name} has no seeds to add to: it draws nothing at random")
        if seeds:
            settings["seeds"] = list(dict.fromkeys([*settings["seeds"], *seeds]))
        record = Record(out or self.path, self.name, settings, overwrite)
        runs = Runs(record, arms, progress)
        with precision_of(record.dtype()):
            self.body(runs)
        if not arms and "seeds" in settings:
            stated = record.read()["settings"]
            if stated["seeds"] != runs.seeds:
                record.note(settings=stated | {"seeds": runs.seeds})
        return record.read()

    def verify(self, path: str | Path | None = None, note: bool = True) -> dict[str, Any]:
        """Runs the witness again and compares.

        note: write what was found into the record.
        Returns `date`, `commit`, `keys`, `largest` (difference by field), `within` and `holds`.
        Raises ValueError where the record lacks the witness or a run that it needs.
        """
        record = Record(path or self.path, self.name, self.settings)
        recorded = record.runs
        if missing := [key for key in self.witness.keys if key not in recorded]:
            raise ValueError(
                f"{record.path} has no run {missing[0]!r}: `lora-course study run {self.name}` computes it"
            )
        with precision_of(record.dtype()):
            if self.witness.part:
                (key,) = self.witness.keys
                part = as_json(self.witness.part())
                begun = {f: beginning(value, part.get(f)) for f, value in recorded[key].items()}
                found, recorded = {key: part}, {key: begun}
            else:
                again = Again(record, self.witness.keys)
                with contextlib.suppress(WitnessIsComplete):
                    self.body(again)
                found = again.found
        largest = {
            field: max(
                (
                    largest_difference(recorded[k].get(field), found[k].get(field))
                    for k in found
                    if field in recorded[k] or field in found[k]
                ),
                default=math.inf,  # where no run has the field, nothing is compared
            )
            for field in self.witness.within
        }
        verified = {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "keys": list(self.witness.keys),
            "largest": largest,
            "within": dict(self.witness.within),
            "reason": self.witness.reason,
            "holds": all(largest[field] <= most for field, most in self.witness.within.items()),
        }
        if note:
            record.note(verified=verified)
        return verified


class Runs:
    """What a study's body calls for each of its runs: `runs(key, compute, *arguments)` → the recorded values.

    `compute(*arguments)` is called only where the record has no such key; its values are written then.
    seeds: those of the settings and of the record.
    """

    def __init__(
        self, record: Record, arms: Sequence[str] = (), progress: Callable[[str], object] = print
    ) -> None:
        self.record, self.patterns, self.progress = record, list(arms), progress
        self.seeds, self.recorded = record.seeds, record.runs
        self.expected = self.computed = 0
        self.done: set[str] = set()
        self.start = time.perf_counter()

    def expect(self, count: int) -> None:
        """So many runs are to come, as far as one can know: what the time that is left is told from."""
        self.expected += count

    def arms(self, known: Sequence[str]) -> list[str]:
        """Of the study's arms those that were asked for; all where none was. Raises ValueError for an unknown one."""
        if not self.patterns:
            return list(known)

        def matching(pattern: str) -> list[str]:
            return [
                arm
                for arm in known
                if fnmatch.fnmatchcase(arm, pattern)
                or fnmatch.fnmatchcase(arm.split("/")[0], pattern)
            ]

        for pattern in self.patterns:
            if not matching(pattern):
                raise ValueError(f"arm {pattern!r} is unknown; there are {', '.join(known)}")
        wanted = {arm for pattern in self.patterns for arm in matching(pattern)}
        return [arm for arm in known if arm in wanted]

    def __call__(self, key: str, compute: Compute, *arguments: Any) -> dict[str, Any]:
        self.done.add(key)
        if key not in self.recorded:
            self.recorded[key] = self.record.add(key, compute(*arguments))
            self.computed += 1
            self.progress(self._line(key))
        return self.recorded[key]

    def _line(self, key: str) -> str:
        done, minutes = len(self.done), (time.perf_counter() - self.start) / 60
        left = minutes / self.computed * (self.expected - done)
        of = f"/{self.expected}" if self.expected >= done else ""
        ahead = f", about {left:.0f} left" if self.expected > done else ""
        return f"{f'{done}{of}':>8}  {minutes:5.1f} min{ahead:16}  {key:44} {headline(self.recorded[key])}"


class WitnessIsComplete(Exception):
    """All of the witness was computed: the rest of the body need not run."""


class Again(Runs):
    """Computes the witness's runs once more and takes all others from the record; writes nothing."""

    def __init__(self, record: Record, keys: Sequence[str]) -> None:
        super().__init__(record)
        self.left = list(keys)
        self.found: dict[str, Any] = {}

    def __call__(self, key: str, compute: Compute, *arguments: Any) -> dict[str, Any]:
        if key in self.left:
            self.left.remove(key)
            self.found[key] = as_json(compute(*arguments))
            if not self.left:
                raise WitnessIsComplete
        elif key not in self.recorded:
            raise ValueError(
                f"{self.record.path} lacks the run {key!r}, which comes before the witness: "
                f"`lora-course study run {self.record.new['study']}` computes it"
            )
        return self.recorded[key]


def headline(values: Mapping[str, Any]) -> str:
    """The first number of a run, for the line that tells of it."""
    for name, value in values.items():
        if isinstance(value, float):
            return f"{value:.4f} {name.replace('_', ' ')}"
    return ""
