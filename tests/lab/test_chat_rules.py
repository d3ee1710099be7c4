"""`lab.chat_rules`: a rule's share, the words that a share rests on, the end of a grid. Rows: test_chat_model."""

import pytest

from lora_course.lab import chat_rules
from lora_course.lab.study import load_study
from lora_course.lab.tasks import load_task


def test_irregular_verbs_are_those_of_the_records_test_words() -> None:
    record = load_study("smol_past")
    count = chat_rules.irregular_verbs(record)
    for key, found in record["runs"].items():
        if key.endswith("/test"):
            rare = found["irregular"] * count
            assert rare == pytest.approx(round(rare)), key
    words = load_task("past", "test").to_list()[: record["settings"]["words"]["test"]]
    assert count == sum(not word["regular"] for word in words)


def test_the_highest_value_of_a_grid_is_said() -> None:
    keys = (f"x/{rate}/0/validation" for rate in (1, 2, 4))
    runs = dict.fromkeys([*keys, "x/4/0/test"], {})
    assert chat_rules.at_the_edge({"runs": runs}, "x").endswith("highest value tried; a higher one may be better.")  # fmt: skip


def test_a_rules_share_is_that_of_the_first_test_words() -> None:
    record = load_study("smol_past")
    marks = load_study("tasks_nano")["runs"]["baselines/past"]["three-line rule"]["right"]
    count = record["settings"]["words"]["test"]
    assert len(marks) > count
    assert chat_rules.rule_right(record) == pytest.approx(marks[:count].count("1") / count)
    assert (
        chat_rules.right(record, "lora").endswith("%")
        and chat_rules.right(record, "lora/cut/1") == ""
    )
