"""Chapter 5.1's guide rests on claims that exist, and what it compares is what the records hold."""

import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import jupytext
import pytest

from lora_course.experiments import comparison, longer, neighbours
from lora_course.lab import chat_model, study
from lora_course.lab.evidence import interval
from lora_course.lab.predicates import evaluate
from tools import other_seeds
from tools.chapters import ROOT

CHAPTER = ROOT / "notebooks" / "5_1_comparison.md"
FURTHER = ("strengths = [", "beside = {", "at_low, at_full", "CHOOSING = (", '"5.1-aa", {')
"""What begins the cells behind the guide that are run as well: of turning down, and of longer trainings."""


class Page(NamedTuple):
    """What the chapter's cells say of the records: sentences, the guide's rows by what one cares about, claims by id."""

    said: str
    rows: dict[str, tuple[str, ...]]
    claims: Any


@pytest.fixture(scope="module")
def page() -> Page:
    """The cells up to the guide, and those of `FURTHER`, run without a kernel; what they train is in the records."""
    cells = [c.source for c in jupytext.read(CHAPTER).cells if c.cell_type == "code"][1:]
    guide = next(i for i, source in enumerate(cells) if "\nguide = [" in source)
    chosen = cells[: guide + 1] + [c for c in cells if any(mark in c for mark in FURTHER)]
    assert len(chosen) == guide + 1 + len(FURTHER)
    names: dict[str, Any] = {"__name__": "__main__"}
    said: list[str] = []
    for source in chosen:
        exec(compile(source, "a cell of 5.1", "exec"), names)
        if "say" in names and names["say"] != said.append:
            names["say"] = said.append
    rows = {row[0]: tuple(re.sub(r"<[^>]+>", "", cell) for cell in row) for row in names["guide"]}
    return Page("\n".join(said), rows, names["claims"])


def gaps(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


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


def test_rank_16_is_advised_by_what_it_won_and_lost_in_both_studies(page: Page) -> None:
    first, near, here = map(study.load_study, ("0_1_lora", "5_1_neighbours", "5_1_comparison"))
    of = {arm: study.series(first, arm) for arm in ("lora", "r16", "r64")}
    own = {arm: study.series(first, arm, "own_domain") for arm in of}
    won, forgot = gaps(of["lora"], of["r16"]), gaps(own["r16"], own["lora"])
    there = gaps(study.series(near, "lora r=16/python"), study.series(here, "lora/python"))
    kept = [study.series(*arm, "own_domain") for arm in ((near, "lora r=16/python"), (here, "lora/python"))]  # fmt: skip
    mean, low, high = interval(there)
    _, _, gain, sure, whole = page.rows["a first adapter"]
    assert (
        f"over rank 8 it wins {fmean(won):.3f} and forgets {fmean(forgot):.3f} more in chapter 0.1; "
        f"in the shorter runs here, on Python, it wins nothing, {mean:+.4f} ({low:+.4f} to {high:+.4f}), "
        f"and forgets {-fmean(gaps(*kept)):.3f} less"
    ) in gain
    assert low < 0 < high and min(won) > 0 < min(forgot) and interval(gaps(*kept))[2] < 0
    assert sure.startswith("0.1: all 5 seeds; here within noise; the rate beyond noise (5.1-l)")
    assert f"forgets {fmean(forgot):+.3f}" in whole
    assert f"wins {fmean(won):.3f} bits a byte in chapter 0.1, where it forgets {fmean(forgot):.3f} more, and nothing in" in page.said  # fmt: skip
    _, _, gain, sure, _ = page.rows["quality, at a larger size"]
    assert f"wins {fmean(gaps(of['lora'], of['r64'])):.3f}, " in gain
    assert (
        f"forgets {fmean(gaps(own['r64'], own['lora'])):.3f} more than rank 8, for 8 times" in gain
    )
    assert f"over rank 16 wins {fmean(gaps(of['r16'], of['r64'])):.3f} and forgets {fmean(gaps(own['r16'], own['r64'])):.3f} less" in gain  # fmt: skip
    assert sure.startswith("all 5 seeds (0.1-b)")


def test_what_turning_down_costs_is_said_for_each_text(page: Page) -> None:
    near = study.load_study("5_1_neighbours")
    cost = {}
    for domain in comparison.DOMAINS:
        found = [near["runs"][f"turned down/{domain}/{seed}"]["strengths"] for seed in range(1, 6)]
        cost[domain] = [run["0.8"]["bits_per_byte"] - run["1"]["bits_per_byte"] for run in found]
    dear, free = cost["shakespeare"], cost["python"]
    assert min(dear) > 0 and interval(free)[1] < 0 < interval(free)[2]
    _, _, gain, sure, whole = page.rows["what the base knew"]
    assert f"costs {fmean(dear):.4f} on Shakespeare and {fmean(free):.4f} on Python" in gain
    assert "price on Shakespeare beyond noise, on Python within noise" in sure
    for of in (dear, free):
        mean, low, high = interval(of)
        written = f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
        assert (
            written in whole
            and written in page.said
            and written in page.claims["5.1-p"].explanation
        )
    assert (
        f"for little quality on Python, and for {fmean(dear):.3f} bits a byte on Shakespeare"
        in page.said
    )


def test_a_price_of_qlora_is_rounded_up_and_said_of_one_text_too(page: Page) -> None:
    here, first = map(study.load_study, ("5_1_comparison", "1_1_qlora"))
    texts = [comparison.paired(here, "qlora", domain) for domain in comparison.DOMAINS]
    means = [*map(fmean, zip(*texts, strict=True)), *gaps(study.series(first, "qlora"), study.series(first, "lora"))]  # fmt: skip
    said = page.rows["memory for weights"][3]
    bounds = [float(bound) for bound in re.findall(r"0\.\d{3}", said)]
    for bound, prices in zip(bounds, (means, sum(texts, [])), strict=True):
        assert max(prices) <= bound == math.ceil(1000 * max(map(float, prices))) / 1000
    assert "mean of two texts" in said.split(";")[0] and "on one text" in said.split(";")[1]


def test_an_arm_of_another_size_is_named_with_how_much_larger_it_is(page: Page) -> None:
    long = study.load_study("5_1_longer")
    off = set()
    for steps, seeds in long["settings"]["seeds_at"].items():
        sizes = {}
        for name in longer.METHODS:
            rate = study.chosen_rate(long, f"{name}/{steps}")
            runs = (long["runs"][f"{name}/{steps}/{rate:g}/{seed}/test"] for seed in seeds)
            sizes[name] = [run["parameters"] for run in runs]
        for name, own in sizes.items():
            times = [a / b for a, b in zip(own, sizes["lora"], strict=True)]
            if max(abs(ratio - 1) for ratio in times) > 0.1:
                off.add(name)
                written = ", ".join(f"{ratio:.2f}" for ratio in times)
                assert f"at {steps} steps {name} {written} times" in page.said
    assert off == {"gates"}
    assert f"Gates have {written} times LoRA's" in page.claims["5.1-aa"].explanation


def test_the_margin_of_5_1_e_was_set_afterwards_and_other_seeds_keep_it(page: Page) -> None:
    claim = page.claims["5.1-e"]
    assert claim.holds and claim.kind == "chosen" and "set after" in claim.explanation
    other = other_seeds.verdicts()["5.1-e"]
    assert evaluate(claim.predicate, other["values"]) == other["holds"] is True
    ahead = {name: [value - 0.02 for value in values] for name, values in claim.values.items()}
    assert not evaluate(claim.predicate, ahead)
