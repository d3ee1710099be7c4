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
from lora_course.classroom.grading import Line, Record, grade_submission
from lora_course.classroom.submissions import Entry, digest, file_of
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


def test_a_file_that_changed_is_graded_whole_when_one_problem_is_graded_again(
    tmp_path: Path,
) -> None:
    made = assign(["5.1"], SEED, tmp_path / "hw")
    path = tmp_path / "student01.ipynb"
    path.write_text("{}")
    first, *others = made.problems

    def again(of: str) -> dict[str, bool]:
        lines = {id: Line("right", 3, "an old line") for id in made.problems}
        before = Record("student01", path.name, of, "a run", problems=lines)
        entry = Entry("student01", path)
        record = grade_submission(made, "student01", entry, "r", "trust", LIMITS, [first], before)
        return {id: line.message != "an old line" for id, line in record.problems.items()}

    assert again(digest(path)) == {first: True} | dict.fromkeys(others, False)
    assert again("of another file") == dict.fromkeys(made.problems, True)


def test_a_table_is_refused_from_whose_ids_no_problems_were_drawn(tmp_path: Path) -> None:
    (tmp_path / "assigned.csv").write_text("email\ns1@example.org\ns2@example.org\n")
    (tmp_path / "exported.csv").write_text("id,email\n4711,s1@example.org\n4712,s2@example.org\n")
    (tmp_path / "submissions").mkdir()
    for name in ("s1@example.org", f"hw-{file_of('s2@example.org')}"):
        (tmp_path / "submissions" / f"{name}.ipynb").write_text("")
    assign(["5.1"], SEED, tmp_path / "hw", roster=tmp_path / "assigned.csv")

    def graded_with(roster: str) -> dict[str, Record]:
        folders = [tmp_path / name for name in ("hw", "submissions", "grades")]
        return grade(*folders, "trust", tmp_path / roster, limits=LIMITS, say=str)

    with pytest.raises(ValueError, match="no problems for 4711"):
        graded_with("exported.csv")
    assert not (tmp_path / "grades").exists()
    assert set(graded_with("assigned.csv")) == {"s1@example.org", "s2@example.org"}
    # who came later and handed in gets problems by assigning again, and the others keep theirs
    before = {path: path.read_bytes() for path in (tmp_path / "hw" / "solutions").iterdir()}
    assign(["5.1"], SEED, tmp_path / "hw", roster=tmp_path / "exported.csv")
    assert list(graded_with("exported.csv")) == ["4711"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_grades_of_another_assignment_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "submissions").mkdir()
    assign(["5.1"], SEED, tmp_path / "hw1")
    assign(["1.1"], SEED, tmp_path / "hw2")  # of the same seed

    def graded(homework: str, out: str) -> dict[str, Record]:
        folders = [tmp_path / name for name in (homework, "submissions", out)]
        return grade(*folders, "trust", fresh=True, say=str)

    assert graded("hw1", "grades") == graded("hw1", "grades") == graded("hw2", "others") == {}
    with pytest.raises(ValueError, match="grades holds the grades of another assignment"):
        graded("hw2", "grades")
