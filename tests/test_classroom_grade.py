"""A class of fifty graded end to end, every grade known in advance; and what surrounds it: resume, regrade, rosters."""

import csv
import os
from pathlib import Path

import psutil
import pytest

from lora_course.classroom import confinement
from lora_course.classroom.assign import assign
from lora_course.classroom.confinement import Limits
from lora_course.classroom.grade import grade
from tests.class_of_fifty import STORAGE, submissions

SEED = "what a class of fifty is graded with"
LIMITS = Limits(seconds=4, memory=1 << 30, patience=20)


def shut_in() -> str:
    try:
        return confinement.choose()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory):
    kind = shut_in()
    root = tmp_path_factory.mktemp("class")
    made = assign(["1.1", "1.2", "2.1"], SEED, root / "hw1")
    folder = root / "submissions"
    folder.mkdir()
    expected = submissions(made)
    for submission in expected:
        submission.write(folder)
    (folder / "stranger.ipynb").write_bytes(b"{}")
    rows = [f"{s.student},{s.student}@example.org,A,," for s in expected]
    roster = root / "roster.csv"
    header = "SIS Login ID,Email,Student,hw1 (4711),Section\n"
    roster.write_text(header + "\n".join(rows) + "\nabsent,absent@example.org,B,,\n")
    said: list[str] = []
    records = grade(
        root / "hw1", folder, root / "grades", kind, roster, limits=LIMITS, say=said.append
    )
    return root, expected, records, said


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_submission_of_the_class_gets_the_grade_that_is_known(graded) -> None:
    root, expected, records, said = graded
    wrong = {
        f"{s.student} {s.kind}": (s.points, r.points, {i: (p.status, p.message) for i, p in r.problems.items() if p.status != "right"})
        for s in expected
        if (r := records[s.student]).points != s.points
    }  # fmt: skip
    assert wrong == {}
    for s in expected:
        record = records[s.student]
        text = " ".join([record.reason, *(line.message + line.status for line in record.problems.values())])  # fmt: skip
        assert s.says in text, (s.kind, text)
        assert s.flag in str([line.flags for line in record.problems.values()])
        feedback = (root / "grades" / "feedback" / f"{s.student}.md").read_text()
        assert f"{s.points:g} of " in feedback and "Traceback" not in feedback
    with (root / "grades" / "roster.csv").open() as file:
        table = {row["SIS Login ID"]: row for row in csv.DictReader(file)}
    assert {s.student: f"{s.points:g}" for s in expected} == {
        who: row["hw1 (4711)"] for who, row in table.items() if who != "absent"
    }
    assert table["absent"]["hw1 (4711)"] == "" and table["absent"]["Email"] == "absent@example.org"
    report = (root / "grades" / "report.html").read_text()
    assert "stranger.ipynb" in report and "absent" in report and "<script" not in report
    assert any("belongs to nobody" in line for line in said)
    left = [p for p in psutil.process_iter(["cmdline"]) if "/judge/runner.py" in (p.info["cmdline"] or [])]  # fmt: skip
    mine = [p for p in left if os.getpid() in [parent.pid for parent in p.parents()]]
    assert mine == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_graded_stays_and_one_problem_can_be_graded_again(graded) -> None:
    root, expected, records, _ = graded
    kind, said = shut_in(), []
    few = root / "few"
    few.mkdir()
    for submission in expected[:2]:
        submission.write(few)
    where = (root / "hw1", few, root / "again", kind)
    first = grade(*where, limits=LIMITS, say=said.append)
    assert "2 to grade" in said[0]
    second = grade(*where, limits=LIMITS, say=said.append)
    assert any("0 to grade, 2 graded before" in line for line in said)
    assert second == first
    third = grade(*where, only=[STORAGE], limits=LIMITS, say=said.append)
    assert third["student01"].run != first["student01"].run
    assert third["student01"].points == first["student01"].points
    (few / "student02.ipynb").write_bytes((few / "student01.ipynb").read_bytes())
    fourth = grade(*where, limits=LIMITS, say=said.append)
    assert fourth["student02"].points == first["student01"].points


def test_grading_is_refused_with_a_sentence_where_nothing_shuts_code_in(monkeypatch) -> None:
    monkeypatch.setattr(confinement.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="bwrap.*--trust"):
        confinement.choose()
    assert confinement.choose(trust=True) == "trust"


def test_a_folder_without_assignment_and_unknown_problems_are_refused(tmp_path: Path) -> None:
    (tmp_path / "submissions").mkdir()
    with pytest.raises(ValueError, match="assignment.json"):
        grade(tmp_path, tmp_path / "submissions", tmp_path / "out", "trust")
    assign(["1.1"], "a", tmp_path / "hw")
    with pytest.raises(ValueError, match="no problem 9.9"):
        grade(tmp_path / "hw", tmp_path / "submissions", tmp_path / "out", "trust", only=["9.9"])
