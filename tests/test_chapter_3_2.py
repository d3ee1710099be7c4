"""The exercises of chapter 3.2: plausible wrong answers are rejected, each with its own message; right ones pass."""

import torch
import torch.nn.functional as F

from lora_course.classroom.chapter_3_2 import (
    check_gradient,
    check_loss,
    check_mixture,
    check_repair,
)
from lora_course.distillation import DistillationConfig, distillation_loss, mixture_log_probs
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def weighted(values, weights):
    return sum(w * v for w, v in zip(weights, values, strict=True))


def mixture(teacher_logits, weights, T):
    terms = [
        torch.tensor(w).log() + F.log_softmax(z / T, -1)
        for w, z in zip(weights, teacher_logits, strict=True)
    ]
    return torch.logsumexp(torch.stack(terms), 0)


def loss(
    student,
    teacher,
    labels,
    alpha,
    T,
    *,
    shift=1,
    mask=True,
    power=2,
    task_T=1.0,
    reverse=False,
    reduction="tokens",
):
    """With torch's own pieces."""
    length = labels.shape[1]
    z, t, y = student[:, : length - shift], teacher[:, : length - shift], labels[:, shift:]
    task = F.cross_entropy((z / task_T).transpose(1, 2), y)
    q, p = F.log_softmax(z / T, -1), F.log_softmax(t / T, -1)
    q, p = (p, q) if reverse else (q, p)
    keep = (y != -100) if mask else y == y
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * keep
    divisor = {
        "tokens": keep.sum(),
        "batch": len(labels),
        "positions": keep.numel(),
        "elements": keep.numel() * student.shape[-1],
    }[reduction]
    return (1 - alpha) * task + alpha * T**power * kl.sum() / divisor


def token_by_token(student, teacher, labels, alpha, T):
    total, count = 0.0, 0
    for row in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[row, t] >= 0:
                z, p = student[row, t - 1], torch.softmax(teacher[row, t - 1] / T, -1)
                kl = (p * (p.log() - torch.log_softmax(z / T, -1))).sum()
                total = (
                    total
                    - (1 - alpha) * torch.log_softmax(z, -1)[labels[row, t]]
                    + alpha * T**2 * kl
                )
                count += 1
    return total / count


def in_one_sum(student, teacher, labels, alpha, T):
    """Masked by multiplication with zero of a log-probability of −∞: NaN."""
    y = labels[:, 1:]
    keep = (y != -100).double()
    q = torch.where(
        keep[..., None] > 0,
        F.log_softmax(student[:, :-1] / T, -1),
        torch.tensor(-torch.inf, dtype=torch.float64),
    )
    return (q.sum(-1) * keep).sum() / keep.sum()


def by_autograd(student_logits, target, T):
    z = student_logits.requires_grad_()
    (T**2 * F.kl_div(F.log_softmax(z / T, -1), target, reduction="sum")).backward()
    return z.grad


WRONG = {
    check_mixture: [
        lambda z, w, T: mixture(z, w, T).exp(),
        lambda z, w, T: weighted(z, w) / T,
        lambda z, w, T: F.log_softmax(weighted(z, w) / T, -1),
        lambda z, w, T: weighted([F.log_softmax(k / T, -1) for k in z], w),
        lambda z, w, T: torch.stack([F.softmax(k / T, -1) for k in z]).mean(0).log(),
        lambda z, w, T: mixture(z, w, 1.0),
        lambda z, w, T: mixture(z, w, 1 / T),
        lambda z, w, T: weighted([F.softmax(k / T, -1) for k in z], w).log(),
        lambda z, w, T: (weighted([F.softmax(k / T, -1) for k in z], w) + 1e-12).log(),
        lambda z, w, T: torch.zeros(3, 5),
        lambda z, w, T: mixture(z, w, T).sum(),
    ],
    check_loss: [
        lambda *given: loss(*given, power=0),
        lambda *given: loss(*given, power=1),
        lambda *given: loss(*given, shift=0),
        lambda *given: loss(*given, mask=False),
        lambda *given: loss(*given, mask=False, reduction="batch"),
        lambda s, t, y, alpha, T: loss(s, t, y, 1 - alpha, T),
        lambda *given: loss(*given, task_T=2.0),
        lambda *given: loss(*given, reverse=True),
        lambda *given: loss(*given, reduction="batch"),
        lambda *given: loss(*given, reduction="elements"),
        lambda *given: loss(*given, reduction="positions"),
        lambda *given: loss(*given).detach(),
        lambda *given: loss(*given) * torch.ones(2, 6),
        in_one_sum,
    ],
    check_repair: [
        lambda value, labels: value,
        lambda value, labels: value / labels.shape[1],
        lambda value, labels: value * 4 / (labels != -100).sum(),
        lambda value, labels: value / (labels[:, 1:] != -100).sum(),
        lambda value, labels: value * 4 / (labels[:, :-1] != -100).sum(),
        lambda value, labels: value * 4 / (labels == -100).sum(),
        lambda value, labels: value * 4 / (labels[:, 1:] == -100).sum(),
    ],
    check_gradient: [
        lambda z, p, T: T * (p - F.softmax(z / T, -1)),
        lambda z, p, T: F.softmax(z / T, -1) - p,
        lambda z, p, T: (F.softmax(z / T, -1) - p) / T,
        lambda z, p, T: T**2 * (F.softmax(z / T, -1) - p),
        lambda z, p, T: T * (F.softmax(z, -1) - p),
        lambda z, p, T: -p / F.softmax(z / T, -1),
        lambda z, p, T: (F.softmax(z / T, -1) - p).sum(),
    ],
}
RIGHT = {
    check_mixture: [
        mixture,
        lambda z, w, T: mixture_log_probs(z, w, DistillationConfig(temperature=T)),
    ],
    check_loss: [
        loss,
        token_by_token,
        lambda s, t, y, alpha, T: (
            distillation_loss(s, [t], y, DistillationConfig(alpha=alpha, temperature=T)).total
        ),
    ],
    check_repair: [
        lambda value, labels: value * len(labels) / (labels[:, 1:] != -100).sum(),
        lambda value, labels: (
            float(value) * labels.shape[0] / sum(int(y) != -100 for row in labels for y in row[1:])
        ),
    ],
    check_gradient: [lambda z, p, T: T * (F.softmax(z / T, -1) - p), by_autograd],
}
