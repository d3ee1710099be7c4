"""The loss of a student against a mixture of teachers.

    L = (1 − α) · CE(y, softmax(z)) + α · T² · KL(p̄ ‖ q),     p̄ = Σₖ wₖ softmax(zₖ / T),     q = softmax(z / T)

z `[B, T, V]` are the student's logits, zₖ the k-th teacher's, with weights wₖ ≥ 0 that sum to 1.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a token that does not count."""


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What is minimised.

    Attributes:
        alpha: α, the share of the teachers, in [0, 1]; 1 needs labels only to tell which tokens count.
        temperature: T > 0, of teachers and student alike; the task loss is at temperature 1.
        mixture: "probabilities" (p̄ above) or "logits" (softmax of Σ wₖ zₖ / T, the normalised geometric mean of the
            teachers, in which what one of them rules out is out; here to be compared with).
        divergence: "forward", KL(p̄ ‖ q), or "reverse", KL(q ‖ p̄).
        temperature_squared: multiply the divergence by T². Off, the teachers' share fades as T grows.

    Raises:
        ValueError: a value outside its range.
    """

    alpha: float = 0.5
    temperature: float = 1.0
    mixture: str = "probabilities"
    divergence: str = "forward"
    temperature_squared: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, numbers.Real) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}: the teachers' share is a number in [0, 1].")
        if not isinstance(self.temperature, numbers.Real) or not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature!r}: a positive number is expected; 1 leaves the distributions as they are."
            )
        for field, known in (
            ("mixture", ("probabilities", "logits")),
            ("divergence", ("forward", "reverse")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field}={getattr(self, field)!r}: {known[0]!r} or {known[1]!r} is expected."
                )
        for field in ("alpha", "temperature"):  # JSON knows no numbers of numpy
            object.__setattr__(self, field, float(getattr(self, field)))


class DistillationLoss(NamedTuple):
    """Means over the tokens that count, in nats; 0-dimensional tensors.

    loss: L, to call `backward` on. divergence: without α and T². task: the cross-entropy.
    """

    loss: Tensor
    divergence: Tensor
    task: Tensor


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    labels: Tensor,
    config: DistillationConfig = DistillationConfig(),
    weights: Tensor | Sequence[float] | None = None,
) -> DistillationLoss:
    """L of a batch of a causal language model: the logits at position t are for the label at t + 1.

    Args:
        student_logits: `[B, T, V]`, with gradient.
        teacher_logits: `[B, T, V]` each. They get no gradient. −∞ is a token that a teacher rules out; only the forward
            divergence of probabilities has a value there.
        labels: `[B, T]`, not shifted; a position whose label is −100 counts nowhere.
        weights: of the teachers, `[K]`; relative to each other, equal by default.

    Raises:
        ValueError: logits or labels of other shapes, NaN, an infinite divergence, weights that don't fit, no teacher.
    """
    if student_logits.ndim != 3 or not student_logits.numel():
        raise ValueError(
            f"The student's logits are {list(student_logits.shape)}: [B, T, V] of one or more rows is expected."
        )
    if labels.shape != student_logits.shape[:2]:
        raise ValueError(
            f"labels are {list(labels.shape)}, the student's logits {list(student_logits.shape)}: [B, T] and [B, T, V] are expected."
        )
    for k, logits in enumerate(teacher_logits):
        if logits.shape != student_logits.shape:
            raise ValueError(
                f"Teacher {k}'s logits are {list(logits.shape)}, the student's {list(student_logits.shape)}: distillation "
                "compares them token by token, so both need the same text and the same vocabulary."
            )
    counted = [counted_logits(logits, labels) for logits in teacher_logits]
    for k, logits in enumerate(counted):
        _check_logits(k, logits, config)
    target = mixture_log_probs(counted, weights, config)
    return loss_from_mixture(student_logits, target, labels, config)


@torch.no_grad()
def mixture_log_probs(
    teacher_logits: Sequence[Tensor],
    weights: Tensor | Sequence[float] | None = None,
    config: DistillationConfig = DistillationConfig(),
) -> Tensor:
    """log p̄ `[…, V]` of teachers' finite logits `[…, V]` at the config's temperature, in fp32 (float64 stays).

    Added up in logarithms: log p̄ stays finite where every probability underflows.
    weights: `[K]`, relative, equal by default. Raises ValueError for weights that don't fit, or no teacher.
    """
    weights = normalised_weights([1.0] * len(teacher_logits) if weights is None else weights)
    if weights.shape != (len(teacher_logits),):
        raise ValueError(
            f"{len(teacher_logits)} teachers and weights {list(weights.shape)}: one weight for each teacher is expected."
        )
    total = empty_mixture(teacher_logits[0], teacher_logits[0].shape, config)
    for logits, weight in zip(teacher_logits, weights, strict=True):
        add_teacher(total, slice(None), logits, weight, config)
    return F.log_softmax(total, -1)


def empty_mixture(logits: Tensor, shape: Sequence[int], config: DistillationConfig) -> Tensor:
    """An empty mixture: Σ w z / T, or log Σ w p, over no teacher."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.full(
        tuple(shape),
        0.0 if config.mixture == "logits" else -math.inf,
        dtype=dtype,
        device=logits.device,
    )


