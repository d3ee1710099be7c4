"""Exercise 4.4-a: the backward pass of a gated adapter, by hand."""

import torch

from lora_course.classroom.exercises import Draw, case, exercise


def gated_backward(g, x, W, A, B, gates, scaling):
    """Gradients of x, A, B and gates, for y = x Wᵀ + scaling · ((x Aᵀ) ∘ gates) Bᵀ."""
    into, h = scaling * (g @ B), x @ A.T
    return (
        g @ W + (into * gates) @ A,
        (into * gates).T @ x,
        scaling * g.T @ (h * gates),
        (into * h).sum(0),
    )


def _but(**other):
    """The right gradients, some of them exchanged for what somebody might write."""

    def gradients(g, x, W, A, B, gates, scaling):
        found = dict(
            zip(
                ("x", "A", "B", "gates"), gated_backward(g, x, W, A, B, gates, scaling), strict=True
            )
        )
        for name, make in other.items():
            found[name] = make(g, x, W, A, B, gates, scaling)
        return tuple(found.values())

    return gradients  # fmt: skip


BACKWARD_MISTAKES = {
    "∂L/∂x has the base's part only; x reaches y through A and B as well.":
        _but(x=lambda g, x, W, A, B, c, s: g @ W),
    "∂L/∂x has the update's part only. The base is frozen, which means no gradient of W, not no gradient through it.":
        _but(x=lambda g, x, W, A, B, c, s: s * (g @ B * c) @ A),
    "The scale is missing in ∂L/∂x: the update's part is multiplied by it.":
        _but(x=lambda g, x, W, A, B, c, s: g @ W + (g @ B * c) @ A),
    "The gates are missing in ∂L/∂x: they stand between A and B.":
        _but(x=lambda g, x, W, A, B, c, s: g @ W + s * (g @ B) @ A),
    "The scale is missing in ∂L/∂A.": _but(A=lambda g, x, W, A, B, c, s: (g @ B * c).T @ x),
    "The gates are missing in ∂L/∂A: what comes back to A went through them.":
        _but(A=lambda g, x, W, A, B, c, s: s * (g @ B).T @ x),
    "The scale is missing in ∂L/∂B.": _but(B=lambda g, x, W, A, B, c, s: g.T @ (x @ A.T * c)),
    "The gates are missing in ∂L/∂B: what enters B went through them.":
        _but(B=lambda g, x, W, A, B, c, s: s * g.T @ (x @ A.T)),
    "The scale is missing in the gradient of the gates.":
        _but(gates=lambda g, x, W, A, B, c, s: (g @ B * (x @ A.T)).sum(0)),
    "The gates multiply their own gradient, so that a closed one would never open: ∂y/∂gate is without the gate.":
        _but(gates=lambda g, x, W, A, B, c, s: s * (g @ B * c * (x @ A.T)).sum(0)),
    "The gradient of the gates is averaged over rows; each row adds to it.":
        _but(gates=lambda g, x, W, A, B, c, s: s * (g @ B * (x @ A.T)).mean(0)),
    "The scale is missing everywhere.": lambda g, x, W, A, B, c, s: gated_backward(g, x, W, A, B, c, 1.0),
    "The gates are missing in the gradients of x, A and B: this is plain LoRA's backward pass.":
        _but(x=lambda g, x, W, A, B, c, s: g @ W + s * (g @ B) @ A, A=lambda g, x, W, A, B, c, s: s * (g @ B).T @ x,
             B=lambda g, x, W, A, B, c, s: s * g.T @ (x @ A.T)),
}  # fmt: skip


@exercise(
    "4.4-a",
    points=2,
    right=gated_backward,
    mistakes=BACKWARD_MISTAKES,
    otherwise="One of the four is not what autograd computes.",
)
def check_gated_backward(draw: Draw):
    """Four gradients, without a matrix of the size of W."""
    for kind, hint in [
        ("plain", ""),
        ("plain", ""),
        ("closed", "With a gate that is 0 it goes wrong: its rank gets no gradient, and the gate does."),
        ("row", "With a single row it goes wrong."),
        ("rank", "With rank 1 it goes wrong."),
    ]:  # fmt: skip
        inputs, outputs = draw.sizes(2, 70, 90)
        rows, r = draw.sizes(2, 3, 7)
        rows, r = (1 if kind == "row" else rows), (1 if kind == "rank" else r)
        gates = draw.uniform(r, low=0.3, high=2) * torch.tensor(
            [draw.choice([-1, 1]) for _ in range(r)]
        )
        if kind == "closed":
            gates[draw.integer(0, r - 1)] = 0
        tensors = [(rows, outputs), (rows, inputs), (outputs, inputs), (r, inputs), (outputs, r)]
        g, x, W, A, B = (draw.normal(*shape) for shape in tensors)
        largest = inputs * outputs - 1  # anything smaller than W
        yield case(g, x, W, A, B, gates, draw.number(1.5, 4), hint=hint, largest=largest)
