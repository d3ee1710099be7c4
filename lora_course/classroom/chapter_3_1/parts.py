"""Exercise 3.1-b: what the loss changes by without a part."""

from lora_course.classroom.exercises import Draw, case, exercise


def _parts(together):
    """An answer that puts together `[n, r]`, what each part adds to the loss for each token."""
    return lambda A, B, scaling, x, gradient: together(
        (scaling * (x @ A.T) * (gradient @ B)).reshape(-1, len(A))
    )


without_parts = _parts(lambda each: -each.sum(0))


EFFECT_MISTAKES = {
    "The sign is turned: without a part the loss loses what the part adds to it.": _parts(lambda each: each.sum(0)),
    "The scale is missing.": lambda A, B, scaling, x, g: without_parts(A, B, 1.0, x, g),
    "This is a mean over tokens. The gradient has the loss's own mean in it already: sum.":
        _parts(lambda each: -each.mean(0)),
    "The magnitude is taken, so that a part that harms can't be told from one that helps.":
        _parts(lambda each: each.sum(0).abs()),
    "The magnitude of each token is taken; the tokens' effects add up with their signs.":
        _parts(lambda each: each.abs().sum(0)),
    "The effects are divided by √(in · out): that compares layers. What the loss changes by is asked for.":
        lambda A, B, scaling, x, g: without_parts(A, B, scaling, x, g) / (A.shape[1] * len(B)) ** 0.5,
    "The sums over tokens are multiplied; multiply for each token, then sum.": lambda A, B, scaling, x, g: (
        -scaling * (x @ A.T).reshape(-1, len(A)).sum(0) * (g @ B).reshape(-1, len(A)).sum(0)),
    "Only the first row of tokens counts: sum over all leading dimensions.": lambda A, B, scaling, x, g: (
        without_parts(A, B, scaling, x[0], g[0]) if x.ndim > 2 else without_parts(A, B, scaling, x, g)),
}  # fmt: skip


@exercise(
    "3.1-b",
    right=without_parts,
    mistakes=EFFECT_MISTAKES,
    otherwise="This is not what the loss changes by, to first order, when each part goes.",
)
def check_without_parts(draw: Draw):
    """What the loss changes by, to first order, without each part of rank one."""
    shapes = [
        ((6,), ""),
        ((2, 3), "With x [B, T, in] it goes wrong: sum over all leading dimensions."),
        ((), "With a single token, x [in], it goes wrong."),
        ((0,), "Without any token it goes wrong: nothing changes then, [r] zeros."),
    ]
    for leading, hint in shapes:
        outputs, inputs = draw.sizes(2, 35, 50)
        r, scaling = draw.integer(2, 3), draw.number(1.3, 4)
        A, B = draw.normal(r, inputs), draw.normal(outputs, r)
        x, gradient = draw.normal(*leading, inputs), draw.normal(*leading, outputs)
        yield case(A, B, scaling, x, gradient, hint=hint, largest=inputs * outputs - 1)
