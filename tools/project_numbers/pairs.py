"""Two arms of the studies' records, seed by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_course.lab import study
from lora_course.lab.evidence import differences, interval, verdict

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two arms of a record, seed by seed: the first less the second, in the unit of `unit`."""

    first: Sequence[float]
    second: Sequence[float]
    unit: str = "bits a byte"

    @property
    def differences(self) -> list[float]:
        return differences(self.first, self.second)

    @property
    def verdict(self) -> str:
        return verdict(self.differences)

    @property
    def half(self) -> float:
        """Half the width of the 95% interval: a smaller difference is not seen with these seeds."""
        mean, _, high = interval(self.differences)
        return high - mean

    def __str__(self) -> str:
        mean, low, high = interval(self.differences)
        return f"{mean:+.3f} {self.unit} (95% interval {low:+.3f} to {high:+.3f}, {self.verdict})"


def pair(record: Record, first: str, second: str, rank: str = "") -> Pair:
    """Bits a byte of two arms on test text. rank: of the arms that have a value for each rank."""
    values = [study.series(record, arm) for arm in (first, second)]
    return Pair(*([of_seed[rank] for of_seed in series] if rank else series for series in values))


def across(run: Record, first: str, chapter: Record, second: str, rank: str = "") -> Pair:
    """A project's arm less an arm of another record, at each one's own rate, on the project's seeds. rank: as in `pair`."""
    values = []
    for record, arm in ((run, first), (chapter, second)):
        rate = study.chosen_rate(record, arm)
        runs = [record["runs"][f"{arm}/{rate:g}/{seed}/test"] for seed in run["settings"]["seeds"]]
        found = [of_seed["bits_per_byte"] for of_seed in runs]
        values.append([of_rank[rank] for of_rank in found] if rank else found)
    return Pair(*values)


def seeds(record: Record, prefix: str, suffix: str = "/test") -> list[dict[str, Any]]:
    """The runs of an arm that has no learning rate in its keys, in the order of the seeds."""
    return [record["runs"][f"{prefix}/{seed}{suffix}"] for seed in record["settings"]["seeds"]]
