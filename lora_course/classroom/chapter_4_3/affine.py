"""Exercise 4.3-a: an unsymmetric grid."""

import torch

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def affine(x, bits, *, top=None, low=None, high=None, zero=torch.round, codes=None, tiny=1e-30):
    """Codes, scale and zero of an unsymmetric grid, with each of its parts exchangeable for a mistake."""
    top = 2**bits - 1 if top is None else top(bits)
    low = x.min().clamp(max=0) if low is None else low(x)
    high = x.max().clamp(min=0) if high is None else high(x)
    scale = ((high - low) / top).clamp(min=tiny)
    zero = zero(-low / scale)
    if codes:
        return codes(x, scale, zero, low), scale, zero
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1), scale, zero


def _affine(**other):
    return lambda x, bits: affine(x, bits, **other)


def _use_codes(found, x, bits):
    """Codes, scale and zero; what is read back where any scale will do, and where an end is as near to one code as to another."""
    mistake(
        not isinstance(found, (tuple, list)) or len(found) != 3,
        "Three things are expected: codes, scale, zero.",
    )
    codes, scale, zero = (as_tensor(part) for part in found)
    mistake(
        codes is None or codes.shape != x.shape,
        "Codes of x's shape are expected, {}.",
        list(x.shape),
    )
    mistake(
        scale is None or zero is None or scale.numel() != 1 or zero.numel() != 1,
        "One scale and one zero are expected for the whole tensor.",
    )
    codes, scale, zero = codes.double(), scale.double().reshape(()), zero.double().reshape(())
    mistake(
        bool(codes.isnan().any() or zero.isnan() or scale.isnan()),
        "There is a NaN in it: 0/0, where all of x is zero?",
    )
    mistake(not 0 < scale < torch.inf, "The scale must be positive, and finite.")
    mistake(
        bool(zero != zero.round()),
        "`zero` is no whole number: no code is read back as 0 then, and zeros of the factor become others.",
    )
    mistake(
        bool((codes != codes.round()).any()),
        "The codes are no whole numbers: divide by the scale, then round.",
    )
    mistake(
        bool((codes < 0).any() or (codes > 2**bits - 1).any()),
        "With {} bits the codes run from 0 to {}; yours run from {} to {}.",
        bits, 2**bits - 1, int(codes.min()), int(codes.max()),
    )  # fmt: skip
    if not x.any():
        return {"x as it is read back": scale * (codes - zero)}
    if x.max() == -x.min():
        back = scale * (codes - zero)
        either = (x.abs() == x.max()) & ((back - x).abs() < 0.6 * scale)
        return {"scale": scale.float(), "x as it is read back": torch.where(either, x, back)}
    return {"codes": codes, "scale": scale.float(), "zero": zero}


AFFINE_MISTAKES = {
    "The scale is the range divided by 2^bits; from the first code to the last there are 2^bits − 1 steps.":
        lambda x, bits: affine(
            x, bits, top=lambda bits: 2**bits, codes=lambda x, s, z, low: ((x / s).round() + z).clamp(0, 2**bits - 1)),
    "Your codes are rounded down; each is the nearest.":
        lambda x, bits: affine(x, bits, codes=lambda x, s, z, low: ((x / s).floor() + z).clamp(0, 2**bits - 1)),
    "Your codes are cut towards zero; each is the nearest.": _affine(codes=lambda x, s, z, low: (x / s).trunc() + z),
    "Your grid reaches from the smallest number to the largest; where these have one sign, 0 is outside.":
        _affine(low=lambda x: x.min(), high=lambda x: x.max(), zero=lambda z: z.round().clamp(min=0)),
    "The codes are counted from the smallest number, so that 0 falls between two of them: round x / scale, then add `zero`.":
        _affine(codes=lambda x, s, z, low: ((x - low) / s).round()),
    "`zero` has the wrong sign: x is scale · (code − zero).":
        lambda x, bits: (lambda codes, s, z: (codes, s, -z))(*affine(x, bits)),
    "`zero` is a whole number, and you return the value of the smallest code.":
        lambda x, bits: (lambda codes, s, z: (codes, s, (-z * s).round()))(*affine(x, bits)),
    "`bits` is not used.": lambda x, bits: affine(x, 2),
}  # fmt: skip


@exercise(
    "4.3-a",
    right=affine,
    look=_use_codes,
    mistakes=AFFINE_MISTAKES,
    otherwise="Codes, scale or zero are not those that the text describes.",
)
def check_affine(draw: Draw):
    """An unsymmetric grid that holds zero. No number is near the middle between two codes, but for the ends of one tensor."""
    for bits, kind, hint in [
        (4, "both", ""),
        (3, "both", "With 3 bits it goes wrong: use the argument."),
        (8, "both", ""),
        (4, "positive", "Where no number is negative it goes wrong: the grid has to hold 0."),
        (4, "negative", "Where no number is positive it goes wrong: the grid has to hold 0."),
        (2, "both", "With 2 bits it goes wrong."),
        (4, "zero", "Where all of x is zero it goes wrong: it must be read back as zeros."),
    ]:
        top, scale = 2**bits - 1, draw.number(0.1, 3)
        zero = {"positive": 0, "negative": top}.get(kind, draw.integer(1, top - 1))
        off = (
            0.0
            if kind in ("positive", "negative")
            else draw.choice([-1, 1]) * draw.number(0.1, 0.35)
        )
        shape = draw.choice([(24,), (4, 6), (2, 3, 4)])
        inside = torch.tensor([draw.integer(1, top - 1) - zero for _ in range(24)])
        x = inside + 0.45 * draw.uniform(24, low=-1)
        x[:3] = torch.tensor([-zero - off, top - zero - off, 0.0])
        if kind in ("positive", "negative"):  # the end at 0 is of the grid, and not of x
            x[[2, int(kind == "negative")]] = float(x[3])
        yield case(
            (0 if kind == "zero" else scale) * x[draw.order(24)].reshape(shape), bits, hint=hint
        )
    inside = torch.tensor([draw.integer(-6, 6) for _ in range(24)])
    x = 0.2 * (inside + 0.45 * draw.uniform(24, low=-1))
    x[:2] = torch.tensor([-1.5, 1.5])  # 7.5 steps of 0.2: both round away from 0
    hint = "Where high is −low it goes wrong: which is the largest code?"
    yield case(draw.choice([1, 2, 4]) * x[draw.order(24)], 4, hint=hint)
