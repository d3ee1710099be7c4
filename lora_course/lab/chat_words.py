"""The words of the rows in which chapters say what came out on the chat model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

BOTH = "as on nano"


def compared(names: Sequence[str], apart: Sequence[float], gained: float) -> str:
    """Which of two is lower and by how much, from their differences (first minus second) seed by seed.

    gained: what training won in the same bits, to hold the differences against.
    """
    mean, low, high = statistics.fmean(apart), min(apart), max(apart)
    if low <= 0 <= high:
        side = "lower" if mean < 0 else "higher"
        return (
            f"No difference shown: {names[0]} {abs(mean):.3f} bits an answer token {side} "
            f"({len(apart)} seeds: {low:+.3f} to {high:+.3f}; training gained {gained:.1f})."
        )
    lower, least, most = (names[0], -high, -low) if high < 0 else (names[1], low, high)
    return (
        f"Lower with all {len(apart)} seeds: {lower}, by {abs(mean):.3f} bits an answer token ({least:.3f} to {most:.3f}; "
        f"training gained {gained:.1f})."
    )


def held_against(first: str, rule: str, here: bool, nano: bool) -> str:
    """How a claim's verdict on the chat model stands beside nano's.

    first: the one that the claim puts ahead.    rule: the claim's, which is a margin or an order.
    """
    if "abs(" in rule or " - " in rule:  # a margin
        neither, one, other = "the claim fails on nano too", "the claim fails", "the claim holds"
    else:
        neither, one, other = (
            f"{first}: not ahead on nano either",
            "not with every seed",
            f"{first} ahead",
        )
    if here == nano:
        return BOTH if here else neither
    return f"on nano {one}" if here else f"<b>unlike nano</b>: {other} on nano"
