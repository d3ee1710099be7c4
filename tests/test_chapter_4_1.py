"""The exercises of chapter 4.1: plausible wrong answers are rejected, each with its own message; right ones pass."""

import math

import torch
import torch.nn.functional as F

from lora_course.classroom.chapter_4_1 import (
    check_density,
    check_gradients,
    check_plain,
    check_proximal_step,
)
from lora_course.sparse import scatter
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def soft(x, threshold):
    return x.sign() * (x.abs() - threshold).clamp(min=0)


def three_lines(gate, gradient, learning_rate, penalty):
    x, t = gate - learning_rate * gradient, learning_rate * penalty
    x[x > t] -= t
    x[x < -t] += t
    x[x.abs() < t] = 0
    return x


def in_place(gate, gradient, learning_rate, penalty):
    return gate.copy_(soft(gate - learning_rate * gradient, learning_rate * penalty))


def gradients(x, values, indices, shape, gradient):
    full = gradient.reshape(-1, shape[0]).T @ x.reshape(-1, shape[1])
    return gradient @ scatter(values, indices, shape), full.flatten()[indices]


def by_autograd(x, values, indices, shape, gradient):
    """Another way: let torch do it."""
    x, values = x.clone().requires_grad_(), values.clone().requires_grad_()
    S = torch.zeros(shape[0] * shape[1]).index_put((indices,), values).view(shape)
    return torch.autograd.grad(F.linear(x, S), (x, values), gradient)


def changed(f):
    """The right answer with one part replaced."""
    return lambda x, v, i, s, g: f(*gradients(x, v, i, s, g), x, v, i, s, g)


def plain(layer):
    A, B, scaling = layer.factors()
    keep = (A != 0).any(1)
    return A[keep], B[:, keep], scaling * int(keep.sum())


def without_gates(layer):
    if not hasattr(layer, "gate"):
        return plain(layer)
    keep = layer.gate != 0
    return layer.A[keep], layer.B[:, keep], layer.scaling * int(keep.sum())


def touches(layer):
    answer = tuple(t.clone() if torch.is_tensor(t) else t for t in plain(layer))
    next(p for p in layer.parameters() if p.requires_grad).data.mul_(2)
    return answer


def split(layer):
    """Another way: half of the scale in each factor, and an alpha of the rank."""
    A, B, alpha = plain(layer)
    root = math.sqrt(layer.scaling)
    return root * A, root * B, len(A)


WRONG = {
    check_proximal_step: [
        lambda g, d, lr, p: soft(g, lr * p),
        lambda g, d, lr, p: soft(g - lr * d, p),
        lambda g, d, lr, p: F.hardshrink(g - lr * d, lr * p),
        lambda g, d, lr, p: (g - lr * d) - lr * p * (g - lr * d).sign(),
        lambda g, d, lr, p: (g - lr * d - lr * p).clamp(min=0),
        three_lines,
        lambda g, d, lr, p: soft(g, lr * p) - lr * d,
        lambda g, d, lr, p: soft(g - d, lr * p),
        in_place,
        lambda g, d, lr, p: soft(g - lr * d, lr * p) + 1e-7,
    ],
    check_density: [
        lambda r, a, b: (1 - a) * (1 - b),
        lambda r, a, b: min(1, r * (1 - a) * (1 - b)),
        lambda r, a, b: 1 - (a * b) ** r,
        lambda r, a, b: (1 - (1 - a) * (1 - b)) ** r,
        lambda r, a, b: 1 - a**r,
        lambda r, a, b: 1.0,
        lambda r, a, b: torch.tensor(1 - (1 - (1 - a) * (1 - b)) ** r),
    ],
    check_gradients: [
        changed(lambda gx, gv, x, v, i, s, g: gx),
        changed(lambda gx, gv, x, v, i, s, g: (gx, g.reshape(-1, s[0]).T @ x.reshape(-1, s[1]))),
        changed(lambda gx, gv, x, v, i, s, g: (gx.reshape(-1, s[1]), gv)),
        changed(lambda gx, gv, x, v, i, s, g: (gx, gv[None])),
        changed(lambda gx, gv, x, v, i, s, g: (gx, (x.reshape(-1, s[1]).T @ g.reshape(-1, s[0])).flatten()[i])),
        changed(lambda gx, gv, x, v, i, s, g: (gx, gv / 6)),
        changed(lambda gx, gv, x, v, i, s, g: (gx, (g[-1].T @ x[-1]).flatten()[i])),
        changed(lambda gx, gv, x, v, i, s, g: (gx, gv * v)),
        changed(lambda gx, gv, x, v, i, s, g: (2 * gx, gv)),
    ],
    check_plain: [
        lambda layer: (layer.factors()[0], layer.B if hasattr(layer, "B") else layer.matrix("B"), layer.lora_alpha),
        without_gates,
        lambda layer: (*plain(layer)[:2], layer.lora_alpha),
        lambda layer: (*plain(layer)[:2], layer.scaling),
        lambda layer: (plain(layer)[0].T, plain(layer)[1].T, plain(layer)[2]),
        lambda layer: plain(layer) if hasattr(layer, "gate") else (layer.matrix("A"), layer.matrix("B"), layer.scaling),
        touches,
        lambda layer: (*plain(layer)[:2], 2 * plain(layer)[2] if not hasattr(layer, "gate") else 10 * plain(layer)[2]),
    ],
}  # fmt: skip
RIGHT = {
    check_proximal_step: [
        lambda g, d, lr, p: soft(g - lr * d, lr * p),
        lambda g, d, lr, p: F.softshrink(g - lr * d, lr * p),
        lambda g, d, lr, p: (g - lr * d) - (g - lr * d).clamp(-lr * p, lr * p),
    ],
    check_density: [
        lambda r, a, b: 1 - (1 - (1 - a) * (1 - b)) ** r,
        lambda r, a, b: 1 - math.exp(r * math.log(a + b - a * b)) if a + b - a * b > 0 else 1.0,
    ],
    check_gradients: [gradients, by_autograd],
    check_plain: [plain, split],
}
