"""Exercise 3.3-a: what was forgotten, and what was never learnt."""

from lora_course.classroom.exercises import Draw, case, exercise


def losses_of_a_run(
    R, alone, *, best=lambda R, j: R[j + 1 :, j].min(), reference=lambda R, j: R[j + 1, j]
):
    """(forgetting, intransigence), with what each compares exchangeable for a mistake."""
    tasks = R.shape[1]
    lost = [R[-1, j] - best(R, j) for j in range(tasks - 1)]
    missed = [reference(R, j) - alone[j] for j in range(tasks)]
    return sum(lost) / max(1, tasks - 1), sum(missed) / tasks


def _run(change=lambda lost, missed, tasks: (lost, missed), **other):
    return lambda R, alone: change(*losses_of_a_run(R, alone, **other), R.shape[1])


RUN_MISTAKES = {
    "Forgetting has the wrong sign: bits a byte that have risen are a loss, counted as positive.": _run(lambda f, i, T: (-f, i)),
    "Intransigence has the wrong sign: learning worse in the sequence than alone is positive.": _run(lambda f, i, T: (f, -i)),
    "The two numbers are exchanged: forgetting comes first.": _run(lambda f, i, T: (i, f)),
    "Forgetting is divided by T; the last task can't be forgotten yet, so the mean is over T − 1.":
        _run(lambda f, i, T: (f * (T - 1) / T, i)),
    "Forgetting is a sum over tasks; their mean is asked for.": _run(lambda f, i, T: (f * max(1, T - 1), i)),
    "Intransigence is a sum over tasks; their mean is asked for.": _run(lambda f, i, T: (f, i * T)),
    "Forgetting is counted from the best that the task ever was, not from just after it was learnt: a later task may have helped it.":
        _run(best=lambda R, j: R[j + 1, j]),
    "The best is looked for in all rows. Rows from before the task was learnt don't count: what they had was not learnt from it.":
        _run(best=lambda R, j: R[:, j].min()),
    "The best is looked for from row j on. Row 0 is before any task, so task j is learnt in row j + 1.":
        _run(best=lambda R, j: R[j:, j].min()),
    "Forgetting compares with row 0, before any task.": _run(best=lambda R, j: R[0, j]),
    "Forgetting compares with the worst since the task was learnt: less bits a byte are better, so take the smallest.":
        _run(best=lambda R, j: R[j + 1 :, j].max()),
    "Intransigence looks at the last row; it asks how well the task was learnt in its turn.": _run(reference=lambda R, j: R[-1, j]),
    "Intransigence looks one row too high: row 0 is before any task, so task j is learnt in row j + 1.":
        _run(reference=lambda R, j: R[j, j]),
    "Intransigence looks at row 0, before any task.": _run(reference=lambda R, j: R[0, j]),
}  # fmt: skip


@exercise(
    "3.3-a",
    right=losses_of_a_run,
    mistakes=RUN_MISTAKES,
    otherwise="One of the two numbers is wrong.",
)
def check_losses_of_a_run(draw: Draw):
    """Forgetting and intransigence, from the matrix of a run."""
    for tasks, hint in [
        (3, ""),
        (draw.integer(4, 6), ""),
        (2, "With two tasks it goes wrong."),
        (1, "With a single task it goes wrong: nothing is forgotten, 0."),
        (7, ""),
    ]:
        yield case(draw.uniform(tasks + 1, tasks) * 3 + 1, draw.uniform(tasks) * 3 + 1, hint=hint)
