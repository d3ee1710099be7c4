"""`lora_course.experiments.timing`: arms take turns, and the first turn warms up."""

from pathlib import Path

from lora_course.experiments.timing import processors, race


def test_arms_take_turns_and_the_first_round_does_not_count() -> None:
    now, turns = [0.0], []

    def arm(name: str, seconds: float):
        def run() -> None:
            turns.append(name)
            now[0] += seconds * (10 if turns.count(name) == 1 else 1)

        return run

    arms = {"a": arm("a", 1), "b": arm("b", 2), "c": arm("c", 4)}
    found = race(arms, 3, lambda: now[0])
    assert found == {"a": [1, 1, 1], "b": [2, 2, 2], "c": [4, 4, 4]}
    assert "".join(turns) == "abc" + "bca" + "cab" + "abc"


def test_a_processors_name_is_told_where_linux_tells_it(monkeypatch, tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr("lora_course.experiments.timing.Path", lambda _: told)
    assert processors() == []
    told.write_text(
        "processor\t: 0\nmodel name\t: A: fast\n\nprocessor\t: 1\nmodel name\t: A: fast\n"
    )
    assert processors() == ["A: fast", "A: fast"]
