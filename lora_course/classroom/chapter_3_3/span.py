"""Exercise 3.3-d: a gradient that leaves old directions alone."""

import torch
from torch.nn import functional as F

from lora_course.classroom.exercises import Draw, case, exercise


def out_of_span(past, gradient):
    """What is left of the gradient's rows outside of the span of all past rows."""
    if not past:
        return gradient.clone()
    P = torch.cat(past).double()
    _, sizes, V = torch.linalg.svd(P, full_matrices=False)
    V = V[sizes > 1e-5 * sizes[0]]
    return (gradient - gradient.double() @ V.T @ V).float()


def _rows(make):
    """An answer made of all past rows in one matrix."""
    return lambda past, gradient: make(torch.cat(past), gradient) if past else gradient.clone()


def _one_by_one(past, gradient):
    for A in past:
        gradient = out_of_span([A], gradient)
    return gradient.clone()


def _by_qr(P, gradient):
    Q = torch.linalg.qr(P.T).Q
    return gradient - gradient @ Q @ Q.T


SPAN_MISTAKES = {
    "This is the part *in* the span; what is left outside is asked for.": lambda past, gradient: gradient - out_of_span(past, gradient),
    "The past rows are neither of length one nor orthogonal, so AᵀA is no projection: find an orthonormal basis of their span.":
        _rows(lambda P, G: G - G @ P.T @ P),
    "Rows of length one need not be orthogonal: find an orthonormal basis of their span.":
        _rows(lambda P, G: G - G @ F.normalize(P).T @ F.normalize(P)),
    "Each past adapter is projected out by itself, one after the other: the second step brings back some of the first. "
    "Take all rows together.": _one_by_one,
    "The projections of the past adapters are summed, so that what they share is taken off twice. Take all rows together.":
        lambda past, gradient: gradient - sum((gradient - out_of_span([A], gradient) for A in past), 0 * gradient),
    "Only the last adapter is left alone; all are to be.": lambda past, gradient: out_of_span(past[-1:], gradient),
    "Only the first adapter is left alone; all are to be.": lambda past, gradient: out_of_span(past[:1], gradient),
    "Where past rows depend on each other, QR's basis has directions in it that belong to none of them: use an SVD, and drop what is "
    "nearly zero.": _rows(_by_qr),
    "The gradient is what it was.": lambda past, gradient: gradient.clone(),
}  # fmt: skip


@exercise(
    "3.3-d",
    points=2,
    right=out_of_span,
    mistakes=SPAN_MISTAKES,
    tolerance=1e-3,
    otherwise="This is not what is left of the gradient outside of the span of the past rows.",
)
def check_out_of_span(draw: Draw):
    """The gradient of A without its part in the span of all past A's."""
    for number, kind, hint in [
        (1, "", ""),
        (2, "", "With two past adapters it goes wrong."),
        (3, "", "With three past adapters it goes wrong."),
        (2, "dependent", "Where past rows depend on each other it goes wrong: the span has fewer dimensions than there are rows."),
        (2, "equal", "Where an adapter is there twice it goes wrong."),
        (2, "zero", "Where a past row is zero it goes wrong."),
        (2, "small", "Where past rows are small it goes wrong: their directions count, not their sizes."),
        (0, "", "Before the second task there is no past: the gradient stays what it is."),
    ]:  # fmt: skip
        inputs, r = draw.integer(24, 32), draw.integer(2, 4)
        past = [draw.normal(rank, inputs) * 2 for rank in draw.sizes(number, 2, 6)]
        if kind == "dependent":
            # few bits, so that they depend exactly; so large that what rounding leaves is not small by itself
            past = [1024 * (8 * A).round() / 8 for A in past]
            mixed = torch.randint(-3, 4, (2, len(past[0])), generator=draw.generator).float()
            past[1][:2] = mixed @ past[0]
        elif kind == "equal":
            past[1] = past[0].clone()
        elif kind == "zero":
            past[1][0] = 0
        elif kind == "small":
            past = [3e-5 * A for A in past]
        gradient = draw.normal(r, inputs)
        for A in past:  # a good part of it lies in their span
            gradient += draw.normal(r, len(A)) @ A / A.norm() * 5
        yield case(past, gradient, hint=hint)
