"""An instructor's own table of students (Canvas's, Moodle's, any CSV with an id): read, matched, one column filled."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from lora_course.classroom.submissions import file_of

IDS = ("id", "student id", "student_id", "sid", "sis user id", "sis login id", "login", "username", "identifier",
       "email", "email address", "e-mail")  # fmt: skip
"""Columns that say who a row is, in lower case; the first of them that a table has names the student in reports."""

NUMBERED = {
    "canvas": (r"[^_]*_(?:late_)?(\d+)_\d+_", "id"),
    "moodle": (r".*?_(\d+)_assignsubmission_", "identifier"),
}
"""How a platform writes a student's number into a file's name, and the column that has it. Where it does, nothing else of the
name counts: the rest is the student's to choose, and could be another's number."""


@dataclass
class Roster:
    """kind: "canvas" (a gradebook export), "moodle" (a grading worksheet) or "plain"."""

    header: list[str]
    rows: list[list[str]]
    kind: str
    dialect: type[csv.Dialect]
    mark: bool
    ending: str

    @classmethod
    def read(cls, path: Path) -> Roster:
        """Raises ValueError where the file is no table with a column that says who a row is."""
        raw = path.read_bytes()
        mark = raw.startswith(b"\xef\xbb\xbf")
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not in UTF-8: save it as CSV UTF-8.") from None
        try:
            dialect = csv.Sniffer().sniff(text[:4096], ",;\t")
        except csv.Error:
            dialect = csv.excel
        dialect.doublequote, dialect.quotechar = True, '"'
        table = [row for row in csv.reader(io.StringIO(text), dialect) if row]
        if len(table) < 2:
            raise ValueError(f"{path} has no rows under its header.")
        header, rows = table[0], table[1:]
        names = [name.strip().lower() for name in header]
        kind = "plain"
        if "student" in names and "sis login id" in names:
            kind = "canvas"
        elif "identifier" in names and "grade" in names:
            kind = "moodle"
        if not any(name in IDS for name in names):
            raise ValueError(f"{path} has no column that says who a row is: call one of them id. It has {', '.join(header)}.")  # fmt: skip
        width = len(header)
        rows = [row + [""] * (width - len(row)) for row in rows]
        return cls(header, rows, kind, dialect, mark, "\r\n" if "\r\n" in text else "\n")

    def students(self) -> dict[str, list[str]]:
        """Each student's row by id: rows without any (Canvas's "Points Possible") are none.

        Raises ValueError for an id that is there twice, and for a row that has another of the ids but not the first one.
        """
        place, *others = self._places()
        found: dict[str, list[str]] = {}
        for row in self.rows:
            student = row[place].strip()
            if row[0].strip().lower().startswith("points possible"):
                continue
            if student in found:
                raise ValueError(f"{student} is twice in the roster: a student has one row.")
            if student:
                found[student] = row
            elif known := [row[other] for other in others if row[other].strip()]:
                raise ValueError(
                    f"the roster's row of {known[0]} has nothing under {self.header[place]!r}, which names the students: fill it in."
                )
        return found

    def match(self, name: str, assignment: str = "") -> str | None:
        """The student to whom a submission's name belongs, by any of the ids in it; None for none or more than one.

        assignment: of problems drawn for each student, its name. `assign` called a student's notebook by it and by the id.

        Canvas writes name_ID_file-ID_title, Moodle Name_ID_assignsubmission_file, others what the student chose.
        """
        stem = _plain(re.sub(r"(\.ipynb|\.txt|\.zip)+$", "", name, flags=re.IGNORECASE))
        pattern, column = NUMBERED.get(self.kind, ("", ""))
        names = [name.strip().lower() for name in self.header]
        if column in names and (given := re.match(pattern, stem)):
            place = names.index(column)
            found = [who for who, row in self.students().items() if _number(row[place]) == given[1]]
            return found[0] if len(found) == 1 else None
        if assignment and (owners := self._given(stem, assignment)):
            return owners[0] if len(owners) == 1 else None
        parts = [stem, *re.split(r"[\s_()]+", stem)]
        exact: dict[str, int] = {}
        for student, row in self.students().items():
            for place in self._places():
                value = _number(row[place])
                if value and value in parts:
                    exact[student] = min(exact.get(student, 99), parts.index(value))
        if not exact:
            return None
        first = min(exact.values())  # Canvas: the student's number stands before the file's
        best = [student for student, place in exact.items() if place == first]
        return best[0] if len(best) == 1 else None

    def write(self, path: Path, column: str, grades: dict[str, str], possible: float) -> str:
        """The same table with one column filled; the others stay. Returns the column's name."""
        place = self._column(column)
        header, students = list(self.header), self.students()
        if place is None:
            header.append(column)
            place = len(header) - 1
        rows = []
        owner = {id(row): student for student, row in students.items()}
        for old in self.rows:
            row = old + [""] * (len(header) - len(old))
            student = owner.get(id(old))
            if student in grades:
                row[place] = grades[student]
            elif student is None and row[0].strip().lower().startswith("points possible"):
                row[place] = row[place] or f"{possible:g}"
            rows.append(row)
        out = io.StringIO()
        writer = csv.writer(out, self.dialect, lineterminator=self.ending)
        writer.writerows([header, *rows])
        path.write_bytes((b"\xef\xbb\xbf" if self.mark else b"") + out.getvalue().encode())
        return header[place]

    def _places(self) -> list[int]:
        names = [name.strip().lower() for name in self.header]
        return [names.index(name) for name in IDS if name in names]

    def _given(self, stem: str, assignment: str) -> list[str]:
        """The students whose notebook was given out under the name in `stem`: "copy of hw1-s1 (2)", "hw1-s1-copy1"."""
        names = {who: _plain(f"{assignment}-{file_of(who)}") for who in self.students()}
        # the longest first: hw1-s1-b is no hw1-s1
        each = "|".join(re.escape(name) for name in sorted(names.values(), key=len, reverse=True))
        found = re.findall(rf"(?:^|[\s_(])({each})(?:-(?:copy)?\d+)?(?=[\s(]|$)", stem)
        return [who for who, name in names.items() if name in found]

    def _column(self, column: str) -> int | None:
        """Where a grade goes: Canvas writes "hw1 (12345)", Moodle "Grade"."""
        for place, name in enumerate(self.header):
            plain = re.sub(r"\s*\(\d+\)$", "", name.strip())
            if plain.lower() == column.lower():
                return place
        return (
            self.header.index("Grade") if self.kind == "moodle" and "Grade" in self.header else None
        )


def _number(text: str) -> str:
    return _plain(text).removeprefix("participant ").strip()


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip().lower()
