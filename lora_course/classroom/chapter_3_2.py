"""Checks of the exercises in chapter 3.2, distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_course.classroom.first_exercises import exercise, mistake


def _logits(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def _number(found: object) -> Tensor:
    mistake(
        not isinstance(found, float | int | Tensor), "A number is expected; yours is {!r}.", found
    )
    found = torch.as_tensor(found, dtype=torch.float64)
    mistake(
        found.numel() != 1,
        "One number is expected, a mean over tokens; yours has the shape {}.",
        list(found.shape),
    )
    return found.reshape(())


@exercise("3.2-a", points=1)
def check_mixture(learner):
    """`learner(teacher_logits, weights, T)` → log p̄ `[…, V]`; `teacher_logits` is a list, `weights` sum to 1."""
    given, weights, T = [_logits(3, 5, seed=k) for k in range(3)], [0.5, 0.2, 0.3], 2.0
    soft = [F.softmax(z / T, -1) for z in given]
    mixture = sum(w * p for w, p in zip(weights, soft, strict=True))
    found = learner([z.clone() for z in given], list(weights), T)
    mistake(
        not torch.is_tensor(found) or found.shape != (3, 5),
        "A tensor of the teachers' shape is expected.",
    )
    same = lambda other: torch.allclose(found.double(), other, atol=1e-5)  # noqa: E731
    mistake(same(mixture), "These are probabilities; their logarithm is asked for.")
    mistake(
        same(sum(w * z for w, z in zip(weights, given, strict=True)) / T),
        "These are averaged logits, and not normalised either: take the softmax of each teacher first.",
    )
    geometric = F.log_softmax(sum(w * z for w, z in zip(weights, given, strict=True)) / T, -1)
    mistake(
        same(geometric),
        "You average logits, which gives each teacher a veto: what one rules out is out. Average probabilities.",
    )
    mistake(
        same(sum(w * p.log() for w, p in zip(weights, soft, strict=True))),
        "You average logarithms of probabilities, which is no distribution: the logarithm comes after the sum.",
    )
    mistake(
        same(sum(soft).log() - torch.tensor(3.0).log().double()),
        "The weights are not used: all teachers count the same.",
    )
    mistake(
        same(sum(w * F.softmax(z, -1) for w, z in zip(weights, given, strict=True)).log()),
        "The temperature is not used.",
    )
    mistake(
        same(sum(w * F.softmax(z * T, -1) for w, z in zip(weights, given, strict=True)).log()),
        "Logits are divided by T, not multiplied.",
    )
    mistake(
        not same(mixture.log()),
        "Not yet: exp of your result sums to {:.3f} in the first row and differs from Σ w softmax(z/T) by up to {:.3f}.",
        found[0].exp().sum().item(),
        (found.exp() - mixture).abs().max().item(),
    )
    far = [torch.tensor([0.0, -600.0]), torch.tensor([0.0, -800.0])]
    underflow = learner(far, [0.5, 0.5], 1.0)
    mistake(
        not torch.isfinite(underflow).all(),
        "Where every probability underflows to 0 your logarithm is −∞, and the loss NaN: add up in logarithms, torch.logsumexp or torch.logaddexp.",
    )
    mistake(
        abs(underflow[1].item() + 600.6931) > 0.01,
        "In fp32, where probabilities underflow, the logarithm should be −600.69; yours is {:.2f}.",
        underflow[1].item(),
    )


@exercise("3.2-b", points=2)
def check_loss(learner):
    """`learner(student_logits, teacher_logits, labels, alpha, T)` → Hinton's loss with one teacher, masked and shifted."""
    student, teacher, alpha, T = _logits(2, 6, 7, seed=1), _logits(2, 6, 7, seed=2), 0.3, 2.0
    labels = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(3))
    labels[0, :2] = labels[1, 4:] = -100

    def loss(
        student,
        labels,
        *,
        shift=True,
        mask=True,
        squared=T**2,
        share=alpha,
        task_T=1.0,
        soft=T,
        reverse=False,
        per=None,
    ):
        z, t, y = (
            (student[:, :-1], teacher[:, :-1], labels[:, 1:])
            if shift
            else (student, teacher, labels)
        )
        keep = (y != -100) if mask else torch.ones_like(y, dtype=torch.bool)
        p, q = (t / soft).log_softmax(-1), (z / soft).log_softmax(-1)
        p, q = (q, p) if reverse else (p, q)
        kl = (p.exp() * (p - q)).sum(-1)[keep].sum() / (per or keep.sum())
        task = F.cross_entropy((z / task_T).flatten(0, 1), y.flatten())
        return (1 - share) * task + share * squared * kl

    found = _number(learner(student.clone(), teacher.clone(), labels.clone(), alpha, T))
    mistake(
        not torch.isfinite(found),
        "Your loss is {}: a position without a label must not take part.",
        found.item(),
    )
    same = lambda other: bool((found - other).abs() < 1e-5 * other.abs() + 1e-7)  # noqa: E731
    mistake(
        same(loss(student, labels, squared=1)),
        "T² is missing: at T = 4 the teacher would count sixteen times less.",
    )
    mistake(
        same(loss(student, labels, squared=T)),
        "You multiply by T; the gradient shrinks with its square.",
    )
    mistake(
        same(loss(student, labels, shift=False)),
        "Nothing is shifted: the logits at position t are for the label at t + 1. As it is, the student learns to repeat the token it has just read.",
    )
    mistake(
        same(loss(student, labels, mask=False)),
        "The divergence counts positions without a label too: padding and the prompt.",
    )
    mistake(
        same(loss(student, labels, share=1 - alpha)),
        "α and 1 − α are exchanged: α is the teacher's share.",
    )
    mistake(
        same(loss(student, labels, task_T=T)),
        "The task loss is at temperature 1: labels are not softened.",
    )
    mistake(same(loss(student, labels, soft=1.0)), "The temperature is not used in the divergence.")
    mistake(
        same(loss(student, labels, reverse=True)),
        "This is KL(q ‖ p), the reverse one; F.kl_div takes the student's log-probabilities first and the teacher's distribution second.",
    )
    mistake(
        same(loss(student, labels, per=2)),
        "You divide the divergence by B, as batchmean does: it then grows with the length of the text.",
    )
    mistake(
        same(loss(student, labels, per=2 * 6 * 7)) or same(loss(student, labels, per=2 * 5 * 7)),
        "You divide the divergence by all elements, the vocabulary included: sum over it, then take the mean over tokens.",
    )
    mistake(
        same(loss(student, labels, per=12)) or same(loss(student, labels, per=10)),
        "The sum leaves out what has no label, but you divide by all positions: divide by the tokens that count.",
    )
    mistake(
        not same(loss(student, labels)),
        "It should be {:.4f} here, not {:.4f}.",
        loss(student, labels).item(),
        found.item(),
    )
    learning = student.clone().requires_grad_()
    answer = learner(learning, teacher, labels, alpha, T)
    mistake(
        not torch.is_tensor(answer) or not answer.requires_grad,
        "Your loss has no gradient: detach the teacher, not the student.",
    )


