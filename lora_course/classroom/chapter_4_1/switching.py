"""Exercise 4.1-d: a sparse update that can be taken out again."""

import torch

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def switch(weight, indices, values, *, new=lambda old, values: old + values):
    rows, columns = indices // weight.shape[1], indices % weight.shape[1]
    old = weight[rows, columns]
    weight[rows, columns] = new(old, values).to(weight.dtype)
    return old


def _use_switched(found, weight, indices, values, note):
    """The weight with the update in it, once it can be undone."""
    old, width = as_tensor(found), weight.shape[1]
    mistake(
        weight.shape != note.shape or weight.dtype != note.dtype,
        "The weight has another shape or type now.",
    )
    mistake(
        torch.equal(weight, note),
        "The weight is what it was. (Flattening a weight that is stored the other way round makes a copy of it.)",
    )
    mistake(
        old is None or old.shape != indices.shape,
        "What you return has to have one number for each place, [nnz]: what was there before.",
    )
    rows, columns = indices // width, indices % width
    old, was = old.to(note.dtype), note[rows, columns]
    if not torch.equal(old, was):
        mistake(
            torch.equal(old, weight[rows, columns]),
            "You return the new entries; what was there before is needed to undo the switch.",
        )
        mistake(
            torch.equal(old.abs(), values.to(note.dtype).abs()),
            "You return the values: taken off again, they don't give the old weight back to the bit.",
        )
        mistake(
            torch.equal(old, note[indices % len(note), indices // len(note)]),
            "Place k is entry (k // in, k % in).",
        )
        mistake(True, "What you return is not what was there before, to the bit, place by place.")
    return weight


SWITCH_MISTAKES = {
    "The values take the place of the entries; they are added to them.": lambda *given: switch(*given, new=lambda old, values: values),
    "The values are taken off; they are added.": lambda *given: switch(*given, new=lambda old, values: old - values),
}  # fmt: skip


@exercise(
    "4.1-d",
    points=2,
    right=switch,
    look=_use_switched,
    changes=("weight",),
    fresh=True,
    mistakes=SWITCH_MISTAKES,
    otherwise="The weight with the update in it is wrong.",
)
def check_switch(draw: Draw):
    """A sparse update goes into a weight in place, and can be undone to the bit."""
    for kind, dtype, hint in [
        ("", torch.float32, ""),
        ("", torch.bfloat16, "With a weight in bf16 and values in fp32 it goes wrong."),
        ("stored by columns", torch.float32, "With a weight that is stored column by column it goes wrong."),
        ("large", torch.float32, "With values much larger than the weight it goes wrong."),
        ("one place", torch.bfloat16, "With a single place it goes wrong."),
    ]:  # fmt: skip
        outputs, inputs = draw.sizes(2, 5, 12)
        weight = draw.normal(outputs, inputs).to(dtype)
        if kind == "stored by columns":
            weight = draw.normal(inputs, outputs).to(dtype).T
        indices = draw.order(outputs * inputs)[: 1 if kind == "one place" else draw.integer(6, 14)]
        values = draw.normal(len(indices)) * (1e6 if kind == "large" else 1)
        yield case(weight, indices, values, hint=hint, note=weight.clone())
