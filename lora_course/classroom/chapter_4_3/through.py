"""Exercise 4.3-b: a gradient straight through."""

import torch

from lora_course.classroom.exercises import Draw, case, exercise


def straight_through(x, scale, top):
    inside = x.clamp(-top * scale, top * scale)
    return inside + ((inside / scale).round() * scale - inside).detach()


def _rounded(x, scale, top):
    return (x / scale).round().clamp(-top, top) * scale


def _through(values=_rounded, slope=lambda x, scale, top: x.abs() <= top * scale):
    """Values of one function of x, the gradient of slope · x."""

    def learner(x, scale, top):
        passed = x * slope(x.detach(), scale, top)
        return passed + (values(x, scale, top) - passed).detach()

    return learner


THROUGH_MISTAKES = {
    "The gradient is zero everywhere, which is round's own: detach what the rounding changes.":
        lambda x, scale, top: _rounded(x, scale, top),
    "What was cut gets a gradient too; a number outside the range stays cut if it moves. Clamp x outside of the detached part.":
        _through(slope=lambda x, scale, top: 1.0),
    "The gradient is 1 up to half a step outside the range, where rounding would cut; the text draws the line at ± top · scale.":
        _through(slope=lambda x, scale, top: (x / scale).round().abs() <= top),
    "The numbers that round to the outermost codes get no gradient, though they are inside the range.":
        _through(slope=lambda x, scale, top: (x / scale).round().abs() < top),
    "The mask is the wrong way round: only what was cut gets a gradient.":
        _through(slope=lambda x, scale, top: x.abs() > top * scale),
    "The range of the gradient is ± top; in units of x it is ± top · scale.": _through(slope=lambda x, scale, top: x.abs() <= top),
    "The range is cut on one side only, for the gradient.": _through(slope=lambda x, scale, top: x <= top * scale),
    "Numbers that round to 0 get no gradient.":
        _through(slope=lambda x, scale, top: ((x / scale).round() != 0) & (x.abs() <= top * scale)),
    "The gradient is that of the codes, 1 / scale.": _through(slope=lambda x, s, top: (x.abs() <= top * s) / s),
    "The gradient is multiplied by the scale.": _through(slope=lambda x, s, top: (x.abs() <= top * s) * s),
    "The values are x, not rounded.": lambda x, scale, top: x * 1,
    "The codes are not cut to −top … top.":
        _through(lambda x, scale, top: (x / scale).round() * scale, lambda x, scale, top: 1.0),
    "The lowest code is −top − 1; it is −top.": _through(lambda x, scale, top: (x / scale).round().clamp(-top - 1, top) * scale),
    "These are the codes: multiply by the scale again.": lambda x, scale, top: straight_through(x, scale, top) / scale,
    "Each number becomes the code below it; the nearest is asked for.":
        _through(lambda x, scale, top: (x / scale).floor().clamp(-top, top) * scale),
    "Each number is cut towards zero; the nearest code is asked for.":
        _through(lambda x, scale, top: (x / scale).trunc().clamp(-top, top) * scale),
}  # fmt: skip


@exercise(
    "4.3-b",
    points=2,
    right=straight_through,
    gradients=("x",),
    mistakes=THROUGH_MISTAKES,
    otherwise="Q(x) is not right, or its gradient is not 1 inside ± top · scale and 0 outside.",
)
def check_straight_through(draw: Draw):
    """Rounding with a gradient of its own. No number is on a line that decides."""
    for scale, top, hint in [
        (draw.number(0.3, 0.6), 3, ""),
        (draw.number(1.5, 4), draw.integer(4, 7), "With another scale and `top` it goes wrong."),
        (draw.number(0.05, 0.2), 1, "With top = 1, the codes of two bits, it goes wrong."),
        (1.0, draw.integer(2, 4), ""),
    ]:
        places = torch.arange(-2 * top - 3, 2 * top + 3).float()
        places = torch.cat(
            [places + draw.number(0.1, 0.4), places + draw.number(0.6, 0.9), torch.zeros(1)]
        )
        x = scale * places[draw.order(len(places))]
        yield case(x, scale, top, hint=hint)
    yield case(
        draw.normal(3, 5) * 3,
        0.7,
        3,
        hint="With x [rows, columns] it goes wrong: any shape may come.",
    )
