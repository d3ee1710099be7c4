"""Tasks with right answers: what a row holds, what is graded, and that no family stands in two splits."""

import math
import re
from statistics import fmean

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F

from lora_course.injection import inject
from lora_course.lab import tasks
from lora_course.lab.models import load_base
from lora_course.lab.study import chosen_rate, fit, load_study
from lora_course.lab.tasks import (
    TASKS,
    bits_per_answer_token,
    edit_distance,
    grade,
    load_task,
    prompt_ids,
    task_rows,
    write_answers,
)

HELD_OUT = ("validation", "test")
CARD = tasks.DATA / "README.md"


@pytest.fixture(scope="module")
def nano():
    return load_base("nano")


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, list[dict]]]:
    """The rows of each table by split."""
    names = {"verbs": "past", "nouns": "plural", "pronunciation": "pronunciation"}
    return {
        table: {split: load_task(name, split).to_list() for split in ("train", *HELD_OUT)}
        for table, name in names.items()
    }


class Chat:
    """nano's tokenizer with a chat template, as the chat model's has one."""

    def __new__(cls, tokenizer):
        chat = load_base("nano")[1]
        chat.chat_template = (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        return chat


# Leaks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["verbs", "nouns", "pronunciation"])
def test_a_word_and_a_root_are_in_one_split_only(tables, table):
    where: dict[str, set[str]] = {}
    for split, rows in tables[table].items():
        for row in rows:
            for name in [f"word {row['word']}", *(f"root {r}" for r in row["family"].split("+"))]:
                where.setdefault(name, set()).add(split)
    assert not {name for name, splits in where.items() if len(splits) > 1}


def endings_removed(word: str) -> set[str]:
    """What a word may be an inflected form of, by the rules of English spelling."""
    found = set()
    for ending in ("s", "es", "ed", "d", "ing", "er", "ers", "est", "ly", "ness", "able", "ment"):
        if word.endswith(ending) and len(word) - len(ending) > 2:
            stem = word.removesuffix(ending)
            found |= {stem, stem + "e", re.sub("i$", "y", stem)}
            if len(stem) > 3 and stem[-1] == stem[-2]:
                found.add(stem[:-1])
    return found - {word}


def test_no_inflected_form_of_a_held_out_word_is_trained(tables):
    """Searched by rules of their own, not by the builder's: neither is a form of the other, nor both of one word."""
    rows = tables["pronunciation"]
    known = {row["word"] for split in rows.values() for row in split}
    train = {row["word"] for row in rows["train"]}
    forms = {word: {word, *(endings_removed(word) & known)} for word in known}
    trained_roots = set().union(*(forms[word] for word in train))
    leaks = [
        row["word"]
        for split in HELD_OUT
        for row in rows[split]
        if forms[row["word"]] & trained_roots
    ]
    assert not leaks


def test_no_homophone_of_a_held_out_word_is_trained(tables):
    rows = tables["pronunciation"]
    trained = {row["phonemes"] for row in rows["train"]}
    held_out = {row["phonemes"] for split in HELD_OUT for row in rows[split]}
    assert not trained & held_out


def test_no_compound_is_held_out_of_its_head(tables):
    """A held-out noun that ends as a trained one ends, with its gender and its plural, or the other way round."""
    rows = tables["nouns"]
    train = {
        (row["word"].lower(), row["gender"]): [row["plural"], *row["other_plurals"]]
        for row in rows["train"]
    }
    held_out = {
        (row["word"].lower(), row["gender"]): [row["plural"], *row["other_plurals"]]
        for split in HELD_OUT
        for row in rows[split]
    }

    def leaks(heads, compounds) -> list[str]:
        return [
            word
            for (word, gender), plurals in compounds.items()
            for i in range(1, len(word) - 2)
            for head in [heads.get((word[i:], gender), [])]
            if any(a.lower().endswith(b.lower()) for a in plurals for b in head)
        ]

    assert not leaks(train, held_out) and not leaks(held_out, train)
    women = {f"{word}in" for word, gender in train if gender == "m"}
    assert not [word for word, gender in held_out if gender == "f" and word in women]


@pytest.mark.parametrize(
    ("compound", "verb"), [("undergo", "go"), ("overcome", "come"), ("reset", "set")]
)
def test_a_prefixed_verb_is_where_its_verb_is(tables, compound, verb):
    where = {row["word"]: split for split, rows in tables["verbs"].items() for row in rows}
    splits = {where[word] for word in (compound, verb) if word in where}
    assert len(splits) == 1


def test_no_verb_is_held_out_of_a_trained_one_that_it_ends_in(tables):
    rows = tables["verbs"]
    train = {row["word"]: row["past"] for row in rows["train"]}
    held_out = {row["word"]: row["past"] for split in HELD_OUT for row in rows[split]}
    for short, long in ((train, held_out), (held_out, train)):
        assert not [
            (word, word[i:])
            for word, past in long.items()
            for i in range(1, len(word) - 1)
            if word[i:] in short and past.endswith(short[word[i:]])
        ]


ENDINGS = [
    "able", "ably", "ability", "ibility", "ible", "ibly", "al", "ally", "ance", "ances", "ancy", "ant", "ants", "antly",
    "ary", "ate", "ated", "ates", "ating", "ation", "ations", "ative", "ence", "ences", "ency", "ent", "ents", "ential",
    "ently", "ia", "ic", "ical", "ically", "ics", "ion", "ional", "ions", "ise", "ism", "ist", "istic", "ists", "ity",
    "ium", "ive", "ively", "ives", "ize", "ized", "izes", "izing", "ment", "ments", "or", "ors", "ory", "ous", "ously",
    "um", "ure", "us", "y",
]  # fmt: skip


def left_in(rows: list[dict]) -> dict[str, list[str]]:
    """For each test word the trained words that have its stem, of five letters or more, under another ending."""
    stems = {
        row["word"]: {
            row["word"].removesuffix(ending)
            for ending in ENDINGS
            if row["word"].endswith(ending) and len(row["word"]) - len(ending) >= 5
        }
        for split in ("train", "test")
        for row in rows[split]
    }
    trained: dict[str, list[str]] = {}
    for row in rows["train"]:
        for stem in stems[row["word"]]:
            trained.setdefault(stem, []).append(row["word"])
    found = {
        row["word"]: sorted({word for stem in stems[row["word"]] for word in trained.get(stem, ())})
        for row in rows["test"]
    }
    return {word: others for word, others in found.items() if others}


KNOWN_ROOTS = [
    "ancestry", "aviators", "beneficially", "comprehension", "conclusions", "contraception", "debilitate", "delinquent",
    "delinquents", "delirious", "dominance", "ebullience", "equivocate", "evocation", "exclusive", "exclusively",
    "felicity", "feminists", "hypnotists", "illusory", "inadvertence", "incapacity", "intelligent", "intelligently",
    "intolerable", "invasive", "irritated", "litigant", "locomotive", "negligence", "numismatic", "optimist",
    "reception", "resilient", "somnolence", "unemployable", "virulently",
]  # fmt: skip


def test_the_relatives_under_another_ending_that_are_left_in_are_those_that_the_card_counts(tables):
    found = left_in(tables["pronunciation"])
    assert sorted(found) == KNOWN_ROOTS
    assert found["intelligent"][0] == "intelligence" and "exclusion" in found["exclusive"]
    rows, card = tables["pronunciation"]["test"], " ".join(CARD.read_text().split())
    assert f"{len(found)} of {len(rows):,} test words" in card
    record = load_study("tasks_nano")
    rate = chosen_rate(record, "pronunciation")
    seeds = record["settings"]["seeds"]
    marks = [record["runs"][f"pronunciation/{rate:g}/{seed}/test"]["right"] for seed in seeds]
    table = record["runs"]["baselines/pronunciation"]["letters in context"]["right"]

    def right(wanted) -> list[str]:
        """LoRA's share of right answers (mean of the seeds) and the table's."""
        places = [i for i, row in enumerate(rows) if wanted(row["word"])]
        return [
            f"{fmean(int(mark[i]) for mark in marks for i in places):.1%}"
            for marks in (marks, [table])
        ]

    every, others = right(lambda word: True), right(lambda word: word not in found)
    assert (
        f"Without them nano's LoRA has {others[0]} right instead of {every[0]}, "
        f"and the table of letters in context {others[1]} instead of {every[1]}."
    ) in card


SPELLINGS = {
    "ise$": "ize", "iss$": "ize", "our": "or", "tre$": "ter", "ogue$": "og", "efy$": "ify", "^hear(?=k)": "har",
    "oo(?=ve$|$)": "o", "rr$": "r", "(?<=[aeiou])ll(?=[aeiou])": "l", "([aeiou][a-z]*[^aeiou][aeiou])ll$": r"\1l",
}  # fmt: skip


def one_spelling(word: str) -> str:
    for other, usual in SPELLINGS.items():
        word = re.sub(other, usual, word)
    return word


KNOWN_SPELLINGS = {
    "appall": "appal", "behove": "behoove", "calliper": "caliper", "catalogue": "catalog", "centre": "center",
    "clamour": "clamor", "collectivize": "collectivise", "enroll": "enrol", "hearken": "harken", "lasso": "lassoo",
    "premise": "premiss", "putrefy": "putrify", "synthesize": "synthesise", "whir": "whirr",
}  # fmt: skip


def test_the_other_spellings_of_trained_verbs_that_are_left_in_are_those_that_the_card_counts(
    tables,
):
    trained = {one_spelling(row["word"]): row["word"] for row in tables["verbs"]["train"]}
    words = [row["word"] for row in tables["verbs"]["test"]]
    found = {word: trained[one_spelling(word)] for word in words if one_spelling(word) in trained}
    assert found == KNOWN_SPELLINGS
    card = " ".join(CARD.read_text().split())
    assert f"{len(found)} of {len(words)} test verbs" in card


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_split_has_questions_with_answers_that_are_accepted(name):
    for split, least in (("train", 5_000), ("validation", 500), ("test", 500)):
        examples = load_task(name, split)
        assert len(examples) >= least
        for example in examples.select(range(200)):
            assert example["answer"] in example["accepted"] and example["question"].strip()


def test_unknown_tasks_and_splits_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match="plurals.*past, plural"):
        load_task("plurals", "test")
    with pytest.raises(ValueError, match="dev.*train, validation, test"):
        load_task("past", "dev")


