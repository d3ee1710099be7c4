"""What `lora-course assign` writes: the same each time, nothing in it that gives an answer away, an autograder that grades."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lora_course import cli
from lora_course.classroom import otter
from lora_course.classroom.assign import CHAPTERS, assign, examples, student_notebook
from lora_course.classroom.assignment import Assignment
from lora_course.classroom.comparison import difference
from lora_course.classroom.families import families
from lora_course.classroom.judge import gradients_of
from lora_course.classroom.practice import TOLERANCE, literal, practice, rounded
from lora_course.classroom.submissions import KEY

SEED = "the lighthouse at noon"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Assignment]:
    out = tmp_path_factory.mktemp("assign") / "hw1"
    return out, assign(list(CHAPTERS), SEED, out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


def test_written_again_it_is_the_same_to_the_byte_and_another_seed_is_refused(tmp_path) -> None:
    first, second = tmp_path / "a" / "hw", tmp_path / "b" / "hw"
    for out in (first, second, second):
        assign(["1.1", "2.1"], SEED, out)
    assert contents(first) == contents(second) and len(contents(first)) >= 7
    with pytest.raises(ValueError, match="another assignment"):
        assign(["1.1", "2.1"], "another seed", first)
    with pytest.raises(ValueError, match="--seed is empty"):
        assign(["1.1"], " ", tmp_path / "c")
    with pytest.raises(ValueError, match=r"'9\.1' has no graded problems"):
        assign(["9.1"], SEED, tmp_path / "c")


def test_the_folder_s_name_is_the_assignment_s_also_from_within(tmp_path, monkeypatch) -> None:
    (tmp_path / "hw7").mkdir()
    (tmp_path / "hw7" / "roster.csv").write_text("id\ns1\n")  # it is in nobody's way
    monkeypatch.chdir(tmp_path / "hw7")
    for _ in range(2):
        assert assign(["5.1"], SEED, Path(".")).name == "hw7"
    assert Path("student/hw7.ipynb").is_file()
    with pytest.raises(ValueError, match="give a --name without slashes"):
        assign(["5.1"], SEED, tmp_path / "new", name="a/b")
    assert not (tmp_path / "new").exists()


def test_files_that_assign_did_not_write_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "rubric.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds rubric\.md, which would be written over"):
        assign(["5.1"], SEED, tmp_path)
    assert contents(tmp_path) == {"rubric.md": b"mine"}


def test_nothing_that_students_get_gives_an_answer_or_the_seed_away(everything) -> None:
    out, made = everything
    given = {path: path.read_text(encoding="utf-8") for path in (out / "student").iterdir()}
    assert {path.name for path in given} == {"hw1.ipynb", "README.md"}
    text = "\n".join(given.values())
    assert SEED not in text and made.seed_of() not in text
    choices = made.choices()
    for family in made.families:
        stub = family.stub(choices[family.id], made.seed_of()).splitlines()
        shown = {line.strip() for line in stub}
        for line in family.solution(choices[family.id]).splitlines():
            line = line.strip()
            if len(line) >= 12 and line not in shown:
                quoted = json.dumps(line, ensure_ascii=False)[1:-1]
                assert quoted not in text and line not in text, (family.id, line)
        for name, table in family.conventions.items():  # other choices' names aren't told either
            assert f"drawn: {name}" not in text and table
    notebook = json.loads(given[out / "student" / "hw1.ipynb"])
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == [] and "attachments" not in cell
        assert set(cell["metadata"]) <= {KEY}


def test_the_points_of_all_documents_sum(everything) -> None:
    out, made = everything
    assert made.points == sum(family.points for family in families().values())
    rubric = (out / "rubric.md").read_text()
    assert sum(map(int, re.findall(r"^## .*\((\d+) points", rubric, re.M))) == made.points
    rows = re.findall(r"^\| \d\.\d-\S+ \| .* \| (\d+) \| (\d+) \|$", (out / "student" / "README.md").read_text(), re.M)  # fmt: skip
    assert sum(int(points) for points, _ in rows) == made.points
    titles = re.findall(r"^### .*\((\d+) points", "\n".join(c["source"] for c in student_notebook(made)), re.M)  # fmt: skip
    assert sum(map(int, titles)) == made.points


def test_practice_examples_accept_the_solution_and_say_what_a_stub_is(everything, capsys) -> None:
    out, made = everything
    choices, seed = made.choices(), made.seed_of()
    for family in made.families:
        shown = examples(family, choices[family.id], seed)
        assert len(shown) == 2
        for arguments, expected in shown:
            again = eval(literal(arguments), {"torch": torch})
            assert difference(again, arguments, 1e-3) is None
            assert (
                difference(eval(literal(expected), {"torch": torch}), expected, TOLERANCE) is None
            )
        practice(family.function(choices[family.id]), shown, family.changes)
        said = capsys.readouterr().out
        assert said.count("✓") == 2 and "✗" not in said, (family.id, said)
        stub = family.build(family.stub(choices[family.id], seed))
        practice(stub, shown, family.changes)
        assert "✓ example 1\n✓ example 2" not in capsys.readouterr().out


def test_notebooks_are_valid_and_solutions_run_from_the_top(everything) -> None:
    nbformat = pytest.importorskip("nbformat")
    out, made = everything
    for path in (*(out / "student").glob("*.ipynb"), *(out / "solutions").glob("*.ipynb")):
        nbformat.validate(nbformat.read(path, as_version=4))
    cells = json.loads((out / "solutions" / "hw1-solutions.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            source = re.sub(r"^\s*%.*$", "    pass", cell["source"], flags=re.M)
            ast.parse(source)
            exec(source, names)


@pytest.mark.parametrize("seed", ["a class", "another", "one two"])
def test_otters_tests_pass_the_solution_and_no_stub(tmp_path: Path, seed: str) -> None:
    made = assign(sorted(CHAPTERS), seed, tmp_path / "hw")
    drawn = made.seed_of()
    for family, choice in zip(made.families, made.choices().values(), strict=True):
        shown, hidden = (cell["source"] for cell in otter.tests(family, choice, drawn, "t"))
        for source, passes in ((family.solution(choice), True), (family.stub(choice, drawn), False)):  # fmt: skip
            names = {"torch": torch, "_difference": difference, "_gradients_of": gradients_of}
            names[family.name] = family.build(source)
            if passes:
                exec(f"{shown}\n{hidden}", names)
            else:
                with pytest.raises(Exception):  # noqa: B017, PT011  # whatever a stub runs into
                    exec(hidden, names)


def test_a_seed_for_each_student_draws_other_problems(tmp_path: Path) -> None:
    roster = tmp_path / "roster.csv"
    roster.write_text("id,name\n" + "".join(f"student{i:02},\n" for i in range(1, 9)))
    made = assign(["1.1", "1.2"], SEED, tmp_path / "hw", roster=roster)
    drawn = {str(made.choices(f"student{i:02}")) for i in range(1, 9)}
    assert len(drawn) == 8
    assert len(list((tmp_path / "hw" / "student").glob("*.ipynb"))) == 8
    assert not (tmp_path / "hw" / "otter").exists()


def test_rounding_copies_and_literals_are_read_back() -> None:
    values = {"x": torch.tensor([[1.23456, -2.0]]), "m": torch.tensor([True]), "n": [1, (2.5,), "a"], "e": torch.zeros(0, 2)}  # fmt: skip
    assert values["x"][0, 0] != rounded(values)["x"][0, 0]
    back = eval(literal(rounded(values)), {"torch": torch})
    assert torch.equal(back["x"], torch.tensor([[1.235, -2.0]])) and back["n"] == values["n"]
    assert back["m"].dtype == torch.bool and back["e"].shape == (0, 2)


def test_the_command_assigns_and_says_what_is_whose(tmp_path: Path, capsys) -> None:
    assert cli.main(["assign", "4.3", "--seed", SEED, "--out", str(tmp_path / "hw")]) == 0
    said = capsys.readouterr().out
    assert "4.3-grid" in said and "student is for your students (8 points)" in said
    assert cli.main(["assign", "4.9", "--seed", SEED, "--out", str(tmp_path / "hx")]) == 2
    assert "chapter '4.9' has no graded problems" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="Gradescope starts its autograder as root, and so does this test")  # fmt: skip
def test_the_autograder_grades_in_an_imitated_gradescope(tmp_path: Path) -> None:
    assign(["1.1"], SEED, tmp_path / "hw")
    made = Assignment.load(tmp_path / "hw")
    root = tmp_path / "autograder"
    for folder in ("source", "submission", "results"):
        (root / folder).mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "hw" / "gradescope.zip") as archive:
        archive.extractall(root / "source")
        modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in archive.infolist()}
    assert (
        modes["run_autograder"] == modes["setup.sh"] == 0o755 and modes["assignment.json"] == 0o600
    )
    (root / "submission_metadata.json").write_text('{"users": [{"sid": "7", "email": "a@b.c"}]}')
    cells = json.loads((tmp_path / "hw" / "solutions" / "hw-solutions.ipynb").read_text())
    for cell in cells["cells"]:
        if cell["metadata"].get(KEY, {}).get("problem") == "1.1-quantizer" and cell["metadata"][KEY]["role"] == "answer":  # fmt: skip
            cell["source"] = (
                "def read_back(weight, codebook, block):\n    import glob, os\n"
                f"    found = [open(p).read() for p in ['{root}/source/assignment.json']]\n    return found"
            )
    (root / "submission" / "my work.ipynb").write_text(json.dumps(cells))
    wheel = next((root / "source").glob("*.whl"))
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)  # fmt: skip
    run = subprocess.run(
        ["bash", str(root / "source" / "run_autograder")],
        env=os.environ | {"AUTOGRADER_ROOT": str(root), "AUTOGRADER_PYTHON": sys.executable, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    results = json.loads((root / "results" / "results.json").read_text())
    by_name = {test["name"].split(":")[0]: test for test in results["tests"]}
    assert by_name["1.1-storage"]["score"] == 3 == results["score"]
    assert by_name["1.1-quantizer"]["status"] == "failed"
    assert "PermissionError" in by_name["1.1-quantizer"]["output"]
    assert sum(test["max_score"] for test in results["tests"]) == made.points
