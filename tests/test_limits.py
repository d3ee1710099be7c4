"""What the recorded evidence does not settle: `tools.limits`, and a claim's line on chance."""

import re

import pytest

from lora_course.lab.claims import Claim
from tools import limits
from tools.chapters import ROOT, Result, cached, chapters
from tools.ledger import by_chance, claims_of


def claim(predicate: str, values: dict[str, list[float]], kind: str = "claim") -> Claim:
    return Claim("9.9-a", "", "", "", predicate, values, "", True, "", kind, "tiny", "")


A, B = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0]
EVERY = "all(x < y for x, y in zip(a, b))"


@pytest.mark.parametrize(
    ("predicate", "values", "said"),
    [
        (EVERY, {"a": A, "b": B}, "holds in 1 of 32 ways to swap the labels within seeds"),
        (EVERY, {"a": A, "b": [2.0, 3.0, 4.0, 5.0, 5.0]}, "holds in 0 of 32 ways to swap the labels within seeds"),
        ("all(x < y < z for x, y, z in zip(a, b, c))", {"a": A, "b": B, "c": [9.0] * 5}, "holds in 1 of 7,776 ways to swap the labels within seeds"),
        ("mean(d) + 1.2415 * std(d) < 0", {"d": [-1.0, -1.1, -0.9, -1.0, -1.2]}, "holds in 1 of 32 ways to turn the differences' signs"),
        ("all(abs(x - y) < 2 for x, y in zip(a, b))", {"a": A, "b": B}, ""),  # a rule of closeness passes every way
        ("all(x > 0.9 for x in share)", {"share": [0.95] * 5}, ""),  # a share is no difference
        ("min(a) > 0 and max(b) < 9", {"a": A, "b": B}, ""),  # of two things that are not compared
        (EVERY, {"a": [1.0], "b": [2.0]}, ""),
        (EVERY, {"b": B, "a": A}, "holds in 1 of 32 ways to swap the labels within seeds"),
        (EVERY, {"a": A[:4], "b": B[:4]}, ""),  # four texts, say
    ],
)  # fmt: skip
def test_a_line_says_how_often_chance_alone_passes_the_rule(
    predicate: str, values: dict[str, list[float]], said: str
) -> None:
    assert by_chance(claim(predicate, values)) == said


def executed() -> list[Result]:
    """The chapters that were executed as they are now."""
    found = [cached(chapter, ROOT) for chapter in chapters()]
    return [result for result in found if result is not None]


@pytest.mark.slow  # needs the executed chapters, as `make test` has them
def test_no_claim_on_five_seeds_holds_by_a_rule_that_chance_passes_one_time_in_twenty() -> None:
    results = executed()
    assert len(results) == len(chapters()), (
        "execute the chapters first: python -m tools.run_chapters"
    )
    for one in claims_of(results):
        ways = re.match(r"holds in ([\d,]+) of ([\d,]+) ways", by_chance(one))
        if ways and one.kind == "claim" and one.holds:
            passed, all_ways = (int(number.replace(",", "")) for number in ways.groups())
            assert passed / all_ways <= 0.05, one.id


def test_what_is_not_settled_is_counted_from_the_records() -> None:
    assert limits.searches()["3_2_merge"] == 3  # five seeds by its record, three by its script
    assert limits.searches()["5_1_comparison"] == 1 and limits.searches()["1_2_adalora"] == 3
    assert "smol_past" not in limits.searches()  # three seeds: an observation
    found = limits.shakespeare()
    assert found["4_2_hierarchical"][0] == 10_000 and found["0_1_lora"][0] == 40_000
    # of one text of one length there is one number
    by_size = {size: {round(b, 6) for s, b in found.values() if s == size} for size, _ in found.values()}  # fmt: skip
    assert all(len(bits) == 1 for bits in by_size.values())
    text = limits.limits([])
    assert "8 to 40 kB" in text and "3.165 to 3.270" in text and "No claim rests on a GPU" in text
