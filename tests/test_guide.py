"""Chapter 5.1's guide rests on claims that exist, and what it compares is what the records hold."""

import re

from lora_course.experiments import longer, neighbours
from lora_course.lab import chat_model
from tools.chapters import ROOT

CHAPTER = ROOT / "notebooks" / "5_1_comparison.md"


def claims_in(stem: str) -> set[str]:
    """The ids of the claims that a chapter's text makes, and of those that were stated before their runs."""
    text = next((ROOT / "notebooks").glob(f"{stem}_*.md")).read_text()
    before = set(chat_model.QUESTIONS) | set(neighbours.CLAIMS) | set(longer.CLAIMS)
    return set(re.findall(r'claims\.add\(\s*"(\d\.\d-[a-z])"', text)) | {
        identifier for identifier in before if f'"{identifier}"' in text
    }


def guide() -> str:
    """The section with the table of what to take, and its folded rows."""
    text = CHAPTER.read_text()
    start = text.index("\n### Which one, when")
    return text[start : text.index("\n### ", start + 1)]


def test_each_line_of_the_guide_rests_on_claims_that_exist() -> None:
    tables = re.findall(
        r"^(?:guide|rest|several) = \[\n(.*?)^\]", guide(), re.MULTILINE | re.DOTALL
    )
    assert len(tables) == 3
    assert tables[0].count("\n    (") < 8  # what a reader decides by, on one screen
    rows = [row for table in tables for row in re.split(r"^    \((?=\")", table, flags=re.MULTILINE)[1:]]  # fmt: skip
    assert len(rows) == 18
    for row in rows:
        assert re.search(r"ledger\(['\"]\d\.\d-[a-z]['\"]", row), f"no claim behind: {row}"
    for identifier in set(re.findall(r"\b(\d\.\d-[a-z])\b", CHAPTER.read_text())):
        stem = identifier[:3].replace(".", "_")
        # exercises have ids too, and stand under "Exercises"
        exercise = f":exercise_id: {identifier}" in CHAPTER.read_text() or f"Project {identifier}" in CHAPTER.read_text()  # fmt: skip
        assert identifier in claims_in(stem) or exercise, f"{identifier} is no claim of its chapter"


def test_each_line_of_the_guide_says_how_much() -> None:
    # an effect is computed: no digit of a measured number is typed into a row, only ranks, scales and counts of seeds
    typed = re.findall(r"[^\w\"'{/-]([+-]?0\.\d+)(?![\w\"'}])", guide().split("guide = [")[1])
    assert not typed, f"typed numbers: {typed}"