def add_teacher(
    total: Tensor, where: Tensor | slice, logits: Tensor, weight: Tensor, config: DistillationConfig
) -> None:
    """Add one teacher to the rows `where` of `total`, in place; `weight` broadcasts with `logits`."""
    scaled, weight = logits.to(total.dtype) / config.temperature, weight.to(total)
    if config.mixture == "logits":
        total[where] += weight * scaled
    else:
        total[where] = torch.logaddexp(total[where], weight.log() + F.log_softmax(scaled, -1))


def loss_from_mixture(
    student_logits: Tensor,
    target: Tensor,
    labels: Tensor,
    config: DistillationConfig,
    num_items: Tensor | int | None = None,
) -> DistillationLoss:
    """The loss from log p̄ `[N, V]` of the N tokens that count; its sums are divided by N, or by `num_items`.

    V may be less than the student's logits have: what is beyond has no part in either softmax.
    """
    logits = counted_logits(student_logits, labels)[:, : target.shape[-1]].to(target.dtype)
    student, target_first = (
        F.log_softmax(logits / config.temperature, -1),
        config.divergence == "forward",
    )
    first, second = (target, student) if target_first else (student, target)
    divisor = max(1, len(target)) if num_items is None else num_items
    # what has no probability (a logit of −∞) adds nothing to the sum, where 0 · −∞ would be NaN
    parts = (first.exp() * (first - second)).masked_fill(first == -math.inf, 0.0)
    divergence = parts.sum() / divisor
    next_tokens = labels[:, 1:][labels[:, 1:] != IGNORED].to(logits.device)
    task = F.cross_entropy(logits, next_tokens, reduction="sum") / divisor
    scale = config.temperature**2 if config.temperature_squared else 1.0
    total = (1 - config.alpha) * task + config.alpha * scale * divergence
    return DistillationLoss(total, divergence.detach(), task.detach())


def _check_logits(teacher: int, logits: Tensor, config: DistillationConfig) -> None:
    """Raise ValueError where a teacher's logits `[N, V]` would make the loss NaN or infinite."""
    may_rule_out = config.divergence == "forward" and config.mixture == "probabilities"
    out = logits == -math.inf
    wrong = not bool((logits < math.inf).all()) or bool(out.all(-1).any())
    if wrong or not may_rule_out and bool(out.any()):
        raise ValueError(
            f"Teacher {teacher}'s logits hold NaN or ±inf, and so would the loss: finite logits are expected (−inf for some tokens "
            "with divergence='forward' and mixture='probabilities' alone)."
        )


def counted_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits `[N, V]` whose next token has a label, row after row."""
    return logits[:, :-1][(labels[:, 1:] != IGNORED).to(logits.device)]


def normalised_weights(weights: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """`[K]` or `[D, K]` on the CPU, summing to 1 over the teachers."""
    try:
        weights = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"weights={weights!r}: numbers are expected, one for each teacher."
        ) from None
    proper = (
        weights.ndim > 0
        and weights.numel() > 0
        and torch.isfinite(weights).all()
        and (weights >= 0).all()
    )
    if not proper or (weights.sum(-1) == 0).any():
        raise ValueError(
            f"weights={weights.tolist()}: numbers of 0 or more are expected, one for each teacher, of which not all are 0."
        )
    return weights / weights.sum(-1, keepdim=True)
