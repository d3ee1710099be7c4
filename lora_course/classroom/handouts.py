"""What people read beside an assignment's notebooks: the students' README, and the rubric."""

from lora_course.classroom.assignment import Assignment


def readme(assignment: Assignment) -> str:
    titles = "\n".join(
        f"| {f.id} | {f.title} | {f.points} | {f.minutes} |" for f in assignment.families
    )
    minutes = sum(family.minutes for family in assignment.families)
    return f"""# {assignment.name}: how to work on it

Open the notebook on Colab (File, Upload notebook) or on your computer, run its first code cell, and work downwards. No GPU is needed.

| problem | | points | minutes |
|---|---|---|---|
{titles}
| | together | {assignment.points} | {minutes} |

- Each answer is one function in its own cell. Don't rename it, and don't delete the cell. A copy counts too: of several, the last.
- Your own helper functions may stand in other cells. Files, the network and other programs aren't there when graded; torch and numpy are.
- A problem gets all of its points or none. Each has a limit of about 20 seconds, far more than it needs.
- Before you hand in: run all cells from the top, look at the examples' ✓, clear all outputs, save, and hand in the one `.ipynb` file.
- Afterwards you get a file that says for each problem what was found.
"""


def rubric(assignment: Assignment) -> str:
    """What is right, and what each wrong answer misses. With one seed for all the drawn rules are listed."""
    parts = [f"# {assignment.name}: rubric, {assignment.points} points", ""]
    choices = {} if assignment.per_student else assignment.choices()
    for family in assignment.families:
        parts += [f"## {family.id}: {family.title} ({family.points} points, {family.kind})", ""]
        parts.append(
            f"- {family.points}: every case is right, and arguments are left as they were."
        )
        parts.append("- 0: anything else. The message names the rule that is missed where one alone explains the answer.")  # fmt: skip
        if family.id in choices:
            parts += ["", "Rules drawn:", ""]
            parts += [f"- {name}: {family.sentence(choices[family.id], name)}" for name in family.conventions]  # fmt: skip
            for right, wrong in family.planted(assignment.seed_of()) if family.bugs else ():
                parts.append(f"- planted: `{wrong}` for `{right}`")
        parts.append("")
    return "\n".join(parts)
