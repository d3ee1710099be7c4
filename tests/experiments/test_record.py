"""`lora_course.experiments.record`: whole after every run, refuses what is not its own, knows where each run was made."""

import json
import threading
from pathlib import Path

import pytest

from lora_course.arguments import computing_in
from lora_course.experiments import record
from lora_course.experiments.record import Record, as_json, beginning, largest_difference

SETTINGS = {"steps": 3, "seeds": [0, 1], "arms": {"a": {"r": 8}}}


def test_runs_come_back_as_they_were_written_and_the_file_is_whole_after_each(
    tmp_path: Path,
) -> None:
    made = Record(tmp_path / "s.json", "s", SETTINGS)
    assert made.add("a", {"value": 1.5, "history": {3: (1, 2)}}) == {
        "value": 1.5,
        "history": {"3": [1, 2]},
    }
    assert json.loads(made.path.read_text())["runs"] == made.runs
    made.add("b", {"value": 2})
    assert list(made.runs) == ["a", "b"] and [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_the_facts_of_each_run_are_kept_and_follow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Record(tmp_path / "s.json", "s", SETTINGS)
    facts = {"date": "2026-01-01", "commit": "abc1234"}
    monkeypatch.setattr(record, "facts_of_this_run", lambda: dict(facts))
    made.add("a", {}), made.add("b", {})
    facts["commit"] = "def5678"
    made.add("c", {}), made.add("a", {})
    assert [(m["commit"], m["keys"]) for m in made.read()["made"]] == [
        ("abc1234", ["b"]),
        ("def5678", ["c", "a"]),
    ]


def test_facts_name_versions_commit_and_what_moves_a_number() -> None:
    facts = record.facts_of_this_run()
    assert facts["versions"]["torch"] and facts["dtype"] in ("float32", "bfloat16", "float16")
    assert facts["threads"] >= 1 and len(facts["date"]) == 10
    assert "source" not in json.dumps(facts)  # no hash of sources decides anything


def test_each_record_says_in_which_type_its_own_runs_were_made(tmp_path: Path) -> None:
    for name in ("float32", "bfloat16"):
        made = Record(tmp_path / f"{name}.json", "s", SETTINGS)
        with computing_in(name):
            made.add("a", {})
        assert made.dtype() == name


def test_two_writers_lose_no_run(tmp_path: Path) -> None:
    path, count = tmp_path / "s.json", 15

    def add(writer: int) -> None:
        for number in range(count):
            Record(path, "s", SETTINGS).add(f"{writer}/{number}", {})

    writers = [threading.Thread(target=add, args=(writer,)) for writer in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(Record(path, "s", SETTINGS).runs) == 3 * count


def test_other_settings_are_refused_with_what_differs_and_what_to_do(tmp_path: Path) -> None:
    Record(tmp_path / "s.json", "s", SETTINGS).add("a", {})
    other = {"steps": 4, "seeds": [0, 1], "arms": {"a": {"r": 4}}, "more": 1}
    with pytest.raises(ValueError) as refused:
        Record(tmp_path / "s.json", "s", other)
    said = str(refused.value)
    assert "steps is 3 there and 4 here" in said and "arms.a.r is 8 there and 4 here" in said
    assert "more is absent there and 1 here" in said and "--out" in said and "--overwrite" in said
    assert Record(tmp_path / "s.json", "s", SETTINGS).runs == {"a": {}}
    anew = Record(tmp_path / "s.json", "s", other, overwrite=True)
    assert anew.runs == {}
    assert Record(tmp_path / "s.json", "s", SETTINGS).runs == {"a": {}}  # until a run is there
    anew.add("b", {})
    assert anew.runs == Record(tmp_path / "s.json", "s", other).runs == {"b": {}}


def test_more_seeds_are_no_other_settings(tmp_path: Path) -> None:
    Record(tmp_path / "s.json", "s", SETTINGS).add("a", {})
    assert Record(tmp_path / "s.json", "s", SETTINGS | {"seeds": [0, 1, 7]}).seeds == [0, 1, 7]
    assert Record(tmp_path / "s.json", "s", SETTINGS | {"seeds": [0]}).seeds == [0, 1]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    for text in ("[1]", "no json", '{"settings": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no record of a study"):
            Record(path, "s", SETTINGS)
        assert path.read_text() == text
    path.unlink()
    Record(path, "t", SETTINGS).add("a", {})
    with pytest.raises(ValueError, match="is the record of t, not of s"):
        Record(path, "s", SETTINGS)


@pytest.mark.parametrize(
    ("recorded", "again", "apart"),
    [
        (1.0, 1.25, 0.25),
        ([1.0, [2.0, 3.0]], [1.0, [2.0, 3.5]], 0.5),
        ({"a": 1.0, "b": [1]}, {"a": 1.1, "b": [1]}, 0.1),
        ({"a": 1.0}, {"b": 1.0}, float("inf")),
        ([1.0], [1.0, 2.0], float("inf")),
        ("x", "x", 0.0),
        ("x", "y", float("inf")),
        (None, None, 0.0),
        (1.0, None, float("inf")),
        (1.0, float("nan"), float("inf")),
        ([], [], 0.0),
    ],
)
def test_the_largest_difference_of_numbers_wherever_they_lie(recorded, again, apart) -> None:
    assert largest_difference(recorded, again) == pytest.approx(apart)
    assert largest_difference(as_json(again), recorded) == pytest.approx(apart)


def test_a_part_is_compared_with_the_beginning_and_an_empty_one_with_all() -> None:
    whole = {"a": [1.0, 2.0], "b": 3.0}
    assert beginning(whole, {"a": [1.0]}) == {"a": [1.0]}
    for nothing in ({}, {"a": []}, {"a": {}}):
        assert largest_difference(beginning(whole, nothing), nothing) == float("inf")
    assert beginning([], []) == []
