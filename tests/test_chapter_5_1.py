"""Chapter 5.1: its exercises reject plausible wrong answers, each with its own message; its guide rests on claims that exist."""

import json
import math
import re
import statistics
from itertools import takewhile

from lora_course.classroom.chapter_5_1 import check_front, check_paired, check_rank
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)
from tools.run_chapters import ROOT

CHAPTER = ROOT / "notebooks" / "5_1_comparison.md"


def differences(a, b):
    return [x - y for x, y in zip(a, b)]


def mean_and(error):
    return lambda a, b: (statistics.fmean(differences(a, b)), error(a, b))


def standard_error(a, b):
    return statistics.stdev(differences(a, b)) / math.sqrt(len(a))


def by_sums(a, b):
    """Another way: no library."""
    d, n = differences(a, b), len(a)
    mean = sum(d) / n
    return mean, (sum((x - mean) ** 2 for x in d) / (n * (n - 1))) ** 0.5


def front(points, beats):
    return [
        n for n, p in points.items() if not any(beats(q, p) for m, q in points.items() if m != n)
    ]


def sweep(points):
    """Another way: from left to right, a point stays if it is lower than all before it, or equal to the last that stayed."""
    kept, best = set(), math.inf
    for name in sorted(points, key=points.get):
        x, y = points[name]
        if y < best or any(points[k] == (x, y) for k in kept):
            kept.add(name)
            best = min(best, y)
    return kept


def strict(q, p):
    return q[0] < p[0] and q[1] < p[1]


def weak(q, p):
    return q[0] <= p[0] and q[1] <= p[1]


def proper(q, p):
    return weak(q, p) and q != p


def cost(shapes, r, dora):
    return sum(r * (out + inner) + dora * out for out, inner in shapes)


def by_division(shapes, parameters, dora):
    return (parameters - (sum(out for out, _ in shapes) if dora else 0)) // sum(
        out + inner for out, inner in shapes
    )


def by_counting(shapes, parameters, dora):
    *_, last = takewhile(lambda r: cost(shapes, r, dora) <= parameters, range(1000))
    return last


WRONG = {
    check_paired: [
        lambda a, b: (statistics.fmean(b) - statistics.fmean(a), standard_error(a, b)),
        mean_and(lambda a, b: math.sqrt((statistics.variance(a) + statistics.variance(b)) / len(a))),
        mean_and(lambda a, b: statistics.stdev(differences(a, b))),
        mean_and(lambda a, b: statistics.stdev(differences(a, b)) / len(a)),
        mean_and(lambda a, b: statistics.pstdev(differences(a, b)) / math.sqrt(len(a))),
        lambda a, b: (sum(differences(a, b)), standard_error(a, b)),
        lambda a, b: statistics.fmean(differences(a, b)),
    ],
    check_front: [
        lambda points: front(points, lambda q, p: proper(p, q)),
        lambda points: [min(points, key=lambda n: points[n][i]) for i in (0, 1)],
        lambda points: front(points, weak),
        lambda points: front(points, strict),
        lambda points: list(points.values()),
        lambda points: [n for n in front(points, proper) if n != "g"],
    ],
    check_rank: [
        lambda shapes, parameters, dora: max(1, parameters // sum(out * inner for out, inner in shapes)),
        lambda shapes, parameters, dora: by_division(shapes, parameters, False),
        lambda shapes, parameters, dora: round(parameters / sum(out + inner for out, inner in shapes)),
        lambda shapes, parameters, dora: parameters / sum(out + inner for out, inner in shapes),
        lambda shapes, parameters, dora: parameters // sum(out + inner for out, inner in shapes) // len(shapes),
    ],
}  # fmt: skip
RIGHT = {
    check_paired: [mean_and(standard_error), by_sums],
    check_front: [lambda points: front(points, proper), sweep],
    check_rank: [by_division, by_counting],
}


def claims_in(stem: str) -> set[str]:
    """The ids of the claims that a chapter's text makes."""
    return set(
        re.findall(
            r'claims\.add\(\s*"(\d\.\d-[a-z])"',
            next((ROOT / "notebooks").glob(f"{stem}_*.md")).read_text(),
        )
    )


def test_each_line_of_the_guide_rests_on_claims_that_exist() -> None:
    text = CHAPTER.read_text()
    guide = text.split("## Which one, when")[1].split("\n## ")[0]
    lines = [line for line in guide.splitlines() if line.startswith("|")][2:]
    assert len(lines) >= 8
    for line in lines:
        assert re.search(r"\d\.\d-[a-z]", line.rsplit("|", 2)[1]), f"no claim behind: {line}"
    for identifier in set(re.findall(r"\b(\d\.\d-[a-z])\b", text)):
        assert identifier in claims_in(identifier[:3].replace(".", "_")), (
            f"{identifier} is no claim of its chapter"
        )


def test_the_guide_says_of_claims_what_the_ledger_says() -> None:
    # ✗ behind an id: it did not hold. Compared with the newest execution of each chapter, where there is one.
    cited = re.findall(
        r"\b(\d\.\d-[a-z])( ✗)?",
        CHAPTER.read_text().split("## Which one, when")[1].split("\n## ")[0],
    )
    for identifier, failed in cited:
        stem = next((ROOT / "notebooks").glob(f"{identifier[:3].replace('.', '_')}_*.md")).stem
        runs = sorted(
            (ROOT / "build" / "executed").glob(f"{stem}-*/claims/{stem}.json"),
            key=lambda path: path.stat().st_mtime,
        )
        if runs:
            held = {
                claim["id"]: claim["holds"] for claim in json.loads(runs[-1].read_text())["claims"]
            }
            assert held.get(identifier) == (not failed), (
                f"{identifier}: the guide and the ledger differ"
            )
