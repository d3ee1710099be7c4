"""Exercise 1.2-a: a budget of any power."""

import math
from typing import Any

from lora_course.classroom.exercises import Draw, case, exercise


def value(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3):
    """b(t) before it is rounded."""
    last = total_step - tfinal
    left = (last - min(max(t, tinit), last)) / (last - tinit)
    return (init_r - target_r) * layers * left**power + target_r * layers


def budget(*schedule, **more):
    return math.ceil(value(*schedule, **more))


def right_budget(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3):
    return budget(t, layers, init_r, target_r, tinit, tfinal, total_step, power)


def _unclamped(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3):
    left = (total_step - tfinal - max(t, tinit)) / (total_step - tfinal - tinit)
    return math.ceil((init_r - target_r) * layers * left**power + target_r * layers)


BUDGET_MISTAKES = {
    "A whole number of triplets is expected, rounded up.": value,
    "You cut b(t) to a whole number; it is rounded up here.": lambda *a, **k: int(value(*a, **k)),
    "You round b(t) to the nearest whole number; it is rounded up here.": lambda *a, **k: round(value(*a, **k)),
    "You always add one: where b(t) is whole it stays.": lambda *a, **k: int(value(*a, **k)) + 1,
    "This is the mean rank of a matrix; the budget is for all layers together.":
        lambda t, layers, *rest, **k: budget(t, 1, *rest, **k),
    "The mean rank of a matrix is rounded, then multiplied: round the budget itself.":
        lambda t, layers, *rest, **k: layers * budget(t, 1, *rest, **k),
    "`power` is not used: the cubic is only one of them.":
        lambda t, layers, init_r, target_r, tinit, tfinal, total_step, power=3: budget(
            t, layers, init_r, target_r, tinit, tfinal, total_step),
    "Your budget falls in a straight line, whatever `power` is.":
        lambda t, layers, init_r, target_r, tinit, tfinal, total_step, power=3: budget(
            t, layers, init_r, target_r, tinit, tfinal, total_step, 1),
    "Your budget is met at the last step: it should be met at total_step - tfinal, so that tfinal steps are left to train.":
        lambda t, layers, init_r, target_r, tinit, tfinal, total_step, power=3: budget(
            t, layers, init_r, target_r, tinit, 0, total_step, power),
    "Your budget falls from the first step; it stays at its start for tinit steps.":
        lambda t, layers, init_r, target_r, tinit, tfinal, total_step, power=3: budget(
            t, layers, init_r, target_r, 0, tfinal, total_step, power),
    "After step total_step - tfinal your budget goes on changing: it stays at its end.": _unclamped,
    "The budget rises: init_r is its start, target_r its end.":
        lambda t, layers, init_r, target_r, *rest, **k: budget(t, layers, target_r, init_r, *rest, **k),
}  # fmt: skip


@exercise(
    "1.2-a",
    right=right_budget,
    mistakes=BUDGET_MISTAKES,
    whole=True,
    otherwise="Your budget is not b(t) with that power, rounded up.",
)
def check_budget_up(draw: Draw):
    """b(t) with any power, rounded up. No b(t) between the phases is nearly whole."""
    before = "During the first tinit steps the budget is init_r · layers."
    after = "From step total_step - tfinal on the budget is target_r · layers."
    for power, tinit, tfinal in (
        (3, 5, 8),
        (1, 3, 6),
        (2, 0, 4),
        (1.5, 9, 0),
        (5, 2, 11),
        (0.5, 4, 7),
    ):
        target_r, init_r = sorted(draw.sizes(2, 3, 16))
        layers, total = draw.integer(5, 40), draw.integer(40, 90)
        last = total - tfinal
        rest = (init_r, target_r, tinit, tfinal, total)
        middle = draw.random.sample(range(tinit + 1, last), 6)
        steps = sorted({1, max(tinit, 1), *middle, last, total})
        calls = [(t, layers, power) for t in steps]
        # one argument changed at a time, so that what is kept from an earlier call shows
        calls += [(middle[0], layers, power + 1), (middle[0], layers + 1, power)]
        for t, layers, power in calls:
            exact = value(t, layers, *rest, power)
            if tinit < t < last and abs(exact - round(exact)) < 1e-6:
                continue
            hint = before if t <= tinit else after if t >= last else ""
            hint = hint or (f"With a power of {power:g} it goes wrong." if power != 3 else "")
            given: dict[str, Any] = {} if power == 3 else {"power": power}
            yield case(t, layers, *rest, **given, hint=hint)
