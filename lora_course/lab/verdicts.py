"""One claim of a chapter, its verdict in words, and where it stands on a page."""

from dataclasses import dataclass

from lora_course.lab.predicates import Values

KINDS = {
    "claim": "",
    "observation": "observed: few seeds, one machine, no interval, or not with other seeds",
    "chosen": "chosen after seeing the numbers",
}
VERDICTS = ("✓ holds", "✗ does not hold here", "✓ seen", "✗ not seen")
EVIDENCE = {"tiny": "nano", "smol": "SmolLM2-135M", "gpu": "a GPU"}


@dataclass(frozen=True)
class Claim:
    """One measured statement. `values` are the raw numbers, one a seed; `predicate` a Python expression over their names.

    kind, evidence and effect: see `Claims.add`. A record from before they were kept reads as a claim on nano.
    """

    id: str
    statement: str
    source: str
    expected: str
    predicate: str
    values: Values
    outcome: str
    holds: bool
    explanation: str = ""
    kind: str = "claim"
    evidence: str = "tiny"
    effect: str = ""

    @property
    def verdict(self) -> str:
        """In words beside the sign, with what kind of statement it is."""
        holds, fails, seen, unseen = VERDICTS
        if self.kind != "claim":
            return seen if self.holds else unseen
        return holds if self.holds else fails

    @property
    def anchor(self) -> str:
        """`claim-2-1-b` for the claim 2.1-b, in its chapter's table and in the ledger."""
        return anchor_of(self.id)


def anchor_of(id: str) -> str:
    return f"claim-{id.replace('.', '-')}"
