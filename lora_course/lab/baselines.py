"""What a task's score is to be held against: rules and majorities, learnt on the training words and scored on the test words."""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets

from lora_course.lab.tasks import grade, load_task, task

Answer = Callable[[Mapping[str, Any]], str]


def rule_of_three(example: Mapping[str, Any]) -> str:
    """The past of an English verb by the rule of three lines: -e takes d, consonant and y become -ied, a short syllable
    doubles its consonant; all others take -ed."""
    word = example["word"]
    if word.endswith("e"):
        return word + "d"
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ied"
    return word + (word[-1] if re.fullmatch("[^aeiou]*[aeiou][^aeiouwxy]", word) else "") + "ed"


def change(word: str, form: str) -> tuple[int, str]:
    """How a form is made of a word: how many letters are cut from its end, and what is put there."""
    same = 0
    while same < min(len(word), len(form)) and word[same] == form[same]:
        same += 1
    return len(word) - same, form[same:]


def applied(made: tuple[int, str], word: str) -> str:
    cut, ending = made
    return word[: len(word) - cut] + ending


# Forms of a word: what changes at its end ------------------------------------------------------------------------------


def suffix_table(name: str, train: datasets.Dataset, longest: int = 6) -> Answer:
    """The commonest change among the training words that share the longest ending with the word, of `longest` letters at
    most, and the gender where the question tells it."""
    counts: dict[Any, Counter] = defaultdict(Counter)
    for example in train:
        for length in range(min(longest, len(example["word"])) + 1):
            counts[_place(name, example, length)][_change(name, example)] += 1

    def answer(example: Mapping[str, Any]) -> str:
        lengths = range(min(longest, len(example["word"])), -1, -1)
        found = next(c for n in lengths if (c := counts.get(_place(name, example, n))))
        return _applied(name, found.most_common(1)[0][0], example["word"])

    return answer


def majority(name: str, train: datasets.Dataset) -> Answer:
    """The commonest change of all training words, of the same gender where the question tells it."""
    return suffix_table(name, train, longest=0)


def _place(name: str, example: Mapping[str, Any], length: int) -> tuple[str, str]:
    """What a suffix table looks at: the gender where it is told, and the last letters."""
    word = example["word"]
    gender = example["gender"] if "gender" in task(name).question else ""
    return gender, word[len(word) - length :].lower()


def _change(name: str, example: Mapping[str, Any]) -> tuple[int, str]:
    """How many letters are cut from the word's end, and what is put there; of a gender, the gender itself."""
    word, form = example["word"], example["answer"]
    if name == "gender":
        return len(word), form
    same = len(os.path.commonprefix([word, form]))
    return len(word) - same, form[same:]


def _applied(name: str, made: tuple[int, str], word: str) -> str:
    cut, ending = made
    return ending if name == "gender" else word[: max(0, len(word) - cut)] + ending


# Sounds and letters: what stands for what ------------------------------------------------------------------------------


def letter_table(name: str, train: datasets.Dataset, reach: int = 3) -> Answer:
    """What the training words most often have for a letter (or a phoneme) between its `reach` neighbours on each side, of
    fewer neighbours where that context was never seen. Letters and phonemes are aligned first (`align`)."""
    read, join = (list, " ") if name == "pronunciation" else (str.split, "")
    write = str.split if name == "pronunciation" else list
    pairs = [(read(example["question"]), write(example["answer"])) for example in train]
    counts: dict[Any, Counter] = defaultdict(Counter)
    for (source, _), pieces in zip(pairs, align(pairs)):
        for place, piece in enumerate(pieces):
            for near in range(reach + 1):
                counts[_context(source, place, near)][piece] += 1
    best = {context: found.most_common(1)[0][0] for context, found in counts.items()}

    def answer(example: Mapping[str, Any]) -> str:
        source = read(example["question"])
        units: list[str] = []
        for place in range(len(source)):
            contexts = (_context(source, place, near) for near in range(reach, -1, -1))
            units += next((best[context] for context in contexts if context in best), ())
        return join.join(units)

    return answer


PRIOR = (
    0.1,
    1.0,
    0.1,
    0.01,
)  # of pieces of no, one, two and three units, before anything is counted
UNSEEN = 1e-4  # a piece that a unit never had


def align(
    pairs: Sequence[tuple[Sequence[str], Sequence[str]]], rounds: int = 4
) -> list[list[tuple[str, ...]]]:
    """For each pair the piece of the answer, of up to three units, that belongs to each unit of the source, in order.

    Hard EM: the pieces with the largest Π p(piece | unit) are found by dynamic programming, and p is counted from these
    pieces, in turn. At first p depends on the size of a piece only. An answer that is more than three times as long as
    its source has no such pieces: it gets none.
    """
    chance: Callable[[str, tuple[str, ...]], float] = lambda _, piece: PRIOR[len(piece)]  # noqa: E731
    for _ in range(rounds):
        found = [_best_pieces(source, target, chance) for source, target in pairs]
        both: Counter = Counter()
        for (source, _), pieces in zip(pairs, found):
            both.update(zip(source, pieces))
        units: Counter = Counter()
        for (unit, _), count in both.items():
            units[unit] += count
        chance = lambda unit, piece: both[unit, piece] / units[unit] or UNSEEN  # noqa: E731
    return found


def _best_pieces(
    source: Sequence[str],
    target: Sequence[str],
    chance: Callable[[str, tuple[str, ...]], float],
) -> list[tuple[str, ...]]:
    ways: dict[int, tuple[float, tuple]] = {0: (0.0, ())}  # units used → best log p, its pieces
    for unit in source:
        after: dict[int, tuple[float, tuple]] = {}
        for used, (score, pieces) in ways.items():
            for size in range(min(len(PRIOR), len(target) - used + 1)):
                piece = tuple(target[used : used + size])
                new = score + math.log(chance(unit, piece))
                if used + size not in after or new > after[used + size][0]:
                    after[used + size] = (new, (*pieces, piece))
        ways = after
    return list(ways[len(target)][1]) if len(target) in ways else []


def _context(source: Sequence[str], place: int, reach: int) -> tuple[str, ...]:
    """A unit with `reach` neighbours on each side; "" stands beyond the ends."""
    padded = [*[""] * reach, *source, *[""] * reach]
    return tuple(padded[place : place + 2 * reach + 1])


# What a task is held against ------------------------------------------------------------------------------------------

BASELINES: dict[str, dict[str, Callable[[str, datasets.Dataset], Answer]]] = {
    "past": {"three-line rule": lambda *_: rule_of_three, "suffix table": suffix_table},
    "plural": {"majority by gender": majority, "suffix table": suffix_table},
    "genitive": {"majority by gender": majority, "suffix table": suffix_table},
    "gender": {"majority": majority, "suffix table": suffix_table},
    "pronunciation": {
        "letter by letter": lambda name, train: letter_table(name, train, reach=0),
        "letters in context": letter_table,
    },
    "spelling": {
        "phoneme by phoneme": lambda name, train: letter_table(name, train, reach=0),
        "phonemes in context": letter_table,
    },
}


def score_baselines(name: str) -> dict[str, dict[str, Any]]:
    """`grade` of each baseline of a task on all test words, learnt on all training words: {baseline: scores}."""
    train, test = load_task(name, "train"), load_task(name, "test")
    answers = {title: learn(name, train) for title, learn in BASELINES[name].items()}
    return {
        title: grade(name, [answer(example) for example in test], test)
        for title, answer in answers.items()
    }