@pytest.mark.parametrize("chat", [False, True])
def test_the_loss_is_that_of_answer_and_end_alone(nano, chat):
    tokenizer = Chat(nano[1]) if chat else nano[1]
    examples = load_task("plural", "validation").select(range(5))
    rows = task_rows(tokenizer, "plural", examples)
    for row, example in zip(rows, examples):
        scored = row["labels"] != -100
        written = row["input_ids"][scored].tolist()
        assert written[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(written[:-1]).strip() == example["answer"]
        prompt = row["input_ids"][: int(scored.int().argmax())].tolist()
        assert [prompt] == prompt_ids(tokenizer, "plural", [example["question"]])
        assert example["question"] in tokenizer.decode(prompt)
        used = int(row["attention_mask"].sum())
        assert scored[used - 1] and not scored[used:].any() and len(prompt) + len(written) == used


def test_letters_are_set_apart_where_a_task_goes_by_them_and_the_tokens_are_a_small_models(nano):
    tokenizer = nano[1]
    (prompt,) = prompt_ids(tokenizer, "pronunciation", ["were"])
    assert [tokenizer.decode(i) for i in prompt[-6:]] == [":", " w", " e", " r", " e", " ->"]
    (chat,) = prompt_ids(Chat(tokenizer), "pronunciation", ["were"])
    assert "were" in tokenizer.decode(chat)


def test_a_length_leaves_out_the_longer_rows_and_is_refused_below_all(nano):
    examples = load_task("past", "train").select(range(50))
    every = task_rows(nano[1], "past", examples)
    sizes = every["attention_mask"][:].sum(1).tolist()
    assert min(sizes) < max(sizes)
    short = task_rows(nano[1], "past", examples, length=max(sizes) - 1)
    assert len(short) == sum(size < max(sizes) for size in sizes)
    assert short["input_ids"][:].shape[1] == max(sizes) - 1
    assert task_rows(nano[1], "past", examples, length=64)["input_ids"][:].shape == (50, 64)
    with pytest.raises(ValueError, match="length=3.*the shortest has"):
        task_rows(nano[1], "past", examples, length=3)


# Answers and scores ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(nano):
    """nano after 60 short steps on verbs, so that its answers are words."""
    model, tokenizer = load_base("nano")
    torch.manual_seed(0)
    inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    rows = task_rows(tokenizer, "past", load_task("past", "train").select(range(960)))
    fit(model, rows, 5e-3, 0, 60, 16, disable_tqdm=True, bf16=False)
    return model


def test_answers_in_batches_are_those_of_one_question_alone(taught, nano):
    questions = load_task("past", "test")["question"][:12]
    assert len(set(map(len, prompt_ids(nano[1], "past", questions)))) > 1
    together = write_answers(taught, nano[1], "past", questions, batch=12)
    alone = [write_answers(taught, nano[1], "past", [q])[0] for q in questions]
    assert together == alone
    assert sum(answer.endswith("ed") for answer in together) >= 6  # they are words, not silence


def test_bits_an_answer_token_are_those_of_one_row_at_a_time(taught, nano):
    rows = task_rows(nano[1], "past", load_task("past", "test").select(range(9)))
    bits = tokens = 0.0
    for row in rows:
        ids, labels = row["input_ids"][None], row["labels"]
        with torch.no_grad():
            logits = taught(input_ids=ids).logits[0]
        for i in range(1, len(labels)):
            if labels[i] != -100:
                bits -= F.log_softmax(logits[i - 1], -1)[labels[i]].item() / math.log(2)
                tokens += 1
    assert bits_per_answer_token(taught, nano[1], rows, batch=4) == pytest.approx(
        bits / tokens, rel=1e-4
    )


def test_training_on_rows_teaches_the_task(taught, nano):
    test = load_task("past", "test").select(range(40))
    base = write_answers(load_base("nano")[0], nano[1], "past", test["question"])
    answers = write_answers(taught, nano[1], "past", test["question"])
    assert grade("past", base, test)["exact"] == 0
    assert grade("past", answers, test)["exact"] > 0.4


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("same", "same", 0),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance_by_hand(a, b, distance):
    assert edit_distance(a, b) == distance


def test_grades_by_hand():
    examples = Dataset.from_list(
        [
            {"accepted": ["dreamed", "dreamt"]},
            {"accepted": ["went"]},
            {"accepted": ["sang"]},
        ]
    )
    found = grade("past", ["dreamt", "goed", "sung"], examples)
    assert found["right"] == "100" and found["exact"] == pytest.approx(1 / 3)
    # dreamt 0 of 6; goed → went: 3 replaced… of 4; sung → sang: 1 of 4
    assert found["error_rate"] == pytest.approx((0 + edit_distance("goed", "went") + 1) / 14)
    spoken = Dataset.from_list([{"accepted": ["K AE T"]}])
    assert grade("pronunciation", ["K AH T S"], spoken)["error_rate"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="2 answers for 1 example"):
        grade("past", ["a", "b"], spoken)


def test_every_task_says_what_a_score_means():
    for task in TASKS.values():
        assert task.meaning.endswith(".") and len(task.meaning.split()) > 10
    assert {task.table for task in TASKS.values()} == {p.stem for p in tasks.DATA.glob("*.parquet")}
