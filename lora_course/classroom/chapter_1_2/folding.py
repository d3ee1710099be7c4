"""Exercise 1.2-c: a triplet layer as plain LoRA."""

from torch import nn

from lora_course.adalora import AdaLoRALinear
from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def fold(layer):
    kept = layer.mask
    return (layer.E * layer.A)[kept], layer.B[:, kept], layer.scaling * int(kept.sum())


def _use_fold(found, layer):
    """ΔW of the plain layer with the factors and the α that were returned."""
    mistake(
        not isinstance(found, (tuple, list)) or len(found) != 3,
        "Three things are expected: A, B and lora_alpha.",
    )
    A, B = (as_tensor(t).double() for t in found[:2])
    kept, shape = int(layer.mask.sum()), (layer.out_features, layer.in_features)
    mistake(
        A.shape == layer.A.shape and kept != len(layer.mask),
        "A still has the masked rows: keep those where mask is True.",
    )
    mistake(
        A.shape != (kept, shape[1]) or B.shape != (shape[0], kept),
        "A is {} and B {}; [kept, in] = {} and [out, kept] = {} are expected.",
        list(A.shape), list(B.shape), [kept, shape[1]], [shape[0], kept],
    )  # fmt: skip
    return float(found[2]) / kept * B @ A


def _fold(
    A=lambda layer: layer.E * layer.A, alpha=lambda layer: layer.scaling * int(layer.mask.sum())
):
    return lambda layer: (A(layer)[layer.mask], layer.B[:, layer.mask], alpha(layer))


FOLD_MISTAKES = {
    "λ is missing: fold it into A or into B.": _fold(A=lambda layer: layer.A),
    "λ is there twice, in A and in B: fold it into one of them.": _fold(A=lambda layer: layer.E**2 * layer.A),
    "λ counts by its size only; its sign belongs to it.": _fold(A=lambda layer: layer.E.abs() * layer.A),
    "The scale has changed: a plain layer divides lora_alpha by the rank that is left, this one by its first rank.":
        _fold(alpha=lambda layer: layer.lora_alpha),
    "You return the scale; lora_alpha is the scale times the rank that is left.":
        _fold(alpha=lambda layer: layer.scaling),
    "The scale is missing: lora_alpha is the scale times the rank that is left.":
        _fold(alpha=lambda layer: int(layer.mask.sum())),
    "The scale is applied twice: it stands in lora_alpha, or in a factor.":
        _fold(A=lambda layer: layer.scaling * layer.E * layer.A),
}  # fmt: skip


@exercise(
    "1.2-c",
    points=2,
    right=fold,
    look=_use_fold,
    mistakes=FOLD_MISTAKES,
    otherwise="The plain layer with your A, B and lora_alpha computes something else than the given one.",
)
def check_fold(draw: Draw):
    """A plain LoRA layer of an AdaLoRA layer with a mask."""
    for count, hint in [
        (None, ""),
        (None, ""),
        (1, "With one triplet left it goes wrong."),
        (0, "With no triplet masked it goes wrong."),
        (-1, "With a kept triplet whose λ is 0 it goes wrong: it stays, the mask decides."),
    ]:
        r, inputs, outputs = draw.integer(5, 9), draw.integer(10, 20), draw.integer(21, 30)
        alpha = draw.choice([a for a in range(2, 40) if a % r])
        layer = AdaLoRALinear(nn.Linear(inputs, outputs), r=r, lora_alpha=alpha)
        for parameter in (layer.A, layer.B, layer.E):
            parameter.data.copy_(draw.normal(*parameter.shape))
        kept = {None: draw.integer(2, r - 2), -1: 3, 0: r}.get(count, count)
        chosen = draw.order(r)[:kept]
        layer.mask.zero_()[chosen] = True
        layer.E.data.masked_fill_(~layer.mask[:, None], 0.0)
        if count == -1:
            layer.E.data[chosen[0]] = 0.0
        yield case(layer.train(draw.choice([True, False])), hint=hint)
