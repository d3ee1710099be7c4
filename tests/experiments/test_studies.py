"""All studies of `lora_course.experiments`: their records are whole, and each has a witness that can be run."""

import dataclasses
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lora_course import experiments
from lora_course.experiments import ROUNDING, Runs, lora
from lora_course.experiments.arms import base_of
from lora_course.experiments.record import Record, as_json
from lora_course.lab import study as reading


class Asked(Runs):
    """Takes every run from the record, and computes none."""

    def __call__(self, key: str, compute: Any, *arguments: Any) -> dict[str, Any]:
        assert key in self.recorded, f"{self.record.path.name} lacks {key!r}"
        return super().__call__(key, compute, *arguments)


COMPLETE = [name for name in experiments.NAMES if name not in experiments.UNDER_WAY]


@pytest.mark.parametrize("name", experiments.NAMES)
def test_a_record_holds_the_runs_that_its_study_asks_for_and_no_others(name: str) -> None:
    study = experiments.get(name)
    assert study.name == name and experiments.get(experiments.NAMES[name]) is study
    asked = Asked(Record(study.path, study.name, study.settings))
    if name in experiments.UNDER_WAY:  # something is missing, or the study would leave the list
        with pytest.raises(AssertionError, match="lacks"):
            study.body(asked)
        return
    study.body(asked)
    assert asked.done == set(asked.recorded)
    # what a search adds beyond an edge cannot be known before
    assert asked.expected <= len(asked.done) <= 1.2 * asked.expected


@pytest.mark.parametrize("name", experiments.NAMES)
def test_a_record_says_where_each_run_was_made(name: str) -> None:
    record = reading.load_study(name)
    keys = [key for made in record["made"] for key in made["keys"]]
    assert sorted(keys) == sorted(record["runs"])
    assert all(made["date"] and made["versions"]["torch"] for made in record["made"])


@pytest.mark.parametrize("name", COMPLETE)
def test_a_record_says_when_it_last_held(name: str) -> None:
    study, record = experiments.get(name), reading.load_study(name)
    settings = as_json(dict(study.settings))
    assert record["settings"]["seeds"][: len(settings["seeds"])] == settings["seeds"] if "seeds" in settings else True  # fmt: skip
    verified = record["verified"]
    assert verified and verified["holds"], f"lora-course study verify {name}"
    assert verified["keys"] == list(study.witness.keys) and study.witness.reason
    assert verified["within"] == dict(study.witness.within)
    assert study.witness.chapter in ("", *(p.stem for p in reading.STUDIES.parents[2].glob("notebooks/*.md")))  # fmt: skip
    assert "repeated on" in reading.provenance(record)


@pytest.mark.parametrize("name", COMPLETE)
def test_a_tolerance_for_rounding_is_less_than_the_seeds_lie_apart(name: str) -> None:
    witness, record = experiments.get(name).witness, reading.load_study(name)
    if ROUNDING not in witness.reason:
        return
    key = witness.keys[-1].replace("/validation", "/test")  # which every seed has
    seeds = record["settings"]["seeds"]
    own = f"/{seeds[0]}/"
    at = key.replace(own, "/{}/") if own in key else f"{key.rpartition('/')[0]}/{{}}"
    keys = [at.format(seed) for seed in seeds]
    runs = [record["runs"][key] for key in keys if key in record["runs"]]
    apart = {}
    for field in ("bits_per_byte", "own_domain", "ACC"):
        values = [run[field] for run in runs if field in run]
        values = [fmean(v.values()) if isinstance(v, dict) else v for v in values]
        if len(values) > 1 and field in witness.within:
            apart[field] = max(values) - min(values)
    assert apart and all(witness.within[field] < apart[field] for field in apart), apart


@pytest.mark.parametrize("name", COMPLETE)
def test_no_record_is_tied_to_its_sources(name: str) -> None:
    assert "sha256" not in json.dumps(reading.load_study(name))


def test_every_record_belongs_to_a_study() -> None:
    files = {path.stem for path in reading.STUDIES.glob("*.json")}
    assert set(COMPLETE) <= files <= set(experiments.NAMES)


def test_an_unknown_study_is_refused() -> None:
    with pytest.raises(ValueError, match="study 'adalroa' is unknown; there are 0_1_lora"):
        experiments.get("adalroa")
    with pytest.raises(ValueError, match="study 'x' has no record; there are 0_1_lora"):
        reading.load_study("x")


def test_the_study_that_the_package_shows_runs_and_is_verified(tmp_path: Path) -> None:
    lines = [line[4:] for line in experiments.__doc__.splitlines() if line.startswith("    ") or not line]  # fmt: skip
    code = "\n".join(lines)["\n".join(lines).index("SETTINGS") :]
    names = {name: getattr(experiments, name) for name in experiments.__all__} | {"Any": Any}
    exec(code, names)
    small = {"steps": 3, "batch": 2, "length": 32, "train_bytes": 10_000, "score_bytes": 1_000}
    names["SETTINGS"].update(small | {"seeds": [0, 1], "ranks": {"r8": 8}})
    study = names["STUDY"]
    record = study.run(tmp_path / "ranks.json", progress=str)
    rate = reading.chosen_rate(record, "r8")
    tested = [key for key in record["runs"] if key.endswith("/test")]
    assert tested == ["base/test", f"r8/{rate:g}/0/test", f"r8/{rate:g}/1/test"]
    witness = dataclasses.replace(study.witness, keys=(tested[1],))
    found = dataclasses.replace(study, witness=witness).verify(tmp_path / "ranks.json")
    assert found["holds"] and set(found["largest"]) == {"bits_per_byte", "parameters"}


def test_full_fine_tuning_of_0_1_moves_every_weight_and_has_no_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = {"steps": 2, "batch": 1, "length": 16, "train_bytes": 10_000}
    monkeypatch.setattr(lora, "SETTINGS", lora.SETTINGS | small)
    before = dict(base_of(lora.SETTINGS).named_parameters())
    found = lora.trained("full", 1e-3, 0)
    after = dict(found.model.named_parameters())
    assert len(found.losses) == 2 and before.keys() == after.keys()
    assert not [name for name, weight in before.items() if weight.equal(after[name])]
    every = sum(weight.numel() for weight in before.values())
    assert found.arm.parameters(found.model) == every
