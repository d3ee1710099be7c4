"""The ledger: every claim of every chapter, from the records that their runs left."""

import html
import itertools
import math
import re
from pathlib import Path
from typing import Any

from lora_course.lab.chat_model import QUESTIONS
from lora_course.lab.claims import EVIDENCE, KINDS, Claim, anchor_of, load_claims
from lora_course.lab.predicates import evaluate
from tools import other_seeds
from tools.chapters import Result, title

MOST_WAYS = 7_776  # three series of five seeds
ZIPPED = re.compile(r"zip\(([^()]*)\)")  # the series that a rule compares


def ledger(root: Path, results: list[Result]) -> str:
    """Every claim of every chapter, a line each that opens: what was expected, what came out, whether it holds."""
    parts, again = [], other_seeds.verdicts()
    for result in results:
        for chapter in load_claims(result.folder / "claims"):
            claims = chapter["claims"]
            held = sum(claim.holds for claim in claims)
            parts.append(
                f"## {title(root / 'notebooks' / f'{result.stem}.md')}\n\n"
                f"{held} of {len(claims)} hold, under the profile `{chapter['profile']}`. "
                f"[Read the chapter](../notebooks/{result.stem}.ipynb)\n"
            )
            parts += [claim_row(claim, result.stem, again.get(claim.id)) for claim in claims]
    return "\n".join(parts) or "*No chapter yet.*"


def claims_of(results: list[Result]) -> list[Claim]:
    """All claims of the chapters that these results are of, in order."""
    chapters = [chapter for result in results for chapter in load_claims(result.folder / "claims")]
    return [claim for chapter in chapters for claim in chapter["claims"]]


def verdicts_of(results: list[Result]) -> dict[str, bool]:
    """Each claim's id → whether it holds."""
    return {claim.id: claim.holds for claim in claims_of(results)}


def carried_over(results: list[Result]) -> str:
    """How many of the claims that were tried on the chat model hold there and on nano, on neither, and which on one of them.

    What other seeds refute does not hold on nano.
    """
    refuted = {id for id, claim in other_seeds.verdicts().items() if not claim["holds"]}
    held = {id: holds and id not in refuted for id, holds in verdicts_of(results).items()}
    tried = {id: QUESTIONS[id].nano for id in QUESTIONS if id in held}
    if not tried:
        return f"None of {len(QUESTIONS)} central claims has been tried on SmolLM2-135M yet."
    other = [id for id, nano in tried.items() if held[id] != held[nano]]
    apart = ", ".join(f"{link(id)} (on nano {link(tried[id])})" for id in other)
    both = sum(held[id] and held[nano] for id, nano in tried.items())
    return (
        f"Of {len(QUESTIONS)} central claims {len(tried)} were stated for SmolLM2-135M before they were tried there, with few seeds: "
        f"{both} hold on both models, {len(tried) - len(other) - both} on neither (which says less, since a rule about every seed "
        "fails easily)" + (f", and {len(other)} on one of the two: {apart}." if other else ", and none on one of the two.")
    )  # fmt: skip


def on_other_seeds(results: list[Result]) -> str:
    """How many verdicts stayed when five seeds that nothing had been chosen with were trained, and which turned."""
    held = verdicts_of(results)
    again = {id: claim["holds"] for id, claim in other_seeds.verdicts().items() if id in held}
    if not again:
        return "No claim has been tried on other seeds yet."
    kept = [id for id in again if held[id] and again[id]]
    lost = [id for id in again if held[id] and not again[id]]
    found = [id for id in again if again[id] and not held[id]]
    failed = len(again) - len(kept) - len(lost)
    said = (
        f"Of those that hold and rest on trainings, {len(kept) + len(lost)} were tried so far with seeds that nothing had been "
        f"chosen with (5 to 9 where the course has 0 to 4): {len(kept)} hold there too"
    )
    said += f", {', '.join(map(link, lost))} not; these count as seen since." if lost else "."
    if lost:
        said += f" So {len(kept) / (len(kept) + len(lost)):.0%} held as they were called at first."
    if failed:
        said += (
            f" Of {failed} that do not hold, {', '.join(map(link, found)) or 'none'} would there."
        )
    return said


