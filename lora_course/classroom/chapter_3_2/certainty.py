"""Exercise 3.2-a: who is sure counts more."""

import math

import torch
from torch.nn import functional as F

from lora_course.classroom.exercises import Draw, case, exercise


def mix_by_certainty(
    teacher_logits, T, *, entropy_of=None, weigh=None, together=None, soften=lambda z, T: z / T
):
    """log p̄, with each part exchangeable for a mistake."""
    each = torch.stack([F.log_softmax(soften(z, T), -1) for z in teacher_logits])
    known = each if entropy_of is None else entropy_of(teacher_logits, each)
    entropy = -(known.exp() * known).sum(-1, keepdim=True)
    weights = F.log_softmax(-entropy, 0) if weigh is None else weigh(entropy)
    return torch.logsumexp(each + weights, 0) if together is None else together(each, weights)


def _mix(**other):
    return lambda teacher_logits, T: mix_by_certainty(teacher_logits, T, **other)


def _whole_text(entropy):
    places = tuple(range(1, entropy.ndim))
    return F.log_softmax(-entropy.mean(places, keepdim=True), 0)


MIX_MISTAKES = {
    "All teachers count the same: weigh each by exp(−H).": _mix(weigh=lambda H: 0 * H - math.log(len(H))),
    "Who is *less* sure counts more: the weight falls as the entropy rises.": _mix(weigh=lambda H: F.log_softmax(H, 0)),
    "The weights don't sum to one: divide them by their sum over the teachers.": _mix(weigh=lambda H: -H),
    "The weights are the entropies' share; exp(−H) is asked for, divided by its sum.":
        _mix(weigh=lambda H: (H / H.sum(0)).log()),
    "The weights are 1 / H; exp(−H) is asked for, divided by its sum.": _mix(weigh=lambda H: -H.log() - (1 / H).sum(0).log()),
    "The entropy is taken in bits: the natural logarithm is asked for.": _mix(weigh=lambda H: F.log_softmax(-H / math.log(2), 0)),
    "The entropy is that at temperature 1; it is of the softened distribution.":
        _mix(entropy_of=lambda logits, each: torch.stack([F.log_softmax(z, -1) for z in logits])),
    "The temperature is not used.": _mix(soften=lambda z, T: z),
    "Logits are divided by T, not multiplied.": _mix(soften=lambda z, T: z * T),
    "A teacher has one weight for all tokens; each token has its own.": _mix(weigh=_whole_text),
    "Only the surest teacher is heard; all are, by their weights.":
        _mix(weigh=lambda H: torch.where(H.amin(0) == H, 0.0, -torch.inf)),
    "These are probabilities; their logarithm is asked for.":
        lambda teacher_logits, T: mix_by_certainty(teacher_logits, T).exp(),
    "You average logarithms of probabilities, which is no distribution: the logarithm comes after the sum.":
        _mix(together=lambda each, w: (w.exp() * each).sum(0)),
    "You average logarithms and normalise, which gives each teacher a veto: average probabilities.":
        _mix(together=lambda each, w: F.log_softmax((w.exp() * each).sum(0), -1)),
}  # fmt: skip


@exercise(
    "3.2-a",
    right=mix_by_certainty,
    mistakes=MIX_MISTAKES,
    otherwise="This is not the logarithm of Σ w p, with weights that go as exp(−H) of each teacher at each token.",
)
def check_mix_by_certainty(draw: Draw):
    """A mixture of teachers, weighted token by token."""
    for leading, teachers, size, hint in [
        ((4,), 2, 3.0, ""),
        ((2, 3), 3, 3.0, "With three teachers, or logits [B, T, V], it goes wrong."),
        ((), 2, 2.0, "With the logits [V] of one token it goes wrong."),
        ((3,), 1, 2.0, "With a single teacher it goes wrong: it has all the weight."),
        ((3,), 3, 400.0, "Where a probability underflows to 0 it goes wrong: stay in logarithms."),
    ]:
        words, T = draw.integer(6, 11), draw.choice([0.6, 1.7, 3.5])
        logits = [
            draw.normal(*leading, words) * (size * draw.number(0.3, 1.5)) for _ in range(teachers)
        ]
        yield case(logits, T, hint=hint)
    # every teacher rules the same words out: what is left of their sum is 0 in 32 bits
    logits = [
        torch.tensor([[draw.number(0, 1), draw.number(0, 1), -draw.number(500, 900)]])
        for _ in range(2)
    ]
    yield case(
        logits, 1.0, hint="Where all probabilities of a word underflow it goes wrong: its logarithm is finite."
    )  # fmt: skip
