"""A class graded: every submission its own line, whatever it is; stopped and started again as one likes."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from lora_course.classroom.assignment import FILE, Assignment
from lora_course.classroom.confinement import Kind, Limits
from lora_course.classroom.grading import Record, grade_submission
from lora_course.classroom.report import write_feedback, write_report
from lora_course.classroom.roster import Roster
from lora_course.classroom.submissions import Entry, collect, digest, file_of
from lora_course.files import replace_file

Say = Callable[[str], None]


def grade(
    homework: Path,
    submissions: Path,
    out: Path,
    kind: Kind,
    roster: Path | None = None,
    only: Sequence[str] = (),
    jobs: int = 2,
    fresh: bool = False,
    column: str = "",
    limits: Limits | None = None,
    say: Say = print,
) -> dict[str, Record]:
    """Grades what isn't graded yet, then writes roster, report and feedback. Returns every record by student.

    only: problems to grade again; the others keep their lines.
    fresh: grade everything again. Each run draws inputs of its own.
    Raises ValueError for a problem that the assignment lacks, a table of students for whom no problems were drawn, and a
    folder of another assignment's grades.
    """
    assignment = Assignment.load(homework)
    if unknown := set(only) - set(assignment.problems):
        raise ValueError(
            f"{assignment.name} has no problem {', '.join(sorted(unknown))}; it has {', '.join(assignment.problems)}."
        )
    table = Roster.read(roster) if roster else None
    if assignment.per_student and table is None:
        raise ValueError(
            f"each student of {assignment.name} has problems of their own: give --roster."
        )
    named = assignment.name if assignment.per_student else ""
    entries, strangers = assign_entries(collect(submissions), table, named)
    if assignment.per_student:
        refuse_another_table(homework, assignment, entries)
    folder = out / "records"
    folder.mkdir(parents=True, exist_ok=True)
    refuse_another_assignment(folder, homework)
    done = {} if fresh else load_records(folder)
    todo = {
        who: entry
        for who, entry in entries.items()
        if only or who not in done or done[who].digest != digest(entry.path) or missing(done[who], assignment)
    }  # fmt: skip
    records = {who: done[who] for who in entries if who in done and who not in todo}
    run = secrets.token_hex(8)
    say(f"{len(entries)} submissions of {assignment.name}: {len(todo)} to grade, {len(records)} graded before.")  # fmt: skip
    torch.set_num_threads(1)
    start = time.monotonic()
    stop = threading.Event()

    def one(who: str, entry: Entry) -> Record | None:
        if stop.is_set():
            return None
        before = done.get(who)
        return grade_submission(assignment, who, entry, run, kind, limits or Limits(), only, before)

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        waiting = {pool.submit(one, who, entry): who for who, entry in todo.items()}
        try:
            for count, future in enumerate(as_completed(waiting), 1):
                who, record = waiting[future], future.result()
                if record is None:  # it was stopped
                    continue
                save_record(folder, who, record)
                records[who] = record
                passed = time.monotonic() - start
                left = passed / count * (len(todo) - count)
                say(
                    f"{count:>4}/{len(todo)}  {who}: {record.points:g} of {assignment.points}"
                    f"{'  ' + record.reason if record.reason else ''}   about {left / 60:.0f} min left"
                )
        except BaseException:
            stop.set()
            raise
    records = {who: records[who] for who in entries}
    if todo:
        rate = len(todo) / (time.monotonic() - start) * 60
        say(f"{len(todo)} graded, {rate:.1f} a minute with {jobs} at a time.")
    grades = {who: f"{record.points:g}" for who, record in records.items()}
    if table is not None and roster is not None:
        filled = table.write(out / roster.name, column or assignment.name, grades, assignment.points)  # fmt: skip
        say(f"{out / roster.name}: column {filled!r} filled for {len(grades)} students.")
    absent = [who for who in table.students() if who not in records] if table else []
    write_report(out / "report.html", assignment, records, absent, strangers)
    write_feedback(out / "feedback", assignment, records)
    for name in strangers:
        say(f"{name} belongs to nobody on the roster: it isn't graded; the report lists it.")
    say(f"{out / 'report.html'}: the report. {out / 'feedback'}: a file for each student.")
    return records


def assign_entries(
    entries: Sequence[Entry], table: Roster | None, assignment: str = ""
) -> tuple[dict[str, Entry], list[str]]:
    """Each student's submission, and the names of those that belong to nobody. Of two of a student the later notebook counts.

    assignment: its name, where each student's notebook was called by it and by the student's id.
    """
    found: dict[str, Entry] = {}
    strangers = []
    for entry in entries:
        who = table.match(entry.name, assignment) if table else entry.name.removesuffix(".ipynb")
        if who is None:
            strangers.append(entry.name)
            continue
        if who in found:
            less, more = sorted((found[who], entry), key=weight)
            flag = f"two submissions, {less.name} and {more.name}: the latter counts"
            entry = Entry(more.name, more.path, (*more.flags, flag))
        found[who] = entry
    return found, strangers


def weight(entry: Entry) -> tuple[bool, float]:
    """Of two of a student's the larger counts: a notebook before the picture or PDF that came with it, then the later one."""
    if entry.path is None:
        return False, 0
    return entry.path.suffix.lower() == ".ipynb", entry.path.stat().st_mtime


def refuse_another_table(homework: Path, assignment: Assignment, entries: dict[str, Entry]) -> None:
    """Raises ValueError where students handed in for whom `assign` drew no problems: their ids are another table's."""
    folder = homework / "solutions"
    lack = [
        who
        for who in entries
        if not (folder / f"{assignment.name}-{file_of(who)}-solutions.ipynb").exists()
    ]
    if folder.is_dir() and lack:
        raise ValueError(
            f"{assignment.name} has no problems for {', '.join(lack[:5])}: they are drawn from the ids of the table that `assign "
            "--per-student` had. Give that table, or assign again with this one: who has problems keeps them."
        )


def refuse_another_assignment(folder: Path, homework: Path) -> None:
    """Raises ValueError where a folder's records are of another assignment: they would be written over."""
    mark, own = folder / "assignment.sha256", digest(homework / FILE)
    if mark.exists() and mark.read_text(encoding="utf-8") != own:
        raise ValueError(
            f"{folder.parent} holds the grades of another assignment: give another --out."
        )
    mark.write_text(own, encoding="utf-8")


def missing(record: Record, assignment: Assignment) -> bool:
    return set(record.problems) != set(assignment.problems)


def save_record(folder: Path, who: str, record: Record) -> None:
    """Whole or not at all, so that a run that is stopped can go on."""
    text = json.dumps(record.as_json(), indent=1, ensure_ascii=True) + "\n"
    replace_file(folder / f"{file_of(who)}.json", text.encode())


def load_records(folder: Path) -> dict[str, Record]:
    """What was graded before; a file that can't be read is graded again."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = Record.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError):
            continue
        found[record.student] = record
    return found
