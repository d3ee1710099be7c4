"""A claim's verdict in words."""

import pytest

from lora_course.lab.claims import Claims
from lora_course.lab.verdicts import VERDICTS, anchor_of


@pytest.mark.parametrize(
    ("kind", "value", "verdict"),
    [("claim", 3, 0), ("claim", 1, 1), ("observation", 3, 2), ("observation", 1, 3), ("chosen", 3, 2)],
)  # fmt: skip
def test_only_a_full_claim_holds_or_fails_and_all_else_is_seen_or_not(kind, value, verdict) -> None:
    claims = Claims("0_0_test")
    claims.add("2.1-a", "s", "own", "e", {"x": [value]}, "mean(x) > 2", "why", kind=kind)
    assert claims["2.1-a"].verdict == VERDICTS[verdict]
    assert claims["2.1-a"].anchor == anchor_of("2.1-a") == "claim-2-1-a"
