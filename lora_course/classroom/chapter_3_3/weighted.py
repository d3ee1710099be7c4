"""Exercise 3.3-b: a memory in which rows have weights."""

import math

import torch

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def offer(memory, row, weight, number, capacity, *, key=lambda u, w: math.log(u) / w, out=None):
    """Efraimidis and Spirakis' reservoir, with the key and who has to go exchangeable for a mistake."""
    mine = (key(number, weight), row.clone())
    if len(memory) < capacity:
        memory.append(mine)
        return
    place = min(range(capacity), key=lambda i: memory[i][0]) if out is None else out(memory, mine)
    if place is not None and (out or mine[0] > memory[place][0]):
        memory[place] = mine


def _memory(**other):
    return lambda *given: offer(*given, **other)


def _smallest(memory, mine):
    place = max(range(len(memory)), key=lambda i: memory[i][0])
    return place if mine[0] < memory[place][0] else None


def _first_smaller(memory, mine):
    return next((i for i, (key, _) in enumerate(memory) if key < mine[0]), None)


MEMORY_MISTAKES = {
    "The weight is not used: all rows would be kept with the same probability.": _memory(key=lambda u, w: math.log(u)),
    "You multiply by the weight; the logarithm of u^(1/w) is log(u) / w.": _memory(key=lambda u, w: math.log(u) * w),
    "The key is u^(1/w) itself, which is 0 for small weights: keep its logarithm, log(u) / w.":
        _memory(key=lambda u, w: u ** (1 / w)),
    "The key has the wrong sign: keep log(u) / w, which is negative.": _memory(key=lambda u, w: -math.log(u) / w),
    "The smallest keys stay; the largest are to.": _memory(out=_smallest),
    "The new row is always let in: it takes a place only where its key is larger than the smallest.":
        _memory(out=lambda memory, mine: min(range(len(memory)), key=lambda i: memory[i][0])),
    "The oldest row goes; the one of the smallest key has to.":
        _memory(out=lambda memory, mine: 0 if mine[0] > min(memory)[0] else None),
    "The new row takes the place of the first smaller key; it takes that of the smallest.": _memory(out=_first_smaller),
    "The largest key goes; the smallest has to.": _memory(out=lambda memory, mine: (
        max(range(len(memory)), key=lambda i: memory[i][0]) if mine[0] > min(memory)[0] else None)),
    "A full memory is never changed again.": _memory(out=lambda memory, mine: None),
}  # fmt: skip


def _use_memory(_, memory, row, capacity, note, **rest):
    """Keys and rows by descending key, once the caller has used its buffer again."""
    pairs = [pair for pair in memory if isinstance(pair, (tuple, list)) and len(pair) == 2]
    mistake(len(pairs) < len(memory), "The memory holds something that is no pair (key, row).")
    mistake(
        len(memory) > capacity, "The memory holds {} rows; its capacity is {}.", len(memory), capacity
    )  # fmt: skip
    mistake(
        len(memory) < min(note + 1, capacity), "The memory holds {} rows; it has to hold more.", len(memory)
    )  # fmt: skip
    keys, rows = [as_tensor(key) for key, _ in pairs], [as_tensor(r) for _, r in pairs]
    mistake(
        any(key is None or key.numel() != 1 for key in keys) or any(r is None for r in rows),
        "In a pair (key, row) of the memory the key is a number, and the row a tensor.",
    )
    before = [r.clone() for r in rows]
    row.add_(1)
    mistake(
        not all(torch.equal(r, was) for r, was in zip(rows, before, strict=True)),
        "The memory holds the caller's tensor, not a copy: when the buffer is used again, what was remembered changes.",
    )
    order = sorted(range(len(keys)), key=lambda i: -float(keys[i]))
    return [float(keys[i]) for i in order], [before[i] for i in order]


@exercise(
    "3.3-b",
    points=2,
    right=offer,
    look=_use_memory,
    changes=("memory", "row"),
    mistakes=MEMORY_MISTAKES,
    otherwise="The memory does not hold the rows of the largest keys, each with its key.",
)
def check_offer(draw: Draw):
    """One row is offered to a weighted reservoir."""
    length = draw.integer(3, 6)

    def row():
        return torch.randint(0, 999, (length,), generator=draw.generator)

    for held, capacity, kind, hint in [
        (0, 3, "", ""),
        (4, 4, "above", "Where the memory is full and the new key is large it goes wrong."),
        (4, 4, "", "Where the memory is full it goes wrong."),
        (5, 5, "below", "Where the new key is smaller than all it goes wrong: nothing changes then."),
        (2, 5, "below", "While there is room every row is kept, whatever its key."),
        (4, 5, "below", "The last free place is taken as the first one was, whatever the key."),
        (1, 1, "above", "With a capacity of 1 it goes wrong."),
        (1, 1, "below", "With a capacity of 1 it goes wrong."),
        (6, 6, "light", "With a small weight it goes wrong: u^(1/w) is 0 there, its logarithm is not."),
    ]:  # fmt: skip
        weight, number = draw.choice([0.5, 2.0, 3.0, 5.0]), draw.number(0.3, 0.7)
        if kind == "light":
            weight, number = draw.number(0.002, 0.003), draw.number(0.02, 0.09)
        key = math.log(number) / weight
        spread = {"above": (1.1, 3.0), "below": (0.2, 0.9)}.get(kind, (0.3, 2.0))
        keys = [key * draw.number(*spread) for _ in range(held)]
        if kind in ("", "light") and held:
            # the oldest key, the first smaller one, the smallest and the largest have places of their own
            keys[:4] = key * 0.6, key * 1.6, key * 2.5, key * 0.2
        if kind == "light":
            draw.random.shuffle(keys)
        memory = [(k, row()) for k in keys]
        yield case(memory, row(), weight, number, capacity, hint=hint, note=held)
