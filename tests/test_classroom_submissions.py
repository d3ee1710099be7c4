"""What students hand in and what instructors keep: cells found, names matched, tables filled, bytes distrusted."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_course.classroom import wire
from lora_course.classroom.families import find
from lora_course.classroom.grade import assign_entries
from lora_course.classroom.grading import grade_problem
from lora_course.classroom.remote import put_back
from lora_course.classroom.roster import Roster
from lora_course.classroom.runner import needed, plain_python
from lora_course.classroom.submissions import (
    Entry,
    Unreadable,
    collect,
    digest,
    file_of,
    find_answer,
    look_alike,
    read_cells,
)

CANVAS = "Student,ID,SIS User ID,SIS Login ID,Section,hw1 (991)\n    Points Possible,,,,,25\nstudent01,101,s1,one,A,\nstudent02,102,s2,two,A,7\n"
MOODLE = "\ufeffIdentifier;Full name;Email address;Grade\r\nParticipant 5001;Student, 01;one@example.org;\r\nParticipant 5002;Student 02;two@example.org;\r\n"


def table(tmp_path: Path, text: str) -> Roster:
    path = tmp_path / "roster.csv"
    path.write_bytes(text.encode())
    return Roster.read(path)


def test_canvas_keeps_its_columns_and_its_row_of_points(tmp_path: Path) -> None:
    roster = table(tmp_path, CANVAS)
    assert roster.kind == "canvas" and len(roster.students()) == 2
    assert roster.match("student02_102_77101_hw1.ipynb") == "102"
    assert (
        roster.match("student01_LATE_101_102_hw1-1.ipynb") == "101"
    )  # the first number is the student's
    assert roster.match("two.ipynb") == "102" and roster.match("103_hw1.ipynb") is None
    name = roster.write(tmp_path / "out.csv", "hw1", {"101": "25"}, 25)
    assert name == "hw1 (991)"
    assert (tmp_path / "out.csv").read_text() == CANVAS.replace("one,A,", "one,A,25")


def test_moodle_keeps_mark_separator_quotes_and_line_ends(tmp_path: Path) -> None:
    roster = table(tmp_path, MOODLE)
    assert roster.kind == "moodle"
    who = roster.match("Student 02_5002_assignsubmission_file")
    assert who == "Participant 5002"
    assert roster.write(tmp_path / "out.csv", "hw1", {who: "3.5"}, 25) == "Grade"
    assert (tmp_path / "out.csv").read_bytes() == MOODLE.replace("two@example.org;", "two@example.org;3.5").encode()  # fmt: skip


def test_a_plain_table_gains_a_column_and_a_bad_one_is_refused(tmp_path: Path) -> None:
    roster = table(tmp_path, "name,id\nA,x1\nB,x2\n")
    assert roster.write(tmp_path / "out.csv", "hw1", {"x2": "4"}, 9) == "hw1"
    assert (tmp_path / "out.csv").read_text() == "name,id,hw1\nA,x1,\nB,x2,4\n"
    with pytest.raises(ValueError, match="no column that says who"):
        table(tmp_path, "name,colour\nA,red\n")
    with pytest.raises(ValueError, match="x1 is twice"):
        table(tmp_path, "id,name\nx1,A\nx1,B\n").students()


def test_two_submissions_of_a_student_and_one_of_nobody(tmp_path: Path) -> None:
    for name in ("x1.ipynb", "x1_again.ipynb", "y.ipynb"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "x2").mkdir()
    for name in ("a.ipynb", "b.ipynb"):
        (tmp_path / "x2" / name).write_text("{}")
    (tmp_path / "secret.ipynb").symlink_to("/etc/passwd")
    os.utime(tmp_path / "x1.ipynb", (10, 10))
    roster = table(tmp_path, "id,name\nx1,A\nx2,B\n")
    (tmp_path / "roster.csv").unlink()
    found, strangers = assign_entries(collect(tmp_path), roster)
    assert found["x1"].name == "x1_again.ipynb" and "two submissions" in found["x1"].flags[0]
    assert found["x2"].path.name == "b.ipynb" and "2 notebooks" in found["x2"].flags[0]
    assert strangers == ["y.ipynb"]


def test_a_picture_that_came_with_a_notebook_does_not_count(tmp_path: Path) -> None:
    roster = table(tmp_path, CANVAS)
    folder = tmp_path / "submissions"
    folder.mkdir()
    names = ["student01_101_7001_hw1.ipynb", "student01_101_7002_scan.png"]
    for time, name in enumerate(names):  # the picture is the later one
        (folder / name).write_text("{}")
        os.utime(folder / name, (time, time))
    found, _ = assign_entries(collect(folder), roster)
    assert found["101"].name == names[0]
    assert found["101"].flags == (f"two submissions, {names[1]} and {names[0]}: the latter counts",)


def test_a_row_that_lacks_the_id_which_names_students_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row of b@x has nothing under 'ID'"):
        table(tmp_path, "Name,ID,Email\nA,1,a@x\nB,,b@x\n").students()
    assert list(table(tmp_path, "Name,ID,Email\nA,1,a@x\n,,\n").students()) == ["1"]
    assert list(table(tmp_path, CANVAS.replace("Points Possible,,", "Points Possible,,x")).students()) == ["101", "102"]  # fmt: skip


def test_the_name_under_which_a_notebook_was_given_out_says_whose_it_is(tmp_path: Path) -> None:
    roster = table(tmp_path, "id,name\ns1,A\ns1-b,B\nben.o@example.org,C\nÅsa L,D\n")
    for who in roster.students():
        name = f"hw1-{file_of(who)}"
        for kept in (name, f"Copy of {name}", f"{name} (2)", f"{name}-Copy1", f"{name}-1", f"x_{name}"):  # fmt: skip
            assert roster.match(f"{kept}.ipynb", "hw1") == who
    for name in ("hw1-s12", "hw1-s1-c", "hw2-s1-b", "xhw1-s1", "hw1-s1 hw1-s1-b"):
        assert roster.match(f"{name}.ipynb", "hw1") is None
    assert roster.match("s1.ipynb", "hw1") == "s1"
    longer = table(tmp_path, "id,name\ns1,A\ns1-1,B\n")
    assert longer.match("hw1-s1-1.ipynb", "hw1") == "s1-1"
    same = table(tmp_path, "id,name\ns1,A\nS1,B\n")
    assert same.match("hw1-s1.ipynb", "hw1") is None
    canvas = table(tmp_path, CANVAS)  # the platform's number comes first
    assert canvas.match("student01_101_7001_hw1-102.ipynb", "hw1") == "101"


def test_a_number_that_a_student_put_into_a_name_is_not_the_platforms(tmp_path: Path) -> None:
    canvas, moodle = table(tmp_path, CANVAS), table(tmp_path, MOODLE)
    # the display name and the file's own name are the student's; both try to be student 102
    assert canvas.match("102_101_77101_hw1.ipynb") == "101"
    assert canvas.match("student01_101_77101_student02_102_77102_hw1.ipynb") == "101"
    assert canvas.match("two_101_77101_two.ipynb") == "101"
    assert canvas.match("102_999_77101_hw1.ipynb") is None
    for name in ("5002_5001_assignsubmission_file", "A_5001_assignsubmission_file_B_5002_assignsubmission_file.ipynb"):  # fmt: skip
        assert moodle.match(name) == "Participant 5001"


def test_whatever_lies_in_the_folder_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ipynb")
    (tmp_path / "folder" / "inner.ipynb").mkdir(parents=True)
    (tmp_path / "gone.ipynb").write_text("{}")
    with open(os.fsencode(tmp_path) + b"/m\xfcller.ipynb", "wb") as file:
        file.write(b"{}")
    (tmp_path / ("é" * 100 + " 1.ipynb")).write_text("{}")
    (tmp_path / ("é" * 100 + " 2.ipynb")).write_text("{}")
    entries, _ = assign_entries(collect(tmp_path), None)
    assert len(entries) == 6 and entries["pipe"].path is None and entries["folder"].path is None
    (tmp_path / "gone.ipynb").unlink()
    for who, entry in entries.items():
        who.encode()  # a name that can be written into a report
        assert isinstance(digest(entry.path), str)
        with pytest.raises(Unreadable):
            read_cells(entry.path)
    files = {file_of(who) for who in entries}
    assert len(files) == 6 and max(len(name.encode()) for name in files) < 200


@pytest.mark.timeout(60)
def test_a_hundred_thousand_cells_take_seconds_and_an_endless_answer_is_refused() -> None:
    one = "def stored():\n    return 1"
    found = find_answer([cell(one) for _ in range(100_000)], "1.1-storage", "stored")
    assert found.answer == one and found.own == [] and "100000 cells" in found.flags[0]
    family = find("1.1-storage")
    cells = [cell(one + "  # again" * 20_000)]
    line = grade_problem(family, family.draw("a"), cells, None, 0)  # before any sandbox
    assert line.status == "failed" and "more than 100,000" in line.message and not line.answer


def cell(source: str, problem: str = "", role: str = "") -> dict:
    return {"source": source, "problem": problem, "role": role}


def test_answers_are_found_by_metadata_then_by_name_and_the_last_counts() -> None:
    right, other = cell("def f(x):\n    return 1", "p", "answer"), cell("def f(x):\n    return 2")
    assert find_answer([right, other], "p", "f").answer == right["source"]
    lost = find_answer([other], "p", "f")
    assert lost.answer == other["source"] and "by its name" in lost.flags[0]
    twice = find_answer([right, cell("def f(x):\n    return 3", "p", "answer")], "p", "f")
    assert twice.answer.endswith("3") and "the last counts" in twice.flags[0]
    assert find_answer([cell("def g(x): ...")], "p", "f").answer is None
    moved = find_answer([cell("# see below", "p", "answer"), other], "p", "f")
    assert moved.answer == other["source"]


def test_a_result_that_is_kept_under_the_function_s_name_does_not_hide_the_function() -> None:
    right = cell("def f(x):\n    return 1")
    for tried in ("f = f(2)", "f == 3", "f  =  f(3)\nprint(f)"):
        found = find_answer([right, cell(tried)], "p", "f")
        assert found.answer == right["source"]
        given = right | {"problem": "p", "role": "answer"}
        found = find_answer([given, cell(tried)], "p", "f")
        assert found.answer == right["source"] and found.flags == []
    short = cell("f = lambda x: 1", "p", "answer")
    assert find_answer([cell("f = min"), cell("f == 3")], "p", "f").answer == "f = min"
    assert find_answer([short, right], "p", "f").answer == short["source"]


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "empty"), (b"\xff\xfe", "no notebook"), (b"[" * 10**5, "no notebook"), (b'{"cells": [1]}', "no notebook")],
)  # fmt: skip
def test_what_is_no_notebook_is_told(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "x.ipynb").write_bytes(content)
    with pytest.raises(Unreadable, match=word):
        read_cells(tmp_path / "x.ipynb")
    with pytest.raises(Unreadable, match="no notebook"):
        read_cells(None)


def test_only_definitions_that_the_answer_uses_are_run() -> None:
    import ast

    own = "import os\nfactor = 3\ndef helper(x):\n    return deeper(x)\ndef deeper(x):\n    return factor * x\nmodel = train()\nfor i in x: pass"
    answer = "def f(x):\n    return helper(x)"
    chosen = needed(ast.parse(own).body, ast.parse(answer).body)
    assert [ast.unparse(node).split("\n")[0] for node in chosen] == ["factor = 3", "def helper(x):", "def deeper(x):"]  # fmt: skip
    assert plain_python("%time\n  !ls\nx = 1").splitlines() == ["#%time", "#  !ls", "x = 1"]


def test_only_what_is_no_python_is_taken_for_ipython_s() -> None:
    rest = "def rest(a, n):\n    return (\n        a\n        % n\n    )"
    assert plain_python(rest) == rest
    names: dict = {}
    exec(plain_python(f"%%time\n{rest}\n!ls 'x\nmath.ceil?\n?rest"), names)
    assert names["rest"](7, 3) == 1
    within = plain_python("if a:\n    x = 1\n    %time f(x)\n# %s").splitlines()
    assert within[2:] == ["#    %time f(x)", "# %s"]
    for same in ("text = 'one\u2028line'\n", "%%bash\n", "x = (1 +  # enough?", "\0"):
        assert plain_python(same) == ("#" if same[0] == "%" else "") + same


def test_values_go_over_the_wire_and_forged_bytes_do_not() -> None:
    value = {
        "a": [1, 2.5, True, None, "é", float("inf")], ("t", 1): (torch.ones(2, 3, dtype=torch.bfloat16),),
        "n": np.arange(3), "s": np.float64(0.5), "big": 10**30, "empty": torch.zeros(0, 2), "flag": torch.tensor(True),
    }  # fmt: skip
    back = wire.decode(wire.encode(value))
    assert back["a"] == value["a"] and back["big"] == 10**30 and back["s"] == 0.5
    assert back[("t", 1)][0].dtype == torch.bfloat16 and torch.equal(back["n"], torch.arange(3))
    assert back["empty"].shape == (0, 2) and back["flag"].item() is True
    arrays = [
        np.arange(3.0)[::-1],
        np.array(2.0),
        np.array([1.5], ">f8"),
        np.ones(1, np.longdouble),
        np.longdouble(3),
    ]
    back = wire.decode(wire.encode(arrays))
    assert (
        back[0].tolist() == [2, 1, 0]
        and back[1].shape == ()
        and [b.item() for b in back[2:4]] == [1.5, 1]
    )
    assert back[4] == 3 and isinstance(wire.decode(wire.encode(1 / 0 for _ in "a")), wire.Opaque)
    several = [{"q": 1}.keys(), (i for i in (1, 2)), {"v"}, np.array(["a", "b"]), range(2)]
    assert wire.decode(wire.encode(several)) == [["q"], [1, 2], ["v"], ["a", "b"], [0, 1]]
    leaf = wire.decode(wire.encode(torch.ones(2, requires_grad=True)))
    assert leaf.requires_grad and leaf.is_leaf
    assert isinstance(wire.decode(wire.encode(object())), wire.Opaque)
    message = wire.encode([torch.ones(3)])
    for forged in (b"", message[:-1], message + b"x", pickle.dumps(value), b"\0" * 64, message.replace(b"tensor", b"sensor")):  # fmt: skip
        with pytest.raises(wire.WireError):
            wire.decode(forged)
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    nested = json.dumps(["plain", None])
    for _ in range(900):
        nested = f'["list", [{nested}]]'
    assert isinstance(wire.encode(deep), bytes)
    with pytest.raises(wire.WireError):
        body = wire.save({})
        wire.decode(wire.HEADER.pack(len(nested), len(body)) + nested.encode() + body)
    with pytest.raises(wire.WireError, match="outside of tensors"):
        wire.decode(wire.encode(["a" * 100]), most=100)
    with pytest.raises(wire.WireError, match="more than 1 MB"):
        wire.encode(torch.zeros(1 << 20), most=1 << 20)


def test_changes_in_place_come_back_into_the_same_objects() -> None:
    tensor, rows, table = torch.zeros(2), [torch.zeros(1), 5], {"a": torch.zeros(1), "b": 1}
    first = rows[0]
    put_back(tensor, torch.ones(2))
    put_back(rows, [torch.ones(1), 6])
    put_back(table, {"a": torch.ones(1), "c": 2})
    assert tensor.tolist() == [1, 1] and rows[0] is first and first.item() == 1 and rows[1] == 6
    assert table["a"].item() == 1 and set(table) == {"a", "c"}
    put_back(rows, [])
    assert rows == []


def test_copies_with_other_names_look_alike_and_other_answers_do_not() -> None:
    long = "def f(x, y):\n    # mine\n" + "".join(f"    v{i} = x * {i} + y / {i + 1}\n" for i in range(12)) + "    return v3"  # fmt: skip
    renamed = long.replace("x", "left").replace("y", "right").replace("# mine", "# my own")
    other = "def f(x, y):\n" + "".join(f"    w{i} = (y - {i}) ** x if y else None\n" for i in range(12))  # fmt: skip
    pairs = look_alike({"student01": long, "student02": renamed, "student03": other})
    assert [pair[1:] for pair in pairs] == [("student01", "student02")] and pairs[0][0] > 0.95
    assert file_of("student01") == "student01" and "/" not in file_of("../x") and file_of("a/b") != file_of("a_b")  # fmt: skip
    assert Entry("x", None).flags == ()
