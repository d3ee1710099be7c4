"""What the recorded evidence does not settle, counted from the records."""

from typing import Any

from lora_course.experiments import NAMES
from lora_course.lab.study import load_study
from tools.chapters import Result
from tools.ledger import claims_of

BASE = ("base/test", "base/fp32/test", "base/shakespeare/test")


def limits(results: list[Result]) -> str:
    """A line each: rates searched with one seed, test texts of several lengths, no claim from a GPU."""
    searched = searches()
    alone = sum(seeds == 1 for seeds in searched.values())
    sizes, bits = zip(*shakespeare().values(), strict=True)
    on_gpu = [claim.id for claim in claims_of(results) if claim.evidence == "gpu"]
    lines = [
        f"Learning rates were searched with one seed in {alone} of {len(searched)} studies, and tested with all: where two rates "
        "lie as near as seeds differ, another seed may choose the other.",
        f"Studies score nano on {min(sizes) / 1000:.0f} to {max(sizes) / 1000:.0f} kB of Shakespeare's test text. The untrained model has "
        f"{min(bits):.3f} to {max(bits):.3f} bits a byte there: across chapters compare differences, never values.",
        f"{len(on_gpu)} claims rest on a run on a GPU." if on_gpu else "No claim rests on a GPU: no record of a run on one has been made yet.",
    ]  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


def searches() -> dict[str, int]:
    """By study that searches a learning rate and tests with five seeds: how many seeds it searched with."""
    settings = {name: load_study(name)["settings"] for name in NAMES}
    return {
        name: len(given["search_seeds"])
        for name, given in settings.items()
        if "search_seeds" in given and len(given["seeds"]) == 5
    }


def shakespeare() -> dict[str, tuple[int, float]]:
    """By study: how many bytes of Shakespeare's test text it scores on, and the untrained nano's bits a byte there."""
    found = {}
    for name in NAMES:
        record = load_study(name)
        given, runs = record["settings"], record["runs"]
        for key in BASE:
            bits = score(runs.get(key, {}), named=given.get("domain") == "shakespeare" or "shakespeare" in key)  # fmt: skip
            if bits is not None and given.get("model", "nano") == "nano":
                found[name] = (size(given["score_bytes"]), bits)
    return found


def score(run: dict[str, Any], named: bool) -> float | None:
    """Of a run that scored Shakespeare alone, or each domain by itself."""
    return run.get("bits_per_byte") if named else run.get("by_domain", {}).get("shakespeare")


def size(given: Any) -> int:
    """The bytes of the test text, of a number or of one by split (or by what is scored)."""
    if isinstance(given, int):
        return given
    return given["test"] if "test" in given else given["domain"]
