"""`lora_course.lab.chat_words`: who is lower by how much, and how nano stands."""

import pytest

from lora_course.lab.chat_model import QUESTIONS
from lora_course.lab.chat_words import BOTH, compared, held_against


@pytest.mark.parametrize(
    ("apart", "said"),
    [
        ([-0.2, 0.1], "No difference shown: a 0.050 bits an answer token lower (2 seeds: -0.200 to +0.100; training gained 3.0)."),
        ([-0.2, -0.1], "Lower with all 2 seeds: a, by 0.150 bits an answer token (0.100 to 0.200; training gained 3.0)."),
        ([0.2, 0.1], "Lower with all 2 seeds: b, by 0.150 bits an answer token (0.100 to 0.200; training gained 3.0)."),
    ],
)  # fmt: skip
def test_the_lower_one_is_named_if_each_seed_agrees(apart: list[float], said: str) -> None:
    assert compared(["a", "b"], apart, 3.0) == said


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("0.1-s", ["the claim fails on nano too", "on nano the claim fails", "<b>unlike nano</b>: the claim holds on nano"]),
        ("3.1-s", ["grown ranks: not ahead on nano either", "on nano not with every seed", "<b>unlike nano</b>: grown ranks ahead on nano"]),
    ],
)  # fmt: skip
def test_a_margin_and_an_order_are_held_against_nano_in_their_own_words(
    id: str, said: list[str]
) -> None:
    for (here, nano), words in zip(
        ((False, False), (True, False), (False, True)), said, strict=True
    ):
        assert held_against(QUESTIONS[id].first, QUESTIONS[id].rule, here, nano) == words
    assert held_against("", QUESTIONS[id].rule, True, True) == BOTH
