"""Graded problems of chapter 3.3, continual learning: other measures, and a memory to mend."""

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _measure_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [(draw.uniform(3, 2) * 3,), (draw.uniform(4, 3) * 3,)]
    return [*made, *((draw.uniform(t + 1, t) * 3,) for t in draw.sizes(4, 3, 8))]


measures = Family(
    id="3.3-measures",
    title="Three numbers of a run",
    points=4,
    minutes=20,
    statement="""
    `R` is `[T + 1, T]`: row 0 before any task, row $t$ after training on task $t$, a column a task. {better} Return three
    numbers, in this order. The final score: {final} Backward: for every task but the last, {backward} averaged over these tasks. Forward: for
    every task but the first, {forward} averaged over these tasks. For the last two, more is better: turn the sign where needed.
    """,
    answer='''
    def measures(R):
        """R [T + 1, T] → (final score, backward, forward), three numbers"""
        good = $better * R
        tasks = R.shape[1]
        after, last = good[1:], good[-1]
        final = $final
        backward = sum(last[i] - $backward for i in range(tasks - 1)) / (tasks - 1)
        forward = sum(good[i, i] - $forward for i in range(1, tasks)) / (tasks - 1)
        return float($better * final), float(backward), float(forward)
    ''',
    conventions={
        "better": {
            "less": ("Entries are losses: less is better.", "-1"),
            "more": ("Entries are accuracies: more is better.", "1"),
        },
        "final": {
            "mean": ("the mean of the last row.", "last.mean()"),
            "worst": ("the worst entry of the last row.", "last.min()"),
            "average": ("the mean over $t$ of the mean of row $t$ over the tasks up to $t$.", "sum(after[t, : t + 1].mean() for t in range(tasks)) / tasks"),
        },
        "backward": {
            "learnt": ("the change from just after it was learnt to the end,", "after[i, i]"),
            "best": ("the change from its best entry in rows $1$ to $T - 1$ to the end,", "after[:-1, i].max()"),
        },
        "forward": {
            "untrained": ("the gain just before it is trained over row 0,", "good[0, i]"),
            "previous": ("the gain just before it is trained over one row earlier,", "good[i - 1, i]"),
        },
    },
    book={"better": "less", "final": "mean", "backward": "learnt", "forward": "untrained"},
    cases=_measure_cases,
)  # fmt: skip


def _memory_cases(draw: Draw, choice: Choices) -> list[tuple]:
    def rows(count: int) -> list:
        return [draw.normal(2) for _ in range(count)]

    made = [(rows(1), draw.normal(2), 1, 3, 0.25), (rows(2), draw.normal(2), 4, 2, 0.125)]
    for capacity in draw.sizes(4, 2, 6):
        made.append(
            (rows(capacity - 1), draw.normal(2), capacity - 1, capacity, draw.number(0, 0.4))
        )
        for number in (0.0, 0.0625, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375):
            seen = draw.integer(capacity + 1, 3 * capacity)
            made.append((rows(capacity), draw.normal(2), seen, capacity, number))
    return made


memory = Family(
    id="3.3-memory",
    title="Find the bug: a reservoir",
    points=4,
    minutes=25,
    statement="""
    The function below was meant to keep a reservoir in the list `memory`, in place. Old rows die out. It has two mistakes.
    Mend it; keep its name and arguments. It shall do this. {seen} While there is room, a row is {grow} Once there is none, $j$ is a
    whole number from 0 to $n - 1$, where $n$ is the number of rows offered, this one included: {number} If $j$ is below `capacity` the row is
    taken: {place} Otherwise nothing happens.
    """,
    answer='''
    def offer(memory, row, seen, capacity, number):
        """memory: list of rows, changed in place; row [d], three numbers, 0 ≤ number < 1 → nothing"""
        n = $seen
        if len(memory) < capacity:
            $grow
            return
        j = $number
        if j < capacity:
            $place
    ''',
    conventions={
        "seen": {
            "before": ("`seen` rows were offered before this one.", "seen + 1"),
            "with": ("`seen` rows were offered, this one included.", "seen"),
        },
        "grow": {
            "end": ("put at the end.", "memory.append(row.clone())"),
            "front": ("put in front.", "memory.insert(0, row.clone())"),
        },
        "number": {
            "up": ("$j = \\lfloor number \\cdot n \\rfloor$.", "int(number * n)"),
            "down": ("$j = n - 1 - \\lfloor number \\cdot n \\rfloor$.", "n - 1 - int(number * n)"),
        },
        "place": {
            "slot": ("it replaces the row at place $j$.", "memory[j] = row.clone()"),
            "back": ("it replaces the row at place $j$ from the end, the last being 0.", "memory[capacity - 1 - j] = row.clone()"),
            "shift": ("the row at place $j$ is taken out and the new one put at the end.", "memory.pop(j)\nmemory.append(row.clone())"),
        },
    },
    book={"seen": "before", "grow": "end", "number": "up", "place": "slot"},
    cases=_memory_cases,
    changes=("memory",),
    bugs=(
        ("if len(memory) < capacity:", "if len(memory) <= capacity:"),
        ("    if j < capacity:", "    if True:\n        j = j % capacity"),
        ("    return\n", "    pass\n"),
        ("    if j < capacity:", "    j = j - 1\n    if 0 <= j < capacity:"),
    ),
)  # fmt: skip

FAMILIES = [measures, memory]
