"""Exercise 4.1-c: which text pulls how hard."""

import torch

from lora_course.classroom.exercises import Draw, case, exercise


def _entries(x, gradient, indices, places=None):
    """What each token adds to the gradient of each value: `[B, T, nnz]`."""
    rows, columns = (
        (indices // x.shape[-1], indices % x.shape[-1]) if places is None else places(x, gradient)
    )
    return gradient[..., rows] * x[..., columns]


def _norms(make, places=None):
    return lambda x, gradient, indices: make(
        _entries(x, gradient, indices, places and places(indices))
    )


text_norms = _norms(lambda each: each.sum(1).norm(dim=-1))


def _other_way(indices):
    """Places counted column by column."""
    return lambda x, gradient: (indices % gradient.shape[-1], indices // gradient.shape[-1])


NORM_MISTAKES = {
    "You take the norm of each token and add: a text's gradient is the sum over its tokens, and its norm comes after it.":
        _norms(lambda each: each.norm(dim=-1).sum(1)),
    "The squares of all tokens are added; add the tokens' gradients first.": _norms(lambda each: each.square().sum((1, 2)).sqrt()),
    "These are squared norms: take the root.": _norms(lambda each: each.sum(1).square().sum(-1)),
    "This is the sum of magnitudes; the root of the sum of squares is asked for.": _norms(lambda each: each.sum(1).abs().sum(-1)),
    "This is a mean over tokens: the gradient has the loss's own mean in it already.": _norms(lambda each: each.mean(1).norm(dim=-1)),
    "This is the root of a mean over places; their sum is asked for.":
        _norms(lambda each: each.sum(1).square().mean(-1).sqrt()),
    "This is one norm, of all texts together; each has its own.": _norms(lambda each: each.sum((0, 1)).norm().expand(len(each))),
    "Place k is entry (k // in, k % in): i is the row of S, and so the output.": _norms(
        lambda each: each.sum(1).norm(dim=-1), _other_way),
    "All entries count; only those at the places are trained.": lambda x, gradient, indices: torch.linalg.matrix_norm(gradient.mT @ x),
    "This is the norm of ∂L/∂y; the gradient of the values has x in it.": lambda x, gradient, indices: (
        gradient[..., indices // x.shape[-1]].sum(1).norm(dim=-1)),
}  # fmt: skip


@exercise(
    "4.1-c",
    points=2,
    right=text_norms,
    mistakes=NORM_MISTAKES,
    otherwise="These are not the norms of the texts' gradients for the values.",
)
def check_text_norms(draw: Draw):
    """The norm of each text's gradient for the values of a sparse update."""
    for kind, hint in [
        ("", ""),
        ("", ""),
        ("one token", "With texts of one token it goes wrong."),
        ("one text", "With a single text it goes wrong: [1]."),
        ("one place", "With a single place it goes wrong."),
        ("wide", "Where there are more inputs than outputs it goes wrong, or the other way round."),
    ]:
        B, T = draw.sizes(2, 2, 5)
        B, T = {"one token": (B, 1), "one text": (1, T)}.get(kind, (B, T))
        inputs, outputs = sorted(draw.sizes(2, 40, 60), reverse=kind == "wide")
        count = 1 if kind == "one place" else draw.integer(6, 12)
        indices = draw.order(inputs * outputs)[:count]
        yield case(
            draw.normal(B, T, inputs),
            draw.normal(B, T, outputs),
            indices,
            hint=hint,
            largest=inputs * outputs - 1,
        )
