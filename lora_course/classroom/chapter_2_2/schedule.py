"""Exercise 2.2-a: the jagged cosine."""

import math

from lora_course.classroom.exercises import Draw, case, exercise


def cosine(x):
    return (1 + math.cos(math.pi * x)) / 2


def jagged(
    step,
    stages,
    length,
    warmup,
    floor,
    *,
    again=True,
    start=None,
    end=None,
    shape=cosine,
    join=None,
    low=None,
):
    """ReLoRA's schedule, with each of its parts exchangeable for a mistake."""
    total = stages * length if end is None else end(stages, length, warmup)
    first = warmup if start is None else start
    warm = min(1, (step % length if again else step) / warmup)
    decay = shape(max(0, step - first) / (total - first))
    low = floor if low is None else low
    decay = low + (1 - low) * decay
    return warm * decay if join is None else join(warm, decay)


def _jagged(**other):
    return lambda step, stages, length, warmup, floor: jagged(
        step, stages, length, warmup, floor, **other
    )


def _by_stage(step, stages, length, warmup, floor):
    return jagged(step % length, 1, length, warmup, floor)


JAGGED_MISTAKES = {
    "It is warmed up once only: at the start of every stage it must be 0 again.": _jagged(again=False),
    "The decay is missing.": _jagged(shape=lambda x: 1),
    "The warm-up is missing.": _jagged(join=lambda warm, decay: decay),
    "Each stage decays by itself. One decay over the whole run is asked for.": _by_stage,
    "The decay is a straight line; half a cosine is asked for.": _jagged(shape=lambda x: 1 - x),
    "The decay is a quarter of a cosine, which is steep at its end; half of one is flat at both.":
        _jagged(shape=lambda x: math.cos(math.pi * x / 2)),
    "The smaller of warm-up and decay is taken; they are multiplied.": _jagged(join=min),
    "The decay begins at step 0; it begins at the end of the first warm-up.": _jagged(start=0),
    "`floor` is not used: the decay ends at 0.": _jagged(low=0.0),
    "`floor` is where the rate is cut; the cosine itself ends there.":
        lambda step, stages, length, warmup, floor: min(1, step % length / warmup) * max(
            floor, jagged(step, stages, length, warmup, 0.0, join=lambda w, d: d)),
    "The rate never falls below `floor`, in the warm-ups either; a stage starts at 0.":
        lambda step, stages, length, warmup, floor: max(floor, jagged(step, stages, length, warmup, floor)),
    "The first step of a stage must have rate 0: `step` counts from 0.":
        lambda step, stages, length, warmup, floor: min(1, (step % length + 1) / warmup) * jagged(
            step, stages, length, warmup, floor, join=lambda w, d: d),
    "The decay is at `floor` one step too early: it gets there at step `stages * length`, after the last.":
        _jagged(end=lambda stages, length, warmup: stages * length - 1),
}  # fmt: skip


@exercise(
    "2.2-a",
    right=lambda step, stages, length, warmup, floor: jagged(step, stages, length, warmup, floor),
    mistakes=JAGGED_MISTAKES,
    otherwise="This is not the warm-up of the step's stage times the decay of the whole run.",
)
def check_jagged_cosine(draw: Draw):
    """ReLoRA's own schedule: warm-ups on a cosine that ends at a floor."""
    for round in range(3):
        stages, warmup, floor = draw.integer(2, 4), draw.integer(2, 6), draw.number(0.05, 0.5)
        if round == 2:
            stages, warmup, floor = 1, 1, 0.0
        length = warmup + draw.integer(8, 20)
        total = stages * length
        inside = draw.random.sample(range(warmup + 1, total), 4)
        again = [s * length + draw.integer(1, warmup) for s in range(1, stages)]
        last = range((stages - 1) * length, (stages - 1) * length + warmup + 1)
        for step in [*inside, *again, *range(warmup + 1), *last, total - 1]:
            hint = ""
            if step % length == 0:
                hint = "At the first step of a stage it goes wrong: its rate is 0."
            elif step < warmup:
                hint = "In the first warm-up it goes wrong: the decay is 1 there."
            yield case(step, stages, length, warmup, floor, hint=hint)
        yield case(inside[0], stages, length, warmup, floor / 2 + 0.1)
