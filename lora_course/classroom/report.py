"""What an instructor reads after grading, and what each student gets: plain files, nothing loaded from anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from lora_course.classroom.assignment import Assignment
from lora_course.classroom.grading import Record
from lora_course.classroom.submissions import file_of, look_alike

SIGN = {"right": "✓", "wrong": "✗", "not attempted": "–", "failed": "!"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { border: 1px solid #bbb; padding: .25rem .6rem; text-align: left; vertical-align: top }
.bar { background: #2b6cb0; height: 1rem; display: inline-block } td.n { text-align: right } small { color: #555 }
"""


def write_report(
    path: Path,
    assignment: Assignment,
    records: Mapping[str, Record],
    absent: Sequence[str],
    strangers: Sequence[str],
) -> None:
    """Distribution, most missed problems, most frequent messages, answers that look alike, every line."""
    parts = [f"<h1>{escape(assignment.name)}: {len(records)} submissions</h1>"]
    parts += _distribution(assignment, records)
    parts += _missed(assignment, records)
    parts += _messages(records)
    parts += _alike(assignment, records)
    parts += _list("Nothing handed in", absent)
    parts += _list("Submissions that belong to nobody on the roster: not graded", strangers)
    parts += _everyone(assignment, records)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(assignment.name)}</title>'
    path.write_text(f"{page}<style>{STYLE}</style>\n" + "\n".join(parts) + "\n", encoding="utf-8")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells that are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return [f"<table><tr>{head}</tr>", *body, "</table>"]


def _distribution(assignment: Assignment, records: Mapping[str, Record]) -> list[str]:
    counts = Counter(record.points for record in records.values())
    most = max(counts.values(), default=1)
    rows = [
        [f"{points:g}", f'<span class="bar" style="width: {300 * counts[points] / most:.0f}px"></span> {counts[points]}']
        for points in sorted(counts, reverse=True)
    ]  # fmt: skip
    return ["<h2>Points</h2>", *_table([f"points of {assignment.points}", "students"], rows)]


def _missed(assignment: Assignment, records: Mapping[str, Record]) -> list[str]:
    rows = []
    for family in assignment.families:
        lines = [record.problems[family.id].status for record in records.values()]
        counts = Counter(lines)
        rows.append((len(lines) - counts["right"], family, counts))
    rows.sort(key=lambda row: -row[0])
    cells = [
        [escape(f"{family.id}: {family.title}"), *(str(counts[status]) for status in SIGN)]
        for _, family, counts in rows
    ]
    return ["<h2>Problems, the most missed first</h2>", *_table(["problem", *SIGN], cells)]


def _messages(records: Mapping[str, Record]) -> list[str]:
    counts = Counter(
        (id, line.message.strip())
        for record in records.values()
        for id, line in record.problems.items()
        if line.message
    )
    rows = [[str(n), escape(id), escape(text)] for (id, text), n in counts.most_common(20)]
    return ["<h2>Most frequent messages</h2>", *_table(["students", "problem", "message"], rows)]


def _alike(assignment: Assignment, records: Mapping[str, Record]) -> list[str]:
    """Pairs within one problem. With one seed for all, right answers are alike for good reasons: a person judges."""
    rows = []
    for family in assignment.families:
        if family.bugs:
            continue  # everyone starts from the same text
        answers = {who: r.problems[family.id].answer for who, r in records.items() if r.problems[family.id].answer}  # fmt: skip
        pairs = look_alike(answers)
        rows += [[escape(family.id), escape(a), escape(b), f"{share:.0%}"] for share, a, b in pairs[:20]]  # fmt: skip
    text = (
        "<p>Answers that share nearly all of their text, names and comments aside. Short right answers are "
        "alike by themselves, so look at both before you conclude anything.</p>"
    )
    return ["<h2>Answers that look alike</h2>", text, *_table(["problem", "", "", "shared"], rows)]


def _list(title: str, names: Sequence[str]) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", f"<p>{escape(', '.join(names))}</p>"] if names else []


def _everyone(assignment: Assignment, records: Mapping[str, Record]) -> list[str]:
    rows = []
    for who, record in sorted(records.items()):
        cells = [escape(who), f"{record.points:g}"]
        for id in assignment.problems:
            line = record.problems[id]
            cells.append(f"{SIGN[line.status]} <small>{escape(line.message)}</small>")
        flags = [
            *record.flags,
            *(f"{id}: {f}" for id, l in record.problems.items() for f in l.flags),
        ]
        rows.append([*cells, escape("; ".join(flags))])
    return [
        "<h2>Everyone</h2>",
        *_table(["student", "points", *assignment.problems, "remarks"], rows),
    ]


def feedback(assignment: Assignment, record: Record) -> str:
    """What a student is told, as Markdown."""
    lines = [f"# {assignment.name}: {record.points:g} of {assignment.points} points", ""]
    if record.reason:
        lines += [f"Nothing could be graded. {record.reason}", ""]
    for family in assignment.families:
        line = record.problems[family.id]
        title = f"{SIGN[line.status]} {family.id}: {family.title}"
        lines += [f"## {title} ({line.points:g} of {family.points})", "", f"{line.status}. {line.message}".strip(), ""]  # fmt: skip
        lines += [f"Remark: {flag}." for flag in line.flags] + [""] * bool(line.flags)
    return "\n".join(lines).rstrip() + "\n"


def write_feedback(folder: Path, assignment: Assignment, records: Mapping[str, Record]) -> None:
    """A file a student."""
    folder.mkdir(exist_ok=True)
    for who, record in records.items():
        (folder / f"{file_of(who)}.md").write_text(feedback(assignment, record), encoding="utf-8")
