"""Forty invented submissions and more of one assignment, and the grade that each must get.

    for submission in submissions(homework):
        submission.write(folder)

Honest ones, broken files, answers that are wrong in one way, and attacks. `points` says what each must get; the words of
`says` stand in its feedback.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_course.classroom.assign import student_notebook
from lora_course.classroom.assignment import Assignment
from lora_course.classroom.submissions import KEY

STORAGE, QUANTIZER, BUDGET = "1.1-storage", "1.1-quantizer", "1.2-budget"
ALLOCATION, GATES, BALANCE = "1.2-allocation", "2.1-gates", "2.1-balance"

ATTACKS = {  # the body of `stored`, whose arguments are rows, columns, bits, block; each loses these three points alone
    "loop": ("while True: pass", "stopped after"),
    "exit": ("import os; os._exit(0)", "process ended"),
    "leaves": ("raise SystemExit", "SystemExit"),
    "forks": ("import os\n    while True: os.fork()", ""),
    "memory": ("kept = []\n    while True: kept.append(bytearray(10**7))", ""),
    "crash": ("import ctypes; ctypes.string_at(0)", "process ended"),
    "kills": ("import os, signal; os.kill(os.getppid(), signal.SIGKILL); return 1", ""),
    "network": ("import socket; socket.create_connection(('192.0.2.1', 80), 1)", "unreachable"),
    "deep": ("return stored(rows, columns, bits, block)", "RecursionError"),
    "disk": ("f = open('/tmp/full', 'wb')\n    while True: f.write(bytes(10**6))", "OSError"),
    "bytes": ("import os\n    for stream in range(3, 30):\n        try: os.write(stream, b'9' * 64)\n        except OSError: pass", "no answer"),
    "huge": ("return [0] * 50_000_000", ""),
    "keys": ("return open('/etc/shadow').read()", "stops"),
    "seed": (
        "import glob, json\n    for path in glob.glob('/**/assignment.json', recursive=True): return json.load(open(path))['seed']\n    raise LookupError('no seed')",
        "",
    ),
    "families": ("from lora_course.classroom.families import find\n    return find('1.1-storage')", "ModuleNotFoundError"),
    "frames": (
        "import inspect\n    frame = inspect.currentframe()\n    while frame and 'right' not in frame.f_locals: frame = frame.f_back\n    return frame.f_locals['right'](rows, columns, bits, block)",
        "AttributeError",
    ),
    "pickle": (
        "class Evil:\n        def __reduce__(self): return (print, ('pwned',))\n    import wire\n    wire.encode = lambda *a: __import__('pickle').dumps(Evil())\n    return Evil()",
        "",
    ),
    "traces": ("import sys; sys.settrace(lambda *a: sys.exit()); sys.setprofile(print); return 1", ""),
    "hunts": (
        "import gc\n    found = [o for o in gc.get_objects() if type(o).__name__ in ('Exercise', 'Family', 'Case')]\n    return found[0].right(rows, columns, bits, block)",
        "IndexError",
    ),
    "patches torch": (
        "torch.equal = torch.allclose = torch.Tensor.__eq__ = lambda *a, **k: True\n    return torch.ones(1)",
        "",
    ),
    "lying tensor": (
        "class Same(torch.Tensor):\n        def __eq__(self, other): return True\n        def item(self): return other\n    return torch.ones(1).as_subclass(Same)",
        "",
    ),
    "long name": ("class Huge:\n        def __repr__(self): return 'a' * 10**9\n    return Huge()", "a Huge"),
    "large number": ("return 10**4000", "beyond 1e308, which is wrong"),
    "threads": (
        "import threading, time\n    threading.Thread(target=lambda: [time.sleep(0.01) for _ in iter(int, 1)]).start()\n    return 1",
        "",
    ),
    "orphan": ("import os\n    if os.fork(): os._exit(0)\n    while True: pass", ""),
    "proc": ("open('/proc/1/mem', 'wb').write(b'0'); return 1", "stops"),
    "protocol": ("print('{\"result\": 0, \"status\": \"right\"}'); return '[\"int\", \"1\"]'", "A number is expected"),
    "equal": (
        "class Same(float):\n        def __eq__(self, other): return True\n        __hash__ = None\n    return Same(1)",
        "",
    ),
}  # fmt: skip


@dataclass
class Submission:
    """content: bytes of the notebook, or what writes the submission into the folder."""

    student: str
    kind: str
    points: float
    content: bytes | Callable[[Path], None]
    says: str = ""
    flag: str = ""
    files: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        path = folder / f"{self.student}.ipynb"
        self.content(path) if callable(self.content) else path.write_bytes(self.content)


def own_cell(source: str) -> dict[str, Any]:
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": 1}  # fmt: skip


def submissions(assignment: Assignment) -> list[Submission]:
    """Forty of them, for the problems of chapters 1.1, 1.2 and 2.1."""
    families = {family.id: family for family in assignment.families}
    choices = assignment.choices()
    right = {id: family.solution(choices[id]) for id, family in families.items()}
    worth = {id: family.points for id, family in families.items()}
    total = sum(worth.values())
    made: list[Submission] = []

    def notebook(
        answers: dict[str, str], first: str = "", last: str = "", colab: bool = False
    ) -> bytes:
        cells = student_notebook(assignment)
        for cell in cells:
            mark = cell["metadata"].get(KEY, {})
            if mark.get("role") == "answer" and mark["problem"] in answers:
                cell["source"] = answers[mark["problem"]]
        cells = [own_cell(first)] * bool(first) + cells + [own_cell(last)] * bool(last)
        for cell in cells if colab else ():
            cell["metadata"] = {"id": "Xy", "colab": {"base_uri": "https://localhost:8080/"}}
            cell["source"] = cell["source"].splitlines(keepends=True)
        return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()  # fmt: skip

    def add(kind: str, points: float, content: Any, says: str = "", flag: str = "") -> None:
        made.append(Submission(f"student{len(made) + 1:02}", kind, points, content, says, flag))

    def without(*lost: str) -> float:
        return total - sum(worth[id] for id in lost)

    def changed(id: str, source: str) -> bytes:
        return notebook(right | {id: source})

    # honest
    add("all right", total, notebook(right))
    add("untouched", 0, notebook({}), "not attempted")
    add("half", worth[STORAGE] + worth[BUDGET], notebook({id: right[id] for id in (STORAGE, BUDGET)}))  # fmt: skip
    add("from Colab", total, notebook(right, "%pip install torch\n!ls", colab=True), flag="by its name")  # fmt: skip
    renamed = right[STORAGE].replace("def stored(", "def hidden_helper(")
    add("helper elsewhere", total, notebook(
        right | {STORAGE: "def stored(*numbers):\n    return hidden_helper(*numbers)"}, first=renamed))  # fmt: skip
    add("experiments", total, notebook(right, first="while True:\n    pass", last="1 / 0"))
    add("float64 everywhere", total, notebook(
        right | {STORAGE: "torch.set_default_dtype(torch.float64)\n" + right[STORAGE]}))  # fmt: skip
    add("prints", total, changed(STORAGE, right[STORAGE].replace(
        "    blocks =", "    print('a' * 300_000_000) if rows == 1 else None\n    blocks =", 1)))  # fmt: skip
    # wrong in one way
    other = families[BUDGET].neighbours(choices[BUDGET])["rounding"][0]
    add("one rule missed", without(BUDGET), changed(BUDGET, families[BUDGET].solution(other)), "All is right but one rule")  # fmt: skip
    neighbour = {id: family.draw("another class") for id, family in families.items()}
    same = [id for id in families if neighbour[id] == choices[id]]
    add("another class's answers", sum(worth[id] for id in same),
        notebook({id: families[id].solution(neighbour[id]) for id in families}))  # fmt: skip
    add("renamed", without(STORAGE), changed(STORAGE, renamed), "no function stored")
    add("deleted", without(STORAGE), changed(STORAGE, "# done by hand"), "no function stored")
    add("syntax error", without(STORAGE), changed(STORAGE, "def stored(rows, columns:\n    return 1"), "SyntaxError")  # fmt: skip
    add("damage", without(QUANTIZER), changed(QUANTIZER, right[QUANTIZER].replace("    flat =", "    weight[0] = 1\n    flat =", 1)), "changed what it was given")  # fmt: skip
    add("no gradient", without(GATES), changed(GATES, right[GATES].replace("p = z.softmax(-1)", "z = z.detach()\n    p = z.softmax(-1)")), "gradient")  # fmt: skip
    add("NaN", without(QUANTIZER), changed(QUANTIZER, right[QUANTIZER].replace("return torch.cat", "return 0 / 0.0 if False else torch.nan * torch.cat")), "NaN")  # fmt: skip
    add("twice, last right", total, notebook(right | {STORAGE: "def stored(*a):\n    return 1"}, last=right[STORAGE]), flag="")  # fmt: skip
    made[-1].points = without(STORAGE)  # the marked cell still defines the function: it counts
    # broken files
    add("empty", 0, b"", "empty")
    add("no JSON", 0, b"\x89PNG\r\n\x1a\n not a notebook", "no notebook")
    add("no notebook", 0, b'{"cells": "none"}', "no notebook")
    add("nested", 0, b"[" * 200_000, "no notebook")

    def large(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(200 << 20)

    add("200 MB", 0, large, "200 MB")
    for kind, (body, says) in ATTACKS.items():
        add(kind, without(STORAGE), changed(STORAGE, f"def stored(rows, columns, bits, block):\n    {body}\n"), says)  # fmt: skip
    assert len(made) == 50, len(made)
    return made
