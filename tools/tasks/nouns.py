"""German nouns with gender, plural and genitive."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from tools.tasks.families import TRAIN, shared_out

SHORT_HEADS = {"ei", "öl"}  # German nouns of two letters that end compounds


def nouns(wheel: zipfile.ZipFile) -> list[dict[str, Any]]:
    """Common nouns of one gender with plural and genitive, one word each; heads of compounds may have several genders."""
    rows, heads = [], defaultdict(list)
    table = io.TextIOWrapper(wheel.open("german_nouns/nouns.csv"), encoding="utf-8")
    for entry in csv.DictReader(table):
        word = entry["lemma"]
        genders = values(entry, "genus")
        plurals, genitives = values(entry, "nominativ plural"), values(entry, "genitiv singular")
        if plurals:
            heads[word.lower()] += [(gender, plurals) for gender in genders]
        common = entry["pos"] == "Substantiv" and len(genders) == 1 and plurals and genitives
        if common and all(
            re.fullmatch("[A-ZÄÖÜ][a-zäöüß]+", w) for w in [word, *plurals, *genitives]
        ):
            rows.append(
                {"word": word, "gender": genders[0], "plural": plurals[0], "other_plurals": plurals[1:],
                 "genitive": genitives[0], "other_genitives": genitives[1:]}
            )  # fmt: skip
    twice = Counter(row["word"] for row in rows)
    once = [row for row in rows if twice[row["word"]] == 1]
    return shared_out(once, noun_roots(heads), train=TRAIN // 2)


def values(entry: dict[str, str], column: str) -> list[str]:
    """What stands in the columns whose names begin so, each once."""
    return list(dict.fromkeys(entry[key] for key in entry if key.startswith(column) and entry[key]))


def noun_roots(heads: dict[str, list[tuple[str, list[str]]]]) -> Callable[[dict], set[str]]:
    """A compound has the gender and the plural of its last part. So a noun whose ending is a noun of this gender and
    whose plural ends in that noun's plural is of its family (Haustür: Tür), and -in is of the family of the masculine."""

    def root(word: str, gender: str, plurals: list[str]) -> str:
        for i in range(len(word) - 2, 0, -1):  # the shortest ending first
            ends = word[i:]
            for other, forms in heads.get(ends, ()) if len(ends) > 2 or ends in SHORT_HEADS else ():
                both = ((a.lower(), b.lower()) for a in plurals for b in forms)
                if gender == other and any(a.endswith(b) for a, b in both):
                    return root(ends, gender, forms)  # forms that the word lacks may lead further
        masculine = word.removesuffix("in")
        for other, forms in heads.get(masculine, ()) if gender == "f" and masculine != word else ():
            if other == "m":
                return root(masculine, "m", forms)
        return word

    return lambda row: {
        root(row["word"].lower(), row["gender"], [row["plural"], *row["other_plurals"]])
    }
