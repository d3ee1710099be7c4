"""The project's shape: imports run one way, links lead somewhere, facts are stated once, what a chapter needs is in the wheel."""

import ast
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from pathlib import Path

import jupytext
import pytest
import yaml
from packaging.requirements import Requirement

from tools import chapters, facts, pages
from tools.chapters import ROOT

GROUND = (
    "arguments",
    "descriptions",
    "folders",
    "progress",
    "resumed",
    "runs",
    "linears",
    "layers_4bit",
    "lora",
    "processes",
    "kept",
    "instead",
    "refused",
    "targets",
    "injection",
    "callbacks",
    "states",
    "files",
    "checkpoint",
    "export",
    "training",
)
ROOF = ("experiments", "cli", "classroom", "machine")
CHAPTERS = chapters.chapters()
PROSE = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "book").rglob("*.md")),
]  # chapters: tests/test_crosslinks.py
LINK = re.compile(r"(?<!`)\]\(([^)\s]+)\)")


def contracts(package: Path) -> str:
    """DESIGN's import rules as an import-linter configuration, for the modules that are there."""
    there = {
        path.stem
        for path in package.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__"}
    ground = [name for name in GROUND if name in there]
    roof = [name for name in ROOF if name in there]
    lab = ["lab"] if "lab" in there else []
    variants = sorted(there - set(GROUND) - set(ROOF) - {"lab"})
    rules = [
        ("a variant knows no lab and no roof", variants, lab + roof),
        ("the lab knows no variant and no roof", lab, variants + roof),
        ("the ground floor knows nothing above it", ground, variants + lab + roof),
    ]
    text = "[importlinter]\nroot_package = lora_course\n"
    for number, (name, sources, targets) in enumerate(rules):
        if sources and targets:
            text += f"\n[importlinter:contract:{number}]\nname = {name}\ntype = forbidden\nsource_modules =\n{listed(sources)}forbidden_modules =\n{listed(targets)}"
    if len(variants) > 1:
        text += f"\n[importlinter:contract:variants]\nname = no variant imports another\ntype = independence\nmodules =\n{listed(variants)}"
    return text


def listed(names: list[str]) -> str:
    return "".join(f"    lora_course.{name}\n" for name in names)


def lint(root: Path, folder: Path) -> subprocess.CompletedProcess:
    config = folder / "contracts.ini"
    config.write_text(contracts(root / "lora_course"))
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [program, "--config", config, "--no-cache"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_run_one_way(tmp_path: Path) -> None:
    result = lint(ROOT, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sparse/gates", "from lora_course import lab"),
        ("sparse/gates", "import lora_course.fused"),
        ("sparse/__init__", "from lora_course.fused import FusedLoRALinear"),
        ("fused", "import lora_course.sparse.gates"),
        ("lora", "import lora_course.sparse"),
        ("training", "from lora_course.lab import plots"),
        ("lab/plots", "import lora_course.fused"),
        ("fused", "import lora_course.cli"),
        ("lab/plots", "import lora_course.experiments"),
        ("sparse", "from lora_course import experiments"),
        ("sparse/masks", "import lora_course.cli"),
    ],
)
def test_an_import_the_other_way_is_found(tmp_path: Path, module: str, line: str) -> None:
    package = tmp_path / "lora_course"
    files = {
        "__init__": "",
        "lora": "",
        "training": "",
        "fused": "",
        "cli": "",
        "experiments": "",
        "lab/__init__": "",
        "lab/plots": "",
        "sparse/__init__": "from lora_course.sparse import gates, masks",
        "sparse/gates": "import lora_course.lora",
        "sparse/masks": "import lora_course.sparse.gates",  # the files of one variant may
    }
    for name, text in files.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert lint(tmp_path, tmp_path).returncode == 0
    (package / f"{module}.py").write_text(line + "\n")
    result = lint(tmp_path, tmp_path)
    importer = f"lora_course.{module.replace('/', '.').removesuffix('.__init__')}"
    assert result.returncode == 1 and importer in result.stdout


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        if "://" in target:
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", target), (
                f"{path.name}: {target} is no https address"
            )
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), f"{path.name}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            slugs = {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in slugs, (
                f"{path.name}: {target}: no such heading; there are {sorted(slugs)}"
            )


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_plain_markdown_so_that_colab_and_github_show_it_too(path: Path) -> None:
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "markdown":
            found = re.search(
                r"^(:::|```\{|\$\$.*\(.*\)\s*$)|\{[a-z:-]+\}`|^\(.+\)=$", cell.source, re.MULTILINE
            )
            assert not found, f"{path.name}: {found[0]!r} is MyST, which Colab shows raw"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_exercises_have_stub_and_folded_solution_under_one_id(path: Path) -> None:
    found: dict[str, set[str]] = {}
    for cell in jupytext.read(path).cells:
        kinds = {"exercise", "check", "solution"} & set(cell.metadata.get("tags", []))
        if kinds:
            assert "exercise_id" in cell.metadata, (
                f"{path.name}: a cell tagged {kinds} has no exercise_id"
            )
            found.setdefault(cell.metadata["exercise_id"], set()).update(kinds)
        if "solution" in kinds and cell.cell_type == "code":
            assert "hide-cell" in cell.metadata["tags"] and re.match(
                r"# ?@title Solution", cell.source
            )
    assert len(found) >= 3 and all({"exercise", "solution"} <= kinds for kinds in found.values()), (
        found
    )


