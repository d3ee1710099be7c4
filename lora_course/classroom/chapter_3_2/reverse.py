"""Exercise 3.2-d: the gradient of the reverse divergence."""

from torch.nn import functional as F

from lora_course.classroom.exercises import Draw, case, exercise


def reverse_gradient(student_logits, target, T):
    log_q = F.log_softmax(student_logits / T, -1)
    gap = log_q - target.log()
    return T * log_q.exp() * (gap - (log_q.exp() * gap).sum(-1, keepdim=True))


def _parts(make):
    """An answer made of q, log q − log p̄, their sum, p̄ and T."""

    def answer(student_logits, target, T):
        log_q = F.log_softmax(student_logits / T, -1)
        gap = log_q - target.log()
        return make(log_q.exp(), gap, (log_q.exp() * gap).sum(-1, keepdim=True), target, T)

    return answer


GRADIENT_MISTAKES = {
    "The sign is turned.": _parts(lambda q, gap, D, p, T: -T * q * (gap - D)),
    "This is the gradient of KL(p̄ ‖ q), T (q − p̄); the other direction is asked for.": _parts(lambda q, gap, D, p, T: T * (q - p)),
    "The divergence itself is missing: softmax ties all logits together, so raising one lowers the other probabilities.":
        _parts(lambda q, gap, D, p, T: T * q * gap),
    "The derivative of q log q has a + 1 in it, and softmax takes it off again: the entries sum to zero.":
        _parts(lambda q, gap, D, p, T: T * q * (gap + 1)),
    "That is the derivative with respect to q; the chain goes on through the softmax.": _parts(lambda q, gap, D, p, T: T**2 * (gap + 1)),
    "The factor q is missing: a token that the student never says has no gradient.": _parts(lambda q, gap, D, p, T: T * (gap - D)),
    "The factor is p̄; it is the student's q.": _parts(lambda q, gap, D, p, T: T * p * (gap - D)),
    "T is missing. T² comes from the loss, 1/T from the derivative of z/T: T is left.": _parts(lambda q, gap, D, p, T: q * (gap - D)),
    "The chain rule's 1/T, from z/T, is missing.": _parts(lambda q, gap, D, p, T: T**2 * q * (gap - D)),
    "This is the gradient without T².": _parts(lambda q, gap, D, p, T: q * (gap - D) / T),
    "The student's distribution is at temperature T.":
        lambda student_logits, target, T: T * reverse_gradient(student_logits, target, 1.0),
    "The target has been softened already: leave it as it is.":
        lambda student_logits, target, T: reverse_gradient(student_logits, F.softmax(target.log() / T, -1), T),
}  # fmt: skip


@exercise(
    "3.2-d",
    right=reverse_gradient,
    mistakes=GRADIENT_MISTAKES,
    otherwise="This is not the gradient of T² KL(q ‖ p̄).",
)
def check_reverse_gradient(draw: Draw):
    """The gradient of the reverse divergence, by hand."""
    for leading, far, hint in [
        ((), 0, ""),
        ((), 0, ""),
        ((2,), -1, "Where the target is tiny it goes wrong: it has no zeros, so add nothing to it."),
        ((4,), 0, "With several tokens, [N, V], it goes wrong: sums run over the vocabulary."),
        ((2, 3), 0, "With logits [B, T, V] it goes wrong: sums run over the vocabulary."),
        ((3,), 500, "Where a probability of the student underflows it goes wrong: stay in logarithms."),
    ]:  # fmt: skip
        words, T = draw.integer(5, 12), draw.choice([0.6, 1.6, 2.5, 4.0])
        z = draw.normal(*leading, words) * 2
        z[..., ::3] -= max(far, 0)  # the others stay as near to each other as they are
        target = F.softmax((12 if far < 0 else 2) * draw.normal(*leading, words), -1)
        yield case(z, target, T, hint=hint)
