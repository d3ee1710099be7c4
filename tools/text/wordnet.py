"""WordNet's entries, and its licence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tools.text.documents import Document, drawn

LEXICOGRAPHER_FILES = [
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute", "noun.body",
    "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group", "noun.location",
    "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process",
    "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time", "verb.body", "verb.change",
    "verb.cognition", "verb.communication", "verb.competition", "verb.consumption", "verb.contact", "verb.creation",
    "verb.emotion", "verb.motion", "verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather",
    "adj.ppl",
]  # fmt: skip

SECTION = 150  # synsets in a document


def glosses(sources: dict[str, Path]) -> Iterator[Document]:
    """WordNet's entries, one a line: the words, the part of speech, the gloss with its examples."""
    sections: dict[str, list[str]] = {name: [] for name in LEXICOGRAPHER_FILES}
    folder = sources["wordnet-base"] / "usr/share/wordnet"
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence, at the head of each file
                continue
            record, gloss = line.split("|", 1)
            fields = record.split()
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in words]
            mark = {"n": "n.", "v": "v.", "a": "adj.", "s": "adj.", "r": "adv."}[fields[2]]
            sections[LEXICOGRAPHER_FILES[int(fields[1])]].append(
                f"{', '.join(words)} ({mark}): {gloss.strip()}"
            )
    for name, entries in sections.items():
        for number, start in enumerate(range(0, len(entries), SECTION)):
            source = f"{name}/{number:03d}"
            yield Document(
                drawn(source, 3), source, "\n".join(entries[start : start + SECTION]) + "\n"
            )


def wordnet_licence(folder: Path) -> str:
    """WordNet's licence, out of the head of its data files."""
    lines = (folder / "usr/share/wordnet/data.noun").read_text(encoding="latin-1").splitlines()
    head = [re.sub(r"^ +\d+ ?", "", line).strip() for line in lines if line.startswith("  ")]
    return "\n".join(f"> {line}".rstrip() for line in head)
