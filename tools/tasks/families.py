"""How words are shared out over the splits, so that words of one family lie in one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

SPLITS = ("train", "validation", "test")

HELD_OUT = 10  # per cent of the families, for validation and for test each
FAMILY = 3  # words of one family in a held-out split, so that no family decides a score
TRAIN = 24_000  # rows at most; of German nouns half of them, whose words are long
HELD_OUT_ROWS = 1_000


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
