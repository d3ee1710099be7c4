"""Exercise 2.1-a: gates that share the rest."""

import torch
from torch import Tensor

from lora_course.classroom.exercises import Draw, case, exercise


def is_kept(p: Tensor, k: int) -> Tensor:
    """Which are the k largest of the last dimension, bool."""
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(k).indices, True)


def spread_rest(logits, k):
    p = logits.softmax(-1)
    kept = p * is_kept(p, k)
    return kept + is_kept(p, k) * (1 - kept.sum(-1, keepdim=True)) / k


def _gates(make):
    """Gates of probabilities and of what is kept of them."""
    return lambda logits, k: make(logits.softmax(-1), is_kept(logits, k), k)


GATE_MISTAKES = {
    "All experts still have a gate: only the k largest may.": _gates(lambda p, kept, k: p * 1),
    "The gates don't sum to one: the probability of the experts that are not chosen is lost.":
        _gates(lambda p, kept, k: p * kept),
    "The kept probabilities are divided by their sum; here what is left over is shared *equally* by the chosen.":
        _gates(lambda p, kept, k: p * kept / (p * kept).sum(-1, keepdim=True)),
    "The chosen experts all have the same gate: each keeps its probability, and gets an equal part of the rest.":
        _gates(lambda p, kept, k: 0 * p + kept / k),
    "What is left over is shared by all experts; only the chosen get a part.":
        _gates(lambda p, kept, k: p * kept + (1 - (p * kept).sum(-1, keepdim=True)) / p.shape[-1]),
    "Each chosen expert gets all that is left over, not its k-th part.":
        _gates(lambda p, kept, k: kept * (p + 1 - (p * kept).sum(-1, keepdim=True))),
    "All that is left over goes to the largest; it is shared by the chosen.":
        _gates(lambda p, kept, k: p * kept + is_kept(p, 1) * (1 - (p * kept).sum(-1, keepdim=True))),
    "`k` is not used.": lambda logits, k: spread_rest(logits, 2),
}  # fmt: skip


@exercise(
    "2.1-a",
    right=spread_rest,
    gradients=("logits",),
    mistakes=GATE_MISTAKES,
    otherwise="The gates are not the k largest probabilities, each with an equal part of what the others had.",
)
def check_spread_rest(draw: Draw):
    """Top-k gates, the rest shared by the chosen. No two logits of a token are nearly equal."""

    def logits(*shape):
        steps = torch.stack(
            [draw.order(shape[-1]) for _ in range(max(1, torch.Size(shape[:-1]).numel()))]
        )
        return (steps.reshape(shape) * 0.4 + 0.2 * draw.uniform(*shape)).sub(1.0)

    B, T, E = draw.sizes(3, 3, 8)
    yield case(logits(B, T, E), 2)
    yield case(logits(B, T, E), 3, hint="With k = 3 it goes wrong: use the argument.")
    yield case(
        logits(T, E),
        1,
        hint="With k = 1 it goes wrong, or with logits [T, E]: any shape [..., E] may come.",
    )
    yield case(
        logits(E),
        2,
        hint="With the logits [E] of one token it goes wrong: any shape [..., E] may come.",
    )
    yield case(logits(B, T, E), E, hint="With as many chosen as there are experts it goes wrong.")
    yield case(
        100 + 3 * logits(T, B, E),
        2,
        hint="With large logits it goes wrong: exp() of them overflows.",
    )
    heights = 120.0 * (draw.order(B * T) % 2).reshape(B, T, 1)
    hint = (
        "Where the tokens' logits lie far apart it goes wrong: each token has a softmax of its own."
    )
    yield case(logits(B, T, E) - heights, 2, hint=hint)