def link(id: str) -> str:
    return f"[{id}](#{anchor_of(id)})"


def claim_row(claim: Claim, stem: str, again: dict[str, Any] | None = None) -> str:
    """A claim that opens (sphinx-design's dropdown), with its anchor, and classes for the filter. again: with other seeds."""
    rows = [
        ("verdict", f"{claim.verdict}: `{cell(claim.predicate)}`"),
        ("kind", KINDS[claim.kind]),
        ("rests on", EVIDENCE[claim.evidence]),
        ("source", cell(claim.source)),
        ("expected", cell(claim.expected)),
        ("came out", cell(claim.effect or claim.outcome)),
        ("values", values(claim.values)),
        ("with other seeds", f"{'holds' if again['holds'] else 'does not hold'}<br>{values(again['values'])}" if again else ""),
        ("by chance", by_chance(claim)),
        ("explanation", cell(claim.explanation)),
        ("stated in", f'<a href="../notebooks/{stem}.html#{claim.anchor}">chapter {".".join(stem.split("_")[:2])}</a>'),
    ]  # fmt: skip
    body = "\n".join(f"| {name} | {text} |" for name, text in rows if text)
    chapter, verdict = "-".join(stem.split("_")[:2]), "holds" if claim.holds else "fails"
    return (
        f"::::{{dropdown}} {claim.id} · {claim.verdict} · {one_line(claim.statement)}\n"
        f":name: {claim.anchor}\n"
        f":class-container: claim chapter-{chapter} verdict-{verdict} model-{claim.evidence}\n\n"
        f"| claim | {claim.id} |\n|---|---|\n{body}\n::::\n"
    )


def by_chance(claim: Claim) -> str:
    """In how many of the ways to swap what is compared within seeds, or to turn the signs of differences, the rule holds.

    Empty where the values are not one a seed (five; three on SmolLM2), where they can't be swapped (they are no twins, or more than
    seven thousand ways), and where every way passes: a rule of closeness, which labels don't decide.
    """
    names, series = list(claim.values), list(claim.values.values())
    seeds = len(series[0])
    if seeds != (3 if claim.evidence == "smol" else 5) or {*map(len, series)} != {seeds}:
        return ""
    if len(series) == 1 and re.search(r"[<>]=? -?0(\.0\d*)?(?![\d.])", claim.predicate):
        series, what = [*series, [-value for value in series[0]]], "turn the differences' signs"
    elif any(sorted(said.split(", ")) == sorted(names) for said in ZIPPED.findall(claim.predicate)):
        what = "swap the labels within seeds"
    else:
        return ""
    ways = math.factorial(len(series)) ** seeds
    if len(series) == 1 or ways > MOST_WAYS:
        return ""
    orders = list(itertools.permutations(range(len(series))))
    passed = sum(
        evaluate(
            claim.predicate,
            {
                name: [series[order[row]][seed] for seed, order in enumerate(way)]
                for row, name in enumerate(names)
            },
        )
        for way in itertools.product(orders, repeat=seeds)
    )
    return f"holds in {passed:,} of {ways:,} ways to {what}" if passed < ways else ""


def values(named: dict[str, list]) -> str:
    return "<br>".join(
        f"{cell(name)}: {', '.join(number(value) for value in flat(series))}"
        for name, series in named.items()
    )


def flat(series: object) -> list:
    return (
        [leaf for item in series for leaf in flat(item)] if isinstance(series, list) else [series]
    )


def number(value: object) -> str:
    if not isinstance(value, float):
        return html.escape(str(value))
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"


def one_line(text: str) -> str:
    return " ".join(str(text).split())


def cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")
