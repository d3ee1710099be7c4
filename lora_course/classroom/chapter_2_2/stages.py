"""Exercise 2.2-b: one adapter for all stages."""

import torch

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def one_adapter(stages, scaling):
    A = torch.cat([A for A, _, _ in stages])
    return A, torch.cat([s / scaling * B for _, B, s in stages], dim=1)


def _use_adapter(found, stages, scaling):
    """ΔW of the adapter that was returned."""
    mistake(
        not isinstance(found, (tuple, list)) or len(found) != 2,
        "Two tensors are expected: A and B.",
    )
    A, B = (as_tensor(t).double() for t in found)
    outputs, inputs = len(stages[0][1]), stages[0][0].shape[1]
    ranks = [len(A) for A, _, _ in stages]
    full = (outputs, inputs)
    mistake(
        tuple(A.shape) == full or tuple(B.shape) == full,
        "One of them is the full [out, in] matrix: an adapter is two thin factors.",
    )
    mistake(
        A.ndim == 2 and 0 < len(A) < sum(ranks) and B.shape == (outputs, len(A)),
        "Rank {} is less than the sum of {}: what is added up before the product mixes one stage's B with another's A.",
        len(A) if A.ndim else 0,
        ranks,
    )
    mistake(
        tuple(A.shape) != (sum(ranks), inputs) or tuple(B.shape) != (outputs, sum(ranks)),
        "A is {} and B is {}; [Σr, in] = {} and [out, Σr] = {} are expected: stack A along its rows, B along its columns.",
        list(A.shape), list(B.shape), [sum(ranks), inputs], [outputs, sum(ranks)],
    )  # fmt: skip
    return scaling * B @ A


def _stacked(a, b):
    """The scales that go into A and into B."""
    return lambda stages, scaling: (
        torch.cat([a(s, scaling, len(stages)) * A for A, _, s in stages]),
        torch.cat([b(s, scaling, len(stages)) * B for _, B, s in stages], dim=1),
    )


ADAPTER_MISTAKES = {
    "The stages' scales are missing: each goes into its own factors.": _stacked(lambda *_: 1, lambda s, t, n: 1 / t),
    "The factors are stacked as they are: the stages' scales, and the one of the adapter, are missing.":
        _stacked(lambda *_: 1, lambda *_: 1),
    "`scaling` is not used: the adapter is multiplied by it, so its factors must be divided by it.":
        _stacked(lambda *_: 1, lambda s, t, n: s),
    "`scaling` is multiplied into the factors; they must be divided by it.": _stacked(lambda *_: 1, lambda s, t, n: s * t),
    "The stages' scales are in A and in B: they must be in one of them.": _stacked(lambda s, t, n: s, lambda s, t, n: s / t),
    "A and B are both divided by `scaling`: once is enough.": _stacked(lambda s, t, n: 1 / t, lambda s, t, n: s / t),
    "This is the mean of the updates; their sum is asked for.": _stacked(lambda *_: 1, lambda s, t, n: s / t / n),
    "The stages' scales divide; they multiply.": _stacked(lambda *_: 1, lambda s, t, n: 1 / s / t),
}  # fmt: skip


@exercise(
    "2.2-b",
    points=2,
    right=one_adapter,
    look=_use_adapter,
    mistakes=ADAPTER_MISTAKES,
    otherwise="scaling · B A is not the sum of the stages' updates.",
)
def check_given_scaling(draw: Draw):
    """One adapter of a given scaling for several stages."""
    for number, hint in [
        (3, ""),
        (2, ""),
        (4, "With four stages it goes wrong."),
        (1, "With a single stage it goes wrong: its scale is not that of the adapter."),
        (3, "With equal ranks it goes wrong."),
    ]:
        inputs, outputs = draw.sizes(2, 60, 90)
        ranks = [3] * number if "equal" in hint else draw.sizes(number, 1, 6)
        stages = [
            (draw.normal(r, inputs), draw.normal(outputs, r), draw.number(0.3, 4)) for r in ranks
        ]
        # a dense [out, in] matrix is larger than all that the thin way needs
        largest = max(inputs, outputs) * sum(ranks)
        yield case(stages, draw.number(0.3, 4), hint=hint, largest=largest)
