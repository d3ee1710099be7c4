"""Exercise 5.1-c: the rank of as many parameters."""

from lora_course.classroom.exercises import Draw, case, exercise


def cost(shapes, r, dora):
    return sum(r * (out + inner) + (out if dora else 0) for out, inner in shapes)


def equal_rank(shapes, parameters, dora, *, extra=None, each=None, divide=None):
    """The largest rank within the budget, with each part exchangeable for a mistake."""
    extra = (sum(out for out, _ in shapes) if dora else 0) if extra is None else extra(shapes, dora)
    each = sum(out + inner for out, inner in shapes) if each is None else each(shapes)
    return max(
        0, (parameters - extra) // each if divide is None else divide(parameters - extra, each)
    )


def _rank(**other):
    return lambda shapes, parameters, dora: equal_rank(shapes, parameters, dora, **other)


RANK_MISTAKES = {
    "DoRA has a magnitude for each output on top of the factors: take Σ out off the budget first.": _rank(extra=lambda shapes, dora: 0),
    "The magnitudes are one for each output; you count the inputs.":
        _rank(extra=lambda shapes, dora: dora * sum(inner for _, inner in shapes)),
    "There is one magnitude for each output, not one for each layer.": _rank(extra=lambda shapes, dora: dora * len(shapes)),
    "You take the magnitudes off where there are none: without `dora` there are factors alone.":
        _rank(extra=lambda shapes, dora: sum(out for out, _ in shapes)),
    "The magnitudes are counted again for each rank; they are there once.":
        lambda shapes, parameters, dora: equal_rank(
            shapes, parameters, False, each=lambda shapes: sum((2 if dora else 1) * out + inner for out, inner in shapes)),
    "A full update has out · in numbers; a rank of LoRA has out + in.": _rank(each=lambda shapes: sum(o * i for o, i in shapes)),
    "The layers that come after the first are not counted.": lambda shapes, parameters, dora: equal_rank(shapes[:1], parameters, dora),
    "The rank is shared out over the layers here; all layers have it.":
        lambda shapes, parameters, dora: equal_rank(shapes, parameters, dora) // len(shapes),
    "Rounded to the nearest: the adapter may not have more parameters than asked for.":
        _rank(divide=lambda budget, each: round(budget / each)),
    "Rounded up: the adapter may not have more parameters than asked for.": _rank(divide=lambda budget, each: -(-budget // each)),
    "One rank too few: at most so many means that the budget may be used up.":
        _rank(divide=lambda budget, each: (budget - 1) // each),
    "At least rank 1 is returned, whatever the budget; 0 is right where rank 1 is too much.":
        lambda shapes, parameters, dora: max(1, equal_rank(shapes, parameters, dora)),
}  # fmt: skip


@exercise(
    "5.1-c",
    points=2,
    right=equal_rank,
    mistakes=RANK_MISTAKES,
    otherwise="The adapter of that rank has more parameters than the budget, or a larger rank fits.",
    whole=True,
)
def check_equal_rank(draw: Draw):
    """Budgets that are just enough, just too small, in between, and too small for anything."""
    for dora in (False, True):
        shapes = [(draw.integer(20, 300), draw.integer(20, 300)) for _ in range(draw.integer(3, 5))]
        shapes.append(shapes[0])
        outputs = sum(out for out, _ in shapes)
        r, step = draw.integer(4, 15), cost(shapes, 1, False)
        exact = "Where the budget is just enough, or one too small, it goes wrong."
        for parameters, hint in [
            (cost(shapes, r, dora) + draw.integer(1, step // 3), ""),
            (cost(shapes, r, dora) + step - draw.integer(2, step // 3), ""),
            (cost(shapes, r, dora), exact),
            (cost(shapes, r, dora) - 1, exact),
            (cost(shapes, 1, dora) - 1, "Where rank 1 is too much it goes wrong: the answer is 0."),
            (cost(shapes, 20, dora) + outputs // 2, ""),
            (r * step + 1, ""),
            (outputs // 2, "Where not even the magnitudes fit it goes wrong: the answer is 0."),
        ]:
            yield case(
                shapes,
                parameters,
                dora,
                hint=hint or ("With `dora` it goes wrong." if dora else ""),
            )
        wide = [(1500, 1200), (900, 2000)]
        yield case(
            wide,
            cost(wide, draw.integer(300, 600), dora) + draw.integer(0, 5000),
            dora,
            hint="Where a rank of some hundreds fits it goes wrong.",
        )
        yield case(
            [shapes[1]],
            cost(shapes[1:2], r, dora) + 3,
            dora,
            hint="With a single layer it goes wrong.",
        )
