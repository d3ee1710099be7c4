"""Exercise 4.1-a: a price for each open gate."""

import math

import torch
from torch.nn import functional as F

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def price_step(
    gate, gradient, learning_rate, price, *, threshold=lambda eta, price: math.sqrt(2 * eta * price)
):
    moved = gate - learning_rate * gradient
    return torch.where(moved.abs() > threshold(learning_rate, price), moved, 0.0)


def _at(threshold):
    return lambda *given: price_step(*given, threshold=threshold)


def _soft(gate, gradient, learning_rate, price):
    return F.softshrink(gate - learning_rate * gradient, learning_rate * price)


PRICE_MISTAKES = {
    "That is the soft threshold, which a price on |g| has. A price on being open takes nothing from a gate that stays open.": _soft,
    "Gates that stay open are not moved towards zero: their price is the same wherever they are.": lambda g, d, lr, price: F.softshrink(
        g - lr * d, math.sqrt(2 * lr * price)),
    "The threshold is not η · price. Compare the two ways: closing costs ½ z², staying open costs η · price.":
        _at(lambda eta, price: eta * price),
    "The 2 is missing: closing costs *half* of z².": _at(lambda eta, price: math.sqrt(eta * price)),
    "The root is missing: |z| is compared, and z² was weighed.": _at(lambda eta, price: 2 * eta * price),
    "The learning rate is missing in the threshold.": _at(lambda eta, price: math.sqrt(2 * price)),
    "The price is missing in the threshold.": _at(lambda eta, price: math.sqrt(2 * eta)),
    "The gradient step is missing: the threshold comes after it.": lambda g, d, lr, price: price_step(g, 0 * d, lr, price),
    "The step goes up the gradient.": lambda g, d, lr, price: price_step(g, -d, lr, price),
    "The threshold came before the gradient step, so the zeros are gone again.":
        lambda g, d, lr, price: price_step(g, 0 * d, lr, price) - lr * d,
    "It is decided by the gate before the step; the moved one decides.": lambda g, d, lr, price: torch.where(
        g.abs() > math.sqrt(2 * lr * price), g - lr * d, 0.0),
    "Negative gates are closed: the size decides, and the sign stays.": lambda g, d, lr, price: torch.where(
        g - lr * d > math.sqrt(2 * lr * price), g - lr * d, 0.0),
    "A closed gate can't open again here; it may, when its gradient moves it far enough.": lambda g, d, lr, price: torch.where(
        g == 0, 0.0, price_step(g, d, lr, price)),
    "It is turned round: the small ones close.": lambda g, d, lr, price: torch.where(
        (g - lr * d).abs() > math.sqrt(2 * lr * price), 0.0, g - lr * d),
}  # fmt: skip


def _use_gates(found, gate, **_):
    """The gates, once the closed ones are exactly zero: an open one is never as small as that here."""
    gates = as_tensor(found)
    mistake(
        gates is None or gates.shape != gate.shape or gates.dtype == torch.bool,
        "A tensor of numbers is expected, of the gates' shape {}.",
        list(gate.shape),
    )
    mistake(
        bool(((gates != 0) & (gates.abs() < 1e-3)).any()),
        "The closed gates are nearly zero, not zero: only an exact zero can be pruned.",
    )
    return found


@exercise(
    "4.1-a",
    right=price_step,
    look=_use_gates,
    mistakes=PRICE_MISTAKES,
    fresh=True,
    otherwise="These are not the gates for which ½ (u − z)² + η · price · [u ≠ 0] is least.",
)
def check_price_step(draw: Draw):
    """The proximal step of a price for each open gate."""
    sizes = torch.tensor([0.1, 0.35, 0.6, 0.65, 0.8, 0.95, 1.05, 1.3, 1.42, 1.6, 2.2, 3.5])
    for shape, price, hint in [
        ((12,), draw.number(0.5, 2), ""),
        ((12,), draw.number(2, 5), ""),
        ((2, 12), draw.number(0.3, 1), "With gates of several layers, [layers, r], it goes wrong."),
        ((12,), 0.0, "With a price of 0 it goes wrong: nothing closes then."),
    ]:
        rate = draw.number(0.05, 0.3)
        z = sizes[draw.order(12)].expand(shape) * math.sqrt(2 * rate * max(price, 0.2))
        z = z * (torch.randint(0, 2, shape, generator=draw.generator) * 2 - 1)
        gradient = draw.normal(*shape)
        gradient[..., :3] = -z[..., :3] / rate  # these gates are closed
        if shape == (12,):
            gradient[3] = z[3].sign() * -3 * z[3].abs() / rate  # and this one crosses zero
        yield case(z + rate * gradient, gradient, rate, price, hint=hint)
    yield case(
        torch.zeros(4), torch.zeros(4), 0.1, 1.0, hint="Where all gates are zero it goes wrong."
    )
