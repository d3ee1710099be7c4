"""`lora_course.experiments.study`: nothing is computed twice, seeds can be added, and a witness catches a changed number."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_course.experiments import Runs, Study, Witness, listing
from lora_course.experiments.record import Record
from lora_course.lab import study as reading

SETTINGS = {"seeds": [0, 1], "steps": 3, "batch": 2, "length": 8, "score_bytes": 100}


def make(calls: list[str], value: Callable[[str], float] = lambda key: float(len(key))) -> Study:
    """Two arms of two seeds after a base; `calls` says what was computed."""

    def body(runs: Runs) -> None:
        arms = runs.arms(["lora", "dora/python"])
        runs.expect(1 + len(arms) * len(runs.seeds))

        def compute(key: str) -> dict[str, Any]:
            calls.append(key)
            return {"bits_per_byte": value(key), "parameters": 7, "seconds": len(calls)}

        runs("base/test", compute, "base/test")
        for arm in arms:
            for seed in runs.seeds:
                key = f"{arm}/0.004/{seed}/test"
                runs(key, compute, key)

    witness = Witness(("lora/0.004/1/test",), {"bits_per_byte": 0.01, "parameters": 0}, "a reason")
    return Study("s", SETTINGS, body, witness)


def test_what_was_stopped_goes_on_and_nothing_is_computed_twice(tmp_path: Path) -> None:
    calls, lines = [], []
    study, out = make(calls), tmp_path / "s.json"

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(out, progress=stop)
    assert calls == ["base/test", "lora/0.004/0/test"] and list(json.loads(out.read_text())["runs"]) == calls  # fmt: skip
    assert "2/5" in lines[1] and "min, about" in lines[1] and "17.0000 bits per byte" in lines[1]
    record = study.run(out, progress=lines.append)
    assert len(calls) == len(set(calls)) == 5 and list(record["runs"]) == calls
    assert study.run(out, progress=lines.append) == record and len(calls) == 5 and len(lines) == 5


def test_more_seeds_compute_only_themselves_and_count_once_they_are_there(tmp_path: Path) -> None:
    calls, out = [], tmp_path / "s.json"
    study = make(calls)
    study.run(out, progress=str)
    calls.clear()
    assert study.run(out, arms=["lora"], seeds=[5], progress=str)["settings"]["seeds"] == [0, 1]
    assert calls == ["lora/0.004/5/test"]  # dora lacks it still
    assert study.run(out, seeds=[5], progress=str)["settings"]["seeds"] == [0, 1, 5]
    assert calls == ["lora/0.004/5/test", "dora/python/0.004/5/test"]
    assert reading.series(study.run(out, progress=str), "lora") == [17.0] * 3 and len(calls) == 2


def test_arms_are_chosen_by_pattern_and_unknown_ones_refused_before_any_work(
    tmp_path: Path,
) -> None:
    calls = []
    study = make(calls)
    with pytest.raises(ValueError, match="arm 'loar' is unknown; there are lora, dora/python"):
        study.run(tmp_path / "s.json", arms=["loar"])
    assert calls == [] and not list(tmp_path.iterdir())
    study.run(tmp_path / "s.json", arms=["dora"], progress=str)
    study.run(tmp_path / "t.json", arms=["*/python"], progress=str)
    assert not [key for key in calls if key.startswith("lora")] and len(calls) == 6


def test_overwrite_loses_nothing_before_the_first_new_run(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    make([]).run(out, progress=str)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="arm 'loar' is unknown"):
        make([]).run(out, arms=["loar"], overwrite=True)
    assert out.read_bytes() == before
    again = make([], lambda key: 1.0).run(out, arms=["lora"], overwrite=True, progress=str)
    assert len(again["runs"]) == 3 and again == json.loads(out.read_text())


def test_a_study_without_seeds_refuses_more_of_them(tmp_path: Path) -> None:
    study = Study("s", {"steps": 3}, lambda runs: None, Witness((), {}))
    with pytest.raises(ValueError, match="s has no seeds to add to"):
        study.run(tmp_path / "s.json", seeds=[7])


def test_two_calls_for_different_arms_can_share_a_record(tmp_path: Path) -> None:
    calls, out = [], tmp_path / "s.json"
    study = make(calls)

    def other(line: str) -> None:
        if "lora/0.004/0" in line:
            make([]).run(out, arms=["dora"], progress=str)

    study.run(out, arms=["lora"], progress=other)
    assert len(Record(out, "s", SETTINGS).runs) == 5


def test_verify_runs_the_witness_alone_and_notes_what_came_out(tmp_path: Path) -> None:
    calls, out = [], tmp_path / "s.json"
    study = make(calls)
    before = study.run(out, progress=str)
    calls.clear()
    found = study.verify(out)
    assert calls == ["lora/0.004/1/test"] and found["holds"]
    assert found["largest"] == {"bits_per_byte": 0.0, "parameters": 0}
    after = json.loads(out.read_text())
    assert after["verified"] == found and after["runs"] == before["runs"]
    assert "came out the same" in reading.provenance(after)
    assert "no run was repeated since" in reading.provenance(before)


def test_verify_catches_a_changed_number_and_a_lost_field(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    make([]).run(out, progress=str)
    moved = make([], lambda key: len(key) + 0.02)
    found = moved.verify(out, note=False)
    assert not found["holds"] and found["largest"]["bits_per_byte"] == pytest.approx(0.02)
    assert json.loads(out.read_text())["verified"] is None
    assert make([], lambda key: len(key) + 0.005).verify(out)["holds"]
    moved.verify(out)
    record = json.loads(out.read_text())
    assert "DID NOT HOLD" in reading.provenance(record) and "DID NOT HOLD" in listing.summary(
        "s", "a title", out
    )
    del record["runs"]["lora/0.004/1/test"]["parameters"]
    out.write_text(json.dumps(record))
    assert make([]).verify(out)["largest"]["parameters"] == float("inf")
    misspelt = Witness(("lora/0.004/1/test",), {"bits_per_bite": 0.01})
    assert not dataclasses.replace(make([]), witness=misspelt).verify(out)["holds"]


def test_a_record_without_its_witness_or_what_leads_to_it_cannot_be_verified(
    tmp_path: Path,
) -> None:
    out = tmp_path / "s.json"
    study = make([])
    record = study.run(out, progress=str)
    for lost, message in (("lora/0.004/1/test", "has no run"), ("base/test", "lacks the run")):
        runs = {key: run for key, run in record["runs"].items() if key != lost}
        out.write_text(json.dumps(record | {"runs": runs}))
        with pytest.raises(ValueError, match=message):
            study.verify(out)


def test_a_part_of_a_long_run_can_be_the_witness(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    whole = {"error": 0.5, "loss": {"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]}}

    def study(part: dict[str, Any]) -> Study:
        witness = Witness(("long",), {"error": 0.01, "loss": 0.01}, "a reason", part=lambda: part)
        return Study("s", SETTINGS, lambda runs: runs("long", lambda: whole), witness)

    study({}).run(out, progress=str)
    assert study({"error": 0.5, "loss": {"a": [1.0, 2.0]}}).verify(out)["holds"]
    for wrong in ({"error": 0.6, "loss": {"a": [1.0]}}, {"error": 0.5, "loss": {"a": [1.0, 9.0]}}):
        assert not study(wrong).verify(out)["holds"]
    assert not study({"error": 0.5, "loss": {"a": [1.0, 2.0, 3.0, 4.0]}}).verify(out)["holds"]
    assert not study({"error": 0.5}).verify(out)["holds"]
    assert not study({"error": 0.5, "loss": {"a": []}}).verify(out)["holds"]
