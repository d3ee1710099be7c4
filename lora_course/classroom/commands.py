"""The subcommands `assign` and `grade` of `lora-course`. Importing this is quick: what they need is imported when they run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    assign = commands.add_parser(
        "assign", help="graded problems of some chapters: notebooks, solutions, rubric, autograder",
        description="Draws the graded problems of the chapters from a seed that only you know, and writes what you hand out "
        "(student/) and what you keep: solutions, rubric, a zip for Gradescope and a source for otter-assign.",
    )  # fmt: skip
    assign.add_argument("chapters", nargs="+", metavar="CHAPTER", help="such as 1.1 2.1 3.3")
    assign.add_argument("--seed", required=True, help="a phrase that only you know; keep it")
    assign.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    assign.add_argument("--name", default="", help="by default the folder's name")
    assign.add_argument(
        "--problems", nargs="+", default=(), metavar="ID", help="by default all of these chapters"
    )
    assign.add_argument(
        "--per-student",
        type=Path,
        metavar="ROSTER",
        help="a CSV of students: each gets problems of their own",
    )
    assign.set_defaults(run=run_assign)

    grade = commands.add_parser(
        "grade", help="grades a class: what students wrote runs shut in, whatever it is",
        description="HOMEWORK is the folder that `assign` wrote, SUBMISSIONS holds a notebook or folder for each student. What is "
        "graded already is not graded again; stopped, the same command goes on.",
    )  # fmt: skip
    grade.add_argument("homework", type=Path, metavar="HOMEWORK")
    grade.add_argument("submissions", type=Path, metavar="SUBMISSIONS")
    grade.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    grade.add_argument(
        "--roster", type=Path, metavar="CSV", help="of Canvas, Moodle, or with a column id"
    )
    grade.add_argument("--column", default="", help="the roster's column to fill; by default the assignment's name")  # fmt: skip
    grade.add_argument("--only", nargs="+", default=(), metavar="ID", help="grade these again, keep the rest")  # fmt: skip
    grade.add_argument("--fresh", action="store_true", help="grade everything again")
    grade.add_argument("--jobs", type=int, default=2, metavar="N", help="submissions at a time")
    grade.add_argument(
        "--trust",
        action="store_true",
        help="run submissions without a sandbox: they can do to this computer whatever you can",
    )
    grade.set_defaults(run=run_grade)


def run_assign(arguments: argparse.Namespace) -> None:
    from lora_course.classroom.assign import assign

    made = assign(
        arguments.chapters,
        arguments.seed,
        arguments.out,
        arguments.name,
        arguments.problems,
        arguments.per_student,
    )
    for family in made.families:
        print(f"{family.id:<18} {family.points:>2} points  {family.title}")
    print(
        f"{arguments.out}/student is for your students ({made.points} points); all else is yours."
    )


def run_grade(arguments: argparse.Namespace) -> None:
    from lora_course.classroom import confinement

    if arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: at least one at a time.")
    kind = confinement.choose(arguments.trust)
    from lora_course.classroom.grade import grade

    grade(
        arguments.homework,
        arguments.submissions,
        arguments.out,
        kind,
        arguments.roster,
        arguments.only,
        arguments.jobs,
        arguments.fresh,
        arguments.column,
    )