@exercise("3.2-c", points=1)
def check_repair(learner):
    """`learner(batchmean, labels)` → the mean over counted tokens; batchmean is Σ over them, divided by B."""
    labels = torch.ones(4, 9, dtype=torch.long)
    labels[:2, :3] = labels[2, 6:] = labels[3, 0] = -100
    batchmean, B, T = 3.7, 4, 9
    after = int((labels[:, 1:] != -100).sum())
    found = _number(learner(torch.tensor(batchmean, dtype=torch.float64), labels.clone())).item()
    same = lambda other: abs(found - other) < 1e-6 * abs(other)  # noqa: E731
    mistake(
        same(batchmean),
        "Nothing has changed: it is still the sum divided by B = 4, a sum over a text's tokens.",
    )
    mistake(
        same(batchmean / T) or same(batchmean / (T - 1)),
        "You divide by the length: right only where every position counts.",
    )
    mistake(
        same(batchmean * B / int((labels != -100).sum())),
        "You count all labels. The first token of a text has no logits before it, so its label counts nowhere: labels[:, 1:].",
    )
    mistake(
        same(batchmean / after),
        "You divide by the tokens that count, but batchmean has been divided by B already: multiply by B first.",
    )
    mistake(
        same(batchmean * B / int((labels[:, :-1] != -100).sum())),
        "You count the labels at the logits' own positions: the label of position t + 1 decides about the logits at t.",
    )
    mistake(
        same(batchmean * B / int((labels == -100).sum())),
        "You count the labels that are −100; the others are asked for.",
    )
    mistake(
        not same(batchmean * B / after),
        "It should be {:.4f} here, not {:.4f}.",
        batchmean * B / after,
        found,
    )


@exercise("3.2-d", points=1)
def check_gradient(learner):
    """`learner(student_logits, target, T)` → ∂/∂z of T² KL(p̄ ‖ softmax(z / T)) `[V]`, without autograd."""
    z, target, T = _logits(6, seed=5), F.softmax(_logits(6, seed=6), -1), 3.0
    q = F.softmax(z / T, -1)
    found = learner(z.clone(), target.clone(), T)
    mistake(
        not torch.is_tensor(found) or found.shape != (6,),
        "One number for each logit is expected, [V].",
    )
    found = found.detach().double()
    same = lambda other: torch.allclose(found, other, atol=1e-6)  # noqa: E731
    mistake(
        same(target - q) or same(T * (target - q)),
        "The sign is turned: where the student gives too much, the gradient is positive.",
    )
    mistake(
        same(q - target),
        "T is missing. T² comes from the loss, 1/T from the derivative of z/T: T is left.",
    )
    mistake(same((q - target) / T), "This is the gradient without T², which fades as T grows.")
    mistake(same(T**2 * (q - target)), "The chain rule's 1/T, from z/T, is missing.")
    mistake(
        same(T * (F.softmax(z, -1) - target)), "The student's distribution is at temperature T too."
    )
    mistake(
        not same(T * (q - target)),
        "Not yet: the entries should sum to 0 and the first be {:.4f}; yours sum to {:.4f} and the first is {:.4f}.",
        (T * (q - target))[0].item(),
        found.sum().item(),
        found[0].item(),
    )
