"""Baselines of the tasks: by hand on a few words, and that they score what the book prints."""

import pytest
from datasets import Dataset

from lora_course.lab.baselines import (
    BASELINES,
    align,
    letter_table,
    majority,
    rule_of_three,
    score_baselines,
    suffix_table,
)
from lora_course.lab.study import load_study
from lora_course.lab.tasks import TASKS


def nouns(*rows: tuple[str, str, str]) -> Dataset:
    return Dataset.from_list(
        [
            {"word": word, "gender": gender, "question": f"{word} ({gender})", "answer": plural}
            for word, gender, plural in rows
        ]
    )


TRAIN = nouns(
    ("Tisch", "m", "Tische"),
    ("Hund", "m", "Hunde"),
    ("Lehrer", "m", "Lehrer"),
    ("Bäcker", "m", "Bäcker"),
    ("Stein", "m", "Steine"),
    ("Blume", "f", "Blumen"),
    ("Lehrerin", "f", "Lehrerinnen"),
    ("Zeitung", "f", "Zeitungen"),
    ("Hoffnung", "f", "Hoffnungen"),
    ("Museum", "n", "Museen"),
)


@pytest.mark.parametrize(
    ("word", "past"),
    [("walk", "walked"), ("bake", "baked"), ("carry", "carried"), ("play", "played"),
     ("stop", "stopped"), ("fix", "fixed"), ("go", "goed"), ("visit", "visited")],
)  # fmt: skip
def test_the_rule_of_three_lines(word, past):
    assert rule_of_three({"word": word}) == past


@pytest.mark.parametrize(
    ("word", "gender", "plural"),
    [
        ("Maler", "m", "Maler"),  # as Lehrer, though most masculines take -e
        ("Freund", "m", "Freunde"),  # -und as Hund
        ("Freundin", "f", "Freundinnen"),
        ("Wohnung", "f", "Wohnungen"),
        ("Forum", "n", "Foren"),  # -um is cut
        ("Sprung", "m", "Sprunge"),  # -ung is feminine only, so the masculine -e is left
    ],
)
def test_a_suffix_table_answers_as_the_longest_known_ending(word, gender, plural):
    assert suffix_table("plural", TRAIN)({"word": word, "gender": gender}) == plural


def test_a_majority_is_that_of_the_gender():
    answer = majority("plural", TRAIN)
    assert answer({"word": "Maler", "gender": "m"}) == "Malere"
    assert answer({"word": "Wand", "gender": "f"}) == "Wanden"


def test_a_gender_is_told_by_the_ending_alone():
    rows = TRAIN.map(lambda row: {"answer": row["gender"]})
    assert suffix_table("gender", rows)({"word": "Wohnung"}) == "f"
    assert majority("gender", rows)({"word": "Wohnung"}) == "m"


SPOKEN = [
    ("cat", "K AE T"), ("cap", "K AE P"), ("tap", "T AE P"), ("chat", "CH AE T"), ("chap", "CH AE P"),
    ("pat", "P AE T"), ("tax", "T AE K S"), ("act", "AE K T"), ("apt", "AE P T"), ("hat", "HH AE T"),
]  # fmt: skip


def test_letters_are_aligned_with_what_they_stand_for():
    pairs = [(list(word), sounds.split()) for word, sounds in SPOKEN]
    found = {word: pieces for (word, _), pieces in zip(SPOKEN, align(pairs))}
    assert found["cat"] == [("K",), ("AE",), ("T",)]
    assert found["tax"] == [("T",), ("AE",), ("K", "S")]
    assert sorted(map(len, found["chat"][:2])) == [0, 1]
    for (_, target), pieces in zip(pairs, found.values()):
        assert [unit for piece in pieces for unit in piece] == target


def test_letters_in_context_say_more_than_letters_alone():
    train = Dataset.from_list([{"question": word, "answer": sounds} for word, sounds in SPOKEN])
    wide, alone = (
        letter_table("pronunciation", train),
        letter_table("pronunciation", train, reach=0),
    )
    assert wide({"question": "chat"}) == "CH AE T"
    assert alone({"question": "pact"}) == "P AE K T"
    assert alone({"question": "chat"}) != "CH AE T"  # c and h apart don't say CH


def test_every_task_has_a_baseline():
    assert set(BASELINES) == set(TASKS)


def test_a_table_of_endings_knows_most_plurals_of_the_test_words():
    found = score_baselines("plural")
    assert found["suffix table"]["exact"] > 0.8 > 0.5 > found["majority by gender"]["exact"]
    assert len(found["suffix table"]["right"]) == 1000
    assert found == load_study("tasks_nano")["runs"]["baselines/plural"]


def test_the_record_has_what_rules_for_pasts_score_now():
    assert score_baselines("past") == load_study("tasks_nano")["runs"]["baselines/past"]
