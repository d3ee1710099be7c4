"""Claims of a chapter: what a paper or the text says, the numbers that came out, and a check that could have failed."""

import html
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_course.files import replace_file
from lora_course.lab.plots import stylesheet
from lora_course.lab.predicates import FUNCTIONS, Values, evaluate, flips
from lora_course.lab.verdicts import EVIDENCE, KINDS, VERDICTS, Claim, anchor_of

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets")
BOOK = "https://lora-course.github.io/lora-course"


class Claims:
    """The claims of one chapter, in the order of their ids.

    chapter: the chapter's file name without ending, such as "1_1_qlora". profile: name of the profile they were measured on.
    """

    def __init__(self, chapter: str, profile: str | None = None) -> None:
        self.chapter = chapter
        self.profile = profile or os.environ.get("LORA_COURSE_PROFILE") or "tiny"
        self.claims: list[Claim] = []

    def add(
        self,
        id: str,
        statement: str,
        source: str,
        expected: str,
        values: dict[str, list[float]],
        predicate: str,
        explanation: str = "",
        *,
        kind: str = "claim",
        evidence: str = "",
        effect: str = "",
    ) -> None:
        """Checks a claim and keeps it for `table`; shows nothing. Adding an id again (a cell run twice) replaces it.

        values: the raw numbers of each quantity, one a seed (a single number counts as one). predicate: see `evaluate`.
        explanation: needed where the claim doesn't hold, to say why; may be added once that is seen.
        kind: "claim", "observation" (too few seeds for a verdict) or "chosen" (after seeing the numbers, or the best of many).
        evidence: the model it rests on, "tiny", "smol" or "gpu"; by default what the profile runs.
        effect: how much, with its unit, for the table; by default the values' means and ranges.
        Raises ValueError for empty or non-finite values, for a predicate whose verdict no change of them turns, and for
        another kind or evidence.
        """
        evidence = evidence or {"tiny": "tiny", "smol": "smol"}.get(self.profile, "gpu")
        for name, value, known in (("kind", kind, KINDS), ("evidence", evidence, EVIDENCE)):
            if value not in known:
                raise ValueError(f"claim {id}: {name}={value!r}; choose one of {', '.join(known)}")
        raw: Values = {}
        for name, series in values.items():
            if not name.isidentifier() or name in FUNCTIONS:
                raise ValueError(
                    f"claim {id}: {name!r} can't name a value; use a plain name other than {', '.join(FUNCTIONS)}"
                )
            raw[name] = [
                float(value) for value in (series if isinstance(series, Iterable) else [series])
            ]
            if not raw[name] or not all(math.isfinite(value) for value in raw[name]):
                raise ValueError(
                    f"claim {id}: {name}={raw[name]}; expected at least one number and all of them finite"
                )
        outcome = "; ".join(_summary(name, series) for name, series in raw.items())
        holds = evaluate(predicate, raw)
        claim = Claim(
            id, statement, source, expected, predicate, raw, outcome, holds, explanation, kind, evidence, effect
        )  # fmt: skip
        if not flips(predicate, raw):
            raise ValueError(
                f"claim {id}: no change of the values turns the verdict of {predicate!r}, so it checks nothing; "
                "compare the values with each other or with a bound"
            )
        ids = [kept.id for kept in self.claims]
        if id in ids:
            self.claims[ids.index(id)] = claim
        else:
            self.claims = sorted([*self.claims, claim], key=lambda kept: (len(kept.id), kept.id))

    def __getitem__(self, id: str) -> Claim:
        """A claim that was added. Raises KeyError for another id."""
        return {claim.id: claim for claim in self.claims}[id]

    def save(self) -> Path:
        """Writes `<chapter>.json` into the folder LORA_COURSE_CLAIMS, ./claims by default; whole or not at all."""
        folder = Path(os.environ.get("LORA_COURSE_CLAIMS", "claims"))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.chapter}.json"
        record = {
            "chapter": self.chapter,
            "profile": self.profile,
            "versions": {
                "python": platform.python_version(),
                **{p: importlib.metadata.version(p) for p in PACKAGES},
            },
            "claims": [asdict(claim) for claim in self.claims],
        }
        replace_file(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
        return path

    def table(self) -> "ClaimTable":
        """All claims as one compact table: HTML in a notebook, text elsewhere."""
        return ClaimTable(self.claims)

    def verdicts(self) -> dict[str, str]:
        """Each claim's id → "yes" or, in bold, "no": for the table at a chapter's head."""
        return {claim.id: "yes" if claim.holds else "<b>no</b>" for claim in self.claims}

    @staticmethod
    def link(id: str) -> str:
        """HTML that leads to a claim in the chapter's own table."""
        return f'<a href="#{anchor_of(id)}">{id}</a>'

    def answers(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> "AnswerTable":
        """What a chapter found, a question a row, as HTML. Raises ValueError for a row of another length than `head`."""
        for row in rows:
            if len(row) != len(head):
                raise ValueError(
                    f"the row {row[0]!r} has {len(row)} cells; expected {len(head)}: {', '.join(head)}"
                )
        return AnswerTable(tuple(head), [tuple(row) for row in rows])


@dataclass(frozen=True, repr=False)
class AnswerTable:
    """Questions and what came out, at the head of a chapter; cells are HTML.

    named: the first column whose cells say what they are where a table has no head, on a phone, if it has four columns or more.
    """

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    named: int = 2

    def _repr_html_(self) -> str:
        return _html(
            self.head,
            [
                "<tr>" + "".join(map(self._cell, range(len(row)), row)) + "</tr>"
                for row in self.rows
            ],
            "claims answers",
        )

    def _cell(self, column: int, cell: str) -> str:
        named = len(self.head) > 3 and column >= self.named
        head = html.escape(re.sub(r"<[^>]+>", "", self.head[column]), quote=True)
        return f'<td data-head="{head}">{cell}</td>' if named else f"<td>{cell}</td>"

    def __repr__(self) -> str:
        plain = (html.unescape(re.sub(r"<[^>]+>", "", " | ".join(row))) for row in self.rows)
        return "\n".join([" | ".join(self.head), *plain])


@dataclass(frozen=True, repr=False)
class ClaimTable:
    """Claims, a row each: id, sentence, verdict, effect; the id leads to the ledger, where the raw values are.

    In HTML a line counts the verdicts, and the rows are folded under it: a link to one of them unfolds them.
    """

    claims: list[Claim]

    def _repr_html_(self) -> str:
        rows = _html(COLUMNS, [self._row(claim) for claim in self.claims], "claims")
        return f'<details class="claims"><summary>{self.counted()}</summary>{rows}</details>'

    def counted(self) -> str:
        """`7 claims: 4 ✓ holds · 2 ✓ seen · 1 ✗ not seen (2.1-c)`; what fails is named."""
        parts = []
        for verdict in VERDICTS:
            ids = [claim.id for claim in self.claims if claim.verdict == verdict]
            if ids:
                named = f" ({', '.join(ids)})" if verdict.startswith("✗") else ""
                parts.append(f"{len(ids)} {verdict}{named}")
        noun = "claim" if len(self.claims) == 1 else "claims"
        return f"{len(self.claims)} {noun}: {' · '.join(parts)}"

    def __repr__(self) -> str:
        return "\n".join(" | ".join(row) for row in [COLUMNS, *map(_cells, self.claims)])

    @staticmethod
    def _row(claim: Claim) -> str:
        id, verdict, statement, effect = (html.escape(cell) for cell in _cells(claim))
        link = f'<a href="{BOOK}/book/ledger.html#{claim.anchor}">{id}</a>'
        return (
            f'<tr id="{claim.anchor}"><td>{link}</td><td class="verdict">{verdict}</td>'
            f"<td>{statement}</td><td>{effect}</td></tr>"
        )


def _html(head: Sequence[str], rows: Sequence[str], kind: str) -> str:
    named = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'{stylesheet()}<table class="{kind}"><thead><tr>{named}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


COLUMNS = ("claim", "verdict", "what was claimed", "what came out")


def _cells(claim: Claim) -> tuple[str, ...]:
    """One row in words. What is no full claim says so; what rests on another model than nano says on which."""
    marks = [KINDS[claim.kind], f"on {EVIDENCE[claim.evidence]}" if claim.evidence != "tiny" else ""]  # fmt: skip
    said = ", ".join(filter(None, marks))
    statement = f"{claim.statement} ({said})" if said else claim.statement
    return claim.id, claim.verdict, statement, claim.effect or claim.outcome


def load_claims(folder: str | Path) -> list[dict[str, Any]]:
    """The saved chapters of a folder, sorted by chapter, as `Claims.save` wrote them, with `Claim` objects under "claims"."""
    chapters = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))
    ]
    for chapter in chapters:
        chapter["claims"] = [Claim(**claim) for claim in chapter["claims"]]
    return chapters


def _summary(name: str, series: list[float]) -> str:
    """`name 1.234 (1.221 to 1.246, n = 3)`: with few values their range says more than a deviation."""
    if len(series) == 1:
        return f"{name} {number(series[0])}"
    low, high = number(min(series)), number(max(series))
    return f"{name} {number(statistics.fmean(series))} ({low} to {high}, n = {len(series)})"


def number(value: float, digits: int = 4) -> str:
    """`value` with so many significant digits; from 10,000 on as a whole number, never in powers of ten."""
    return (
        f"{value:,.0f}"
        if 1e4 <= abs(value) < 1e15
        else f"{value:.{digits}g}"
        if abs(value) < 10**digits
        else f"{value:.0f}"
    )
