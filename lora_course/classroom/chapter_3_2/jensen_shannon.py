"""Exercise 3.2-b: a divergence that looks both ways."""

import math

import torch
from torch.nn import functional as F

from lora_course.classroom.exercises import Draw, case, exercise


def _both(p, q, beta):
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)


def _mean(tokens, keep):
    """Over the tokens that count."""
    return tokens.sum(-1)[keep].sum() / keep.sum()


def jsd_loss(student_logits, teacher_logits, labels, beta, T, *, shift=True, mask=None, soft=None,
             factor=lambda T: T**2, divergence=_both, mean=_mean):  # fmt: skip
    """T² times the generalised Jensen–Shannon divergence, with each part exchangeable for a mistake."""
    z, t, y = student_logits, teacher_logits, labels
    if shift:
        z, t, y = z[:, :-1], t[:, :-1], y[:, 1:]
    keep = y != -100 if mask is None else mask(labels)
    T_soft = T if soft is None else soft
    p, q = F.log_softmax(t / T_soft, -1), F.log_softmax(z / T_soft, -1)
    return factor(T) * mean(divergence(p, q, beta), keep)


def _loss(**other):
    return lambda *given: jsd_loss(*given, **other)


def _one_side(p, q, beta):
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return p.exp() * (p - m)


def _from_the_middle(p, q, beta):
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * m.exp() * (m - p) + (1 - beta) * m.exp() * (m - q)


def _geometric(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)


def _without_middle(p, q, beta):
    return beta * p.exp() * (p - q) + (1 - beta) * q.exp() * (q - p)


def _rows(tokens, keep):
    counts = keep.sum(1)
    each = (tokens.sum(-1) * keep).sum(1) / counts.clamp(min=1)
    return each[counts > 0].mean()


LOSS_MISTAKES = {
    "T² is missing.": _loss(factor=lambda T: 1),
    "You multiply by T; the gradient shrinks with its square.": _loss(factor=lambda T: T),
    "Nothing is shifted: the logits at position t are for the label at t + 1.": _loss(shift=False),
    "Positions without a label count too: leave out where the next label is −100.":
        _loss(mask=lambda labels: torch.ones_like(labels[:, 1:], dtype=torch.bool)),
    "A position counts by its own label; the label of the next one decides.": _loss(mask=lambda labels: labels[:, :-1] != -100),
    "Label 0 is a token like others; only −100 does not count.": _loss(mask=lambda labels: labels[:, 1:] > 0),
    "β and 1 − β are exchanged: β is the teacher's share.": lambda s, t, y, beta, T: jsd_loss(s, t, y, 1 - beta, T),
    "β is not used: the middle lies half way.": lambda s, t, y, beta, T: jsd_loss(s, t, y, 0.5, T),
    "The temperature is not used in the distributions.": _loss(soft=1.0),
    "This is KL(p ‖ q): both distributions are compared with the middle.": _loss(divergence=lambda p, q, b: p.exp() * (p - q)),
    "This is KL(q ‖ p): both distributions are compared with the middle.": _loss(divergence=lambda p, q, b: q.exp() * (q - p)),
    "Only the teacher is compared with the middle; the student is too.": _loss(divergence=_one_side),
    "The divergences go from the middle to p and q: KL(p ‖ m) and KL(q ‖ m) are asked for.": _loss(divergence=_from_the_middle),
    "The middle averages logarithms: average probabilities, m = β p + (1 − β) q.": _loss(divergence=_geometric),
    "p and q are compared with each other, not with the middle.": _loss(divergence=_without_middle),
    "You divide by the number of rows, as batchmean does: it then grows with the length of the text.":
        _loss(mean=lambda each, keep: each.sum(-1)[keep].sum() / len(keep)),
    "You divide by the vocabulary too: sum over it, then take the mean over tokens.": _loss(mean=lambda each, keep: each[keep].mean()),
    "The sum leaves out what has no label, but you divide by all positions.":
        _loss(mean=lambda each, keep: each.sum(-1)[keep].sum() / keep.numel()),
    "This is a mean of the rows' means: all tokens that count weigh the same.": _loss(mean=_rows),
    "This is a sum over tokens; their mean is asked for.": _loss(mean=lambda each, keep: each.sum(-1)[keep].sum()),
}  # fmt: skip


@exercise(
    "3.2-b",
    points=2,
    right=jsd_loss,
    gradients=("student_logits",),
    mistakes=LOSS_MISTAKES,
    otherwise="This is not T² times β KL(p ‖ m) + (1 − β) KL(q ‖ m), averaged over the tokens that count, or its gradient is not.",
)
def check_jsd_loss(draw: Draw):
    """The generalised Jensen–Shannon divergence of a causal model."""
    for kind, hint in [
        ("all", ""),
        ("some", "Where labels are −100 it goes wrong."),
        ("some", "Where labels are −100 it goes wrong."),
        ("row", "Where a row has no label at all it goes wrong."),
        ("one", "Where a single token counts it goes wrong."),
        ("far", "With logits that are far apart it goes wrong: stay in logarithms, probabilities underflow."),
    ]:  # fmt: skip
        B, length, words = draw.sizes(3, 3, 9)
        labels = torch.randint(0, words, (B, length), generator=draw.generator)
        labels[0, -1] = 0
        if kind in ("some", "far"):
            for row in range(B):  # rows keep different numbers of tokens, from either side
                labels[row, : row % (length - 1)] = -100
            labels[1, -1] = -100
        elif kind == "row":
            labels[1] = -100
        elif kind == "one":
            labels[:] = -100
            labels[1, draw.integer(1, length - 1)] = draw.integer(1, words - 1)
        size = 300 if kind == "far" else draw.number(1, 2.5)
        beta = draw.choice([0.1, 0.2, 0.3, 0.7, 0.9])
        student, teacher = (draw.normal(B, length, words) * size for _ in "st")
        T = draw.choice([0.7, 1.5, 3.0, 4.0])
        yield case(student, teacher, labels, beta, T, hint=hint)
