"""English verbs and their past."""

from __future__ import annotations

import gzip
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from tools.tasks.families import shared_out


def inflections(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Lemma, word class and forms of each entry of the lexicon; a form is a list of its spellings."""
    with gzip.open(wheel.open("lemminflect/resources/infl_lu.csv.gz"), "rt") as lines:
        for line in lines:
            lemma, kind, *forms = line.rstrip("\n").split(",")
            yield lemma, kind, [form.split("/") if form else [] for form in forms]


def verbs(wheel: zipfile.ZipFile) -> list[dict[str, Any]]:
    """Verbs in lower-case letters with their past. Regular is what takes -ed (feed, fed does not)."""
    rows = []
    for lemma, kind, forms in inflections(wheel):
        past = [form for form in forms[0] if re.fullmatch("[a-z]+", form)] if forms else []
        if kind == "verb" and past and re.fullmatch("[a-z]{2,}", lemma):
            regular = any(form.endswith("ed") and len(form) > len(lemma) for form in past)
            rows.append(
                {"word": lemma, "past": past[0], "other_pasts": past[1:], "regular": regular}
            )
    return shared_out(rows, verb_roots(rows))


def verb_roots(rows: list[dict[str, Any]]) -> Callable[[dict], set[str]]:
    """A verb whose ending is a verb, and whose past ends in that verb's past, is of that verb's family (undergo: go);
    so are spellings in -ise and -ize, unless one ends in a verb (synthesize: size)."""
    pasts = {row["word"]: [row["past"], *row["other_pasts"]] for row in rows}

    def root(word: str) -> str:
        for i in range(len(word) - 2, 0, -1):
            ends = word[i:]
            if ends in pasts and any(a.endswith(b) for a in pasts[word] for b in pasts[ends]):
                return root(ends)
        return re.sub("ise$", "ize", word)

    return lambda row: {root(row["word"])}