def test_facts_are_stated_as_in_pyproject() -> None:
    stale = [path.name for path in facts.stale_files()]
    assert not stale, f"run `make facts`: {stale} differ from pyproject.toml"


def test_the_contents_list_the_chapters_that_exist() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [entry["file"] for part in contents["parts"] for entry in part["chapters"]]
    assert [name for name in files if name.startswith("notebooks/")] == [
        f"notebooks/{path.stem}" for path in CHAPTERS
    ]
    assert all((ROOT / f"{name}.md").exists() for name in [contents["root"], *files])


def test_the_bibliography_holds_the_papers_that_chapters_cite() -> None:
    cited = {number for path in CHAPTERS for number in pages.ARXIV.findall(path.read_text())}
    listed_papers = {paper["arxiv"] for paper in pages.data(ROOT, "bibliography.yml")}
    assert cited <= listed_papers, (
        f"book/_data/bibliography.yml lacks {sorted(cited - listed_papers)}"
    )
    assert listed_papers <= cited, (
        f"no chapter cites {sorted(listed_papers - cited)} of book/_data/bibliography.yml"
    )


def test_the_coverage_table_follows_the_notes_and_names_what_exists() -> None:
    rows = pages.data(ROOT, "coverage.yml")
    assert len({row["module"] for row in rows}) == len(rows) == 11
    for row in rows:
        assert row["names"], f"coverage.yml: which names answer {row['heading']}?"
        for module, names in pages.answers(row).items():
            there = vars(importlib.import_module(f"lora_course.{module}"))
            for name in names:
                assert callable(there.get(name)), f"coverage.yml: {module} has no {name}"


GRADING = {
    "assign.py", "assignment.py", "commands.py", "confinement.py", "grade.py", "gradescope.py", "grading.py", "handouts.py", "otter.py",
    "practice.py", "remote.py", "report.py", "roster.py", "runner.py", "sandbox.py", "submissions.py", "wheel.py", "wire.py",
}  # fmt: skip


def test_every_module_has_its_test_file() -> None:
    package = ROOT / "lora_course"
    for path in package.rglob("*.py"):
        name = path.relative_to(package)
        if path.name != "__init__.py":
            flat = "_".join([*name.parent.parts, name.name])
            names = [f"test_{flat}", f"{name.parent}/test_{name.name}", f"test_{name.name}"]
            names += [
                f"exercises/{name.name}",
                f"exercises/{name.parent.name}.py",
            ]  # answers to exercises
            if name.parts[0] == "experiments" and name.stem not in (
                "record",
                "study",
                "arms",
                "rates",
            ):
                names = ["experiments/test_studies.py"]  # which tries all studies
            if name.parts[:2] == ("classroom", "families"):
                names = ["test_classroom_families.py"]  # which tries all of them over fifty seeds
            if name.parts[0] == "classroom" and path.name in GRADING:
                names = ["test_classroom_grade.py"]  # a class of fifty goes through all of these
            assert any((ROOT / "tests" / test).exists() for test in names), (
                f"lora_course/{name} has none of tests/{', tests/'.join(names)}"
            )


LARGEST_ROOM = 200
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """Lines that hold code: neither blank, nor comment, nor part of a docstring or another string that stands alone."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("folder", ["lora_course", "tools", "benchmarks"])
def test_a_room_is_a_file_of_200_lines_of_code_at_most(folder: str) -> None:
    sizes = {
        path.relative_to(ROOT).as_posix(): code_lines(path.read_text())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sizes, f"no file in {folder}"
    large = {name for name, lines in sizes.items() if lines > LARGEST_ROOM}
    assert not large, f"too large: {sorted(large)}"


def test_code_is_counted_and_what_explains_it_is_not() -> None:
    text = '''"""Head."""

import os  # a comment beside code


# a comment
def f(
    x: int,
) -> str:
    """What f does,

    at length."""
    text = """two
    lines"""

    return text


LIMIT = 3
"""What it limits."""
'''
    assert code_lines(text) == 8


def test_pinned_versions_lie_in_the_stated_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = dict(line.split("==") for line in lines)
    assert "ipywidgets" not in pins
    for text in project["dependencies"] + [
        text for extra in project["optional-dependencies"].values() for text in extra
    ]:
        wanted = Requirement(text)
        assert wanted.name in pins and wanted.specifier.contains(pins[wanted.name]), (
            f"requirements.txt: {wanted} is not met"
        )


@pytest.mark.slow
def test_the_wheel_holds_code_data_and_licence(tmp_path: Path) -> None:
    copy = tmp_path / "copy"  # setuptools writes beside the sources
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        ROOT / "lora_course", copy / "lora_course", ignore=shutil.ignore_patterns("__pycache__")
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            tmp_path,
            copy,
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(copy).as_posix()
        for path in (copy / "lora_course").rglob("*")
        if path.is_file()
    }
    assert wanted <= names, f"the wheel lacks {sorted(wanted - names)}"
    assert not [name for name in names if name.startswith(("tests", "tools", "notebooks"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
