"""The order and the minutes that the instructors' guide gives are the chapters' own, and its plans keep to them."""

from pathlib import Path

import pytest

from tools import pacing
from tools.chapters import ROOT

LESSONS = {lesson.number: lesson for lesson in pacing.lessons(ROOT)}


def test_a_chapter_builds_on_earlier_ones_alone() -> None:
    stems = [lesson.stem for lesson in LESSONS.values()]
    for lesson in LESSONS.values():
        assert all(stems.index(need) < stems.index(lesson.stem) for need in lesson.needs)
    assert all("0_1_lora" in lesson.needs for lesson in LESSONS.values() if lesson.number != "0.1")


@pytest.mark.parametrize("name", pacing.PLANS)
def test_a_plan_teaches_what_a_chapter_needs_before_it(name: str) -> None:
    taught = [number for numbers in pacing.PLANS[name].values() for number in numbers]
    assert len(set(taught)) == len(taught)
    core = {"0_1_lora"}  # what is called needed; others are called a help
    for place, number in enumerate(taught):
        needed = core & set(LESSONS[number].needs)
        assert needed <= {LESSONS[before].stem for before in taught[:place]}


def test_the_longest_plan_has_every_chapter_and_a_day_is_a_day() -> None:
    weeks = pacing.PLANS["Course, ten weeks"]
    assert [n for numbers in weeks.values() for n in numbers] == list(LESSONS)
    day = [LESSONS[n] for numbers in pacing.PLANS["Workshop, one day"].values() for n in numbers]
    assert sum(lesson.reading + lesson.exercises for lesson in day) <= 7 * 60


def test_a_chapter_that_does_not_say_what_it_needs_is_named(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "9_9_toy.md").write_text(
        "---\njupytext:\n  formats: ipynb,md:myst\n---\n\n# A toy\n"
    )
    with pytest.raises(ValueError, match="9_9_toy"):
        pacing.lessons(tmp_path)
