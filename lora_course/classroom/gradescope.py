"""The autograder for Gradescope: the zip, and what runs there.

Gradescope starts a container for each submission and runs everything in it as root. So the checks run as root, and the
student's code as an ordinary user that can read neither the seed nor the families nor write the results. The container is what keeps the
rest of the world out; the network is Gradescope's to close.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import zipfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

from lora_course.classroom.assignment import FILE, Assignment
from lora_course.classroom.confinement import Limits
from lora_course.classroom.grading import Record, grade_submission
from lora_course.classroom.submissions import collect
from lora_course.classroom.wheel import add, build

SETUP = """#!/usr/bin/env bash
# Runs once, when Gradescope builds the image (choose Ubuntu 24.04): CPU torch, then the course's package.
set -eu
apt-get update
apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install --no-cache-dir "torch=={torch}" --index-url https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install --no-cache-dir /autograder/source/{wheel}
"""

RUN = """#!/usr/bin/env bash
# Runs for each submission. The seed, the families and the results belong to root alone.
set -eu
root="${AUTOGRADER_ROOT:-/autograder}"
python="${AUTOGRADER_PYTHON:-$root/venv/bin/python}"
chmod 700 "$root/source" "$root/results"
if [ -d "$root/venv" ]; then
    chmod 700 "$root"/venv/lib/python3*/site-packages/lora_course/classroom
fi
exec "$python" -m lora_course.classroom.gradescope "$root"
"""


def write_zip(path: Path, assignment: Assignment) -> None:
    """setup.sh, run_autograder, the assignment and the package's wheel."""
    name, wheel = build()
    torch = version("torch").split("+")[0]
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        add(archive, "setup.sh", SETUP.format(torch=torch, wheel=name), 0o755)
        add(archive, "run_autograder", RUN, 0o755)
        folder = path.parent
        add(archive, FILE, (folder / FILE).read_bytes(), 0o600)
        add(archive, name, wheel)
    path.write_bytes(out.getvalue())


def results(assignment: Assignment, record: Record) -> dict:
    """Gradescope's results.json."""
    tests = []
    for family in assignment.families:
        line = record.problems[family.id]
        text = " ".join([f"{line.status}. {line.message}".strip(), *(f"({f})" for f in line.flags)])
        tests.append({
            "name": f"{family.id}: {family.title}", "score": line.points, "max_score": family.points,
            "status": "passed" if line.status == "right" else "failed", "output": text,
            "visibility": "visible",
        })  # fmt: skip
    return {
        "score": record.points,
        "output": record.reason,
        "visibility": "visible",
        "tests": tests,
    }


def main(root: Path) -> None:
    """Grades what lies in `submission/`, writes `results/results.json`."""
    if os.geteuid():
        raise SystemExit(
            "the autograder must start as root: it runs the student's code as another user."
        )
    assignment = Assignment.load(root / "source")
    student = "student"
    if (root / "submission_metadata.json").is_file():
        users = json.loads((root / "submission_metadata.json").read_text(encoding="utf-8")).get(
            "users"
        ) or [{}]
        student = str(users[0].get("sid") or users[0].get("email") or student)
    entry = next(entry for entry in collect(root) if entry.name == "submission")
    record = grade_submission(assignment, student, entry, secrets.token_hex(8), "user", Limits())
    text = json.dumps(results(assignment, record), indent=1) + "\n"
    (root / "results" / "results.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
