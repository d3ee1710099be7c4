"""Graded problems of chapter 4.3, quantised adapters: another grid, and a straight-through gradient to mend."""

import torch

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _grid_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [(draw.normal(2, 3), 3), (torch.tensor([[0.5, -1.25, 3.0], [0.75, 0.25, -0.5]]), 3)]
    for bits in (2, 3, 4):
        rows, columns = draw.sizes(2, 3, 8)
        made.append((draw.normal(rows, columns) * 10 ** (draw.uniform(rows, 1) * 2 - 1), bits))
        # on the grid's halves: the largest entry of each row and column is a power of two times 2^(bits - 1) - 1
        top = 2 ** (bits - 1) - 1
        factor = 0.75 if choice["power"] == "three quarters" else 1.0
        exact = torch.randint(-2 * top, 2 * top + 1, (6, 6), generator=draw.generator) / 2 * factor
        exact += torch.eye(6) * (top - exact)
        made.append((exact, bits))
    zeros = draw.normal(3, 4)
    zeros[1], zeros[:, 2] = 0, 0
    # of the largest magnitude is a negative entry, in each row and column
    negative = draw.normal(5, 5) - 4 * torch.eye(5)
    return [*made, (zeros, 3), (negative, 4), (torch.zeros(2, 3), 3)]


grid = Family(
    id="4.3-grid",
    title="Another grid",
    points=4,
    minutes=25,
    statement="""
    Quantise `x` to `bits` bits and return what is read back, $scale \\cdot code$. Let $q = 2^{bits-1} - 1$. {scale} The scale is the
    largest magnitude divided by $q${power} {codes} {rounding} Where all is zero, zeros are read back.
    """,
    answer='''
    def read_back(x, bits):
        """x [out, in], bits ≥ 2 → x [out, in] as it is read back"""
        q = 2 ** (bits - 1) - 1
        largest = $scale
        scale = $power
        scaled = x / torch.where(scale == 0, torch.ones_like(scale), scale)
        code = $rounding
        return code.clamp($codes, q) * scale
    ''',
    conventions={
        "scale": {
            "tensor": ("There is one scale.", "x.abs().max()"),
            "row": ("Each row has its own scale.", "x.abs().amax(1, keepdim=True)"),
            "column": ("Each column has its own scale.", "x.abs().amax(0, keepdim=True)"),
        },
        "power": {
            "exact": (".", "largest / q"),
            "up": (
                ", rounded up to a power of two (one that is a power of two stays).",
                "torch.where(largest == 0, largest, 2 ** (largest / q).clamp(min=1e-30).log2().ceil())",
            ),
            "three quarters": (
                ", times 3/4, so that the largest values are cut.",
                "largest / q * 0.75",
            ),
        },
        "codes": {
            "symmetric": ("Codes run from $-q$ to $q$: what is outside is cut to the end.", "-q"),
            "positive": ("Codes run from 0 to $q$: what is outside is cut to the end.", "0"),
            "less": ("Codes run from $-q + 1$ to $q$: what is outside is cut to the end.", "-q + 1"),
        },
        "rounding": {
            "even": ("A quotient becomes the nearest code, a half the even one.", "scaled.round()"),
            "lower": (
                "A quotient becomes the nearest code, a half the lower one.",
                "(scaled - 0.5).ceil()",
            ),
            "up": ("A quotient becomes the nearest code, a half the upper one.", "(scaled + 0.5).floor()"),
            "zero": ("A quotient is cut towards zero.", "scaled.trunc()"),
        },
    },
    book={"scale": ("tensor", "row"), "power": ("exact", "three quarters"), "codes": "symmetric", "rounding": "even"},
    cases=_grid_cases,
)  # fmt: skip


def _through_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [(torch.tensor([0.25, -1.0, 2.75]), 0.5, 3), (torch.tensor([1.0, -0.25, -4.0]), 1.0, 2)]
    for _ in range(4):
        top, scale = draw.integer(2, 5), draw.choice([0.25, 0.5, 2.0])
        # everywhere between the lines that decide, never on one
        places = torch.arange(-(top + 2), top + 2).float() + 0.15 + 0.2 * draw.uniform(1)
        made.append((torch.cat([places, places + 0.5]) * scale, scale, top))
    return made


through = Family(
    id="4.3-through",
    title="Find the bug: a gradient straight through",
    points=4,
    minutes=25,
    statement="""
    The function below was meant to round in the forward pass and let the gradient through, and weights run away. It has two
    mistakes. Mend it; keep its name and arguments. It shall do this. Let $u$ be `x` divided by `scale`. {grid} The gradient in `x` is 1 where {zone} and {outside}
    elsewhere.
    """,
    answer='''
    def through(x, scale, top):
        """x [n], two numbers → its rounded values [n], with a gradient"""
        u = x / scale
        value = scale * ($grid)
        inside = ($zone).to(x.dtype)
        slope = inside + (1 - inside) * $outside
        passed = slope.detach() * x
        return passed + (value - passed).detach()
    ''',
    conventions={
        "grid": {
            "tread": ("The value is $scale \\cdot \\mathrm{round}(u)$, cut to $\\pm\\, top \\cdot scale$.", "u.round().clamp(-top, top)"),
            "rise": (
                "The value is $scale \\cdot (\\lfloor u \\rfloor + 1/2)$, cut to $\\pm\\,(top - 1/2) \\cdot scale$.",
                "(u.floor() + 0.5).clamp(0.5 - top, top - 0.5)",
            ),
            "floor": ("The value is $scale \\cdot \\lfloor u \\rfloor$, cut to $\\pm\\, top \\cdot scale$.", "u.floor().clamp(-top, top)"),
        },
        "zone": {
            "end": ("$|u| < top$", "u.abs() < top"),
            "half": ("$|u| < top + 1/2$", "u.abs() < top + 0.5"),
            "one": ("$|u| < top - 1$", "u.abs() < top - 1"),
            "below": ("$u < top$ (so on the negative side everywhere)", "u < top"),
        },
        "outside": {
            "zero": ("0", "0.0"),
            "quarter": ("1/4", "0.25"),
        },
    },
    book={"grid": "tread", "zone": "end", "outside": "zero"},
    cases=_through_cases,
    gradients=("x",),
    bugs=(
        ("(value - passed).detach()", "(value - passed)"),
        ("slope = inside", "slope = 1 - inside"),
        ("u = x / scale", "u = x * scale"),
        ("slope.detach() * x", "slope.detach() * u"),
    ),
)  # fmt: skip

FAMILIES = [grid, through]
