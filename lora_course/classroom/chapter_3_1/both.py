"""Exercise 3.1-a: a growth of which both halves learn at once."""

import torch
from torch import Tensor

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def grow_both(weight, A, B, lora_alpha, k):
    r, scaling = len(A), lora_alpha / len(A)
    new_A, new_B = torch.randn(k, A.shape[1]), torch.randn(len(B), k)
    weight = weight - scaling * new_B @ new_A
    return weight, torch.cat([A, new_A]), torch.cat([B, new_B], 1), scaling * (r + k)


def _near(a: Tensor, b: Tensor, floor: float = 0.0) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max() + floor)


def _rank(rows: Tensor) -> int:
    """How many rows are no combination of others, whatever their sizes; what fp32 rounds counts as none."""
    return int(torch.linalg.matrix_rank(torch.nn.functional.normalize(rows), rtol=1e-4))


def _say_what_moved(moved, new, A, B, lora_alpha, r):
    scaling = lora_alpha / r
    for happened, message in [
        (not moved.any(), "The weight is what it was, so the function jumps by the new product: the weight has to make up for it."),
        (_near(moved, scaling * new), "The new product is added to the weight; it is in the function already, so take it off."),
        (_near(moved, -new), "The scale is missing: what the new factors add is scale · B A."),
        (_near(moved, -lora_alpha * new), "The weight makes up for lora_alpha · B A; the factor is the scale, lora_alpha / r."),
        (_near(moved, -lora_alpha / len(A) * new), "The weight makes up for the product at another scale than the new layer has."),
        (_near(moved, -scaling * B @ A), "The weight makes up for the old part too: that one is meant to stay."),
    ]:  # fmt: skip
        mistake(happened, message)


def _use_grown(found, weight, A, B, lora_alpha, k):
    """W + scale · B A of the grown layer, once its parts are what was asked for."""
    mistake(
        not isinstance(found, (tuple, list)) or len(found) != 4,
        "Four things are expected: the weight, A, B and lora_alpha.",
    )
    W1, A1, B1 = (as_tensor(part) for part in found[:3])
    mistake(W1 is None or A1 is None or B1 is None, "The weight, A and B are tensors.")
    W1, A1, B1, alpha = W1.double(), A1.double(), B1.double(), float(found[3])
    r, rank, scaling = len(A), len(A) + k, lora_alpha / len(A)
    shapes = [list(part.shape) for part in (W1, A1, B1)]
    right = [list(weight.shape), [rank, A.shape[1]], [len(B), rank]]
    mistake(
        shapes != right,
        "The weight, A and B have the shapes {}, {}, {}; {}, {}, {} are expected: rows are added to A, columns to B.",
        *shapes, *right,
    )  # fmt: skip
    mistake(
        not all(bool(part.isfinite().all()) for part in (W1, A1, B1)),
        "There is a NaN or an infinity in what you return.",
    )
    mistake(
        not torch.allclose(A1[:r], A.double()) or not torch.allclose(B1[:, :r], B.double()),
        "The old part has moved: the first rows of A and the first columns of B stay as they were.",
    )
    mistake(
        not A1[r:].any() or not B1[:, r:].any(),
        "A new half is zero, so the other one gets no gradient at the first step. Here both are to learn from it on.",
    )
    mistake(
        min(_rank(A1), _rank(B1.T)) < rank,
        "A new row of A, or column of B, is a combination of the others: draw them at random.",
    )
    mistake(
        alpha == lora_alpha,
        "lora_alpha is what it was, so the scale falls as the rank grows, and what was learnt shrinks.",
    )
    mistake(
        abs(alpha - scaling) < 1e-6, "You return the scale; lora_alpha is the scale times the rank."
    )
    mistake(
        abs(alpha / rank - scaling) > 1e-6 * scaling,
        "The scale of the old part has changed: lora_alpha grows as the rank does.",
    )
    moved, new = W1 - weight, B1[:, r:] @ A1[r:]
    # new halves may be small, and the weight keeps no more than its own digits of their product
    if not _near(moved, -scaling * new, floor=1e-6 * float(weight.abs().max())):
        _say_what_moved(moved, new, A1, B1, lora_alpha, r)
    return W1 + alpha / rank * B1 @ A1


@exercise(
    "3.1-a",
    right=grow_both,
    look=_use_grown,
    draws=True,
    otherwise="The layer computes something else than before.",
)
def check_grow_both(draw: Draw):
    """A growth in which both new factors are random, and the weight makes up for their product."""
    for r, k, hint in [
        (3, 2, ""),
        (2, 4, "With more new ranks than old ones it goes wrong."),
        (1, 1, "With one rank and one more it goes wrong."),
    ]:
        outputs, inputs = draw.sizes(2, 9, 14)
        alpha = draw.choice(
            [a for a in range(3, 20) if a not in (r, r + k, r * r) and (r == 1 or a % r)]
        )
        weight, A, B = draw.normal(outputs, inputs), draw.normal(r, inputs), draw.normal(outputs, r)
        yield case(weight, A, B, float(alpha), k, hint=hint)
