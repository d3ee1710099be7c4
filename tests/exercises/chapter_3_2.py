"""Wrong and right answers to the exercises of chapter 3.2."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from lora_course.classroom.chapter_3_2 import (
    check_a_token,
    check_jsd_loss,
    check_mix_by_certainty,
    check_reverse_gradient,
)
from lora_course.distillation import DistillationConfig, distillation_loss, mixture_log_probs
from tests.exercises import Answers

mix = Answers(check_mix_by_certainty)


def softened(logits, T):
    return [F.log_softmax(z / T, -1) for z in logits]


def entropy(each):
    return torch.stack([-(p.exp() * p).sum(-1, keepdim=True) for p in each])


def mixed(logits, T, weigh=lambda H: (-H).softmax(0), each=None, H=None):
    each = softened(logits, T) if each is None else each
    w = weigh(entropy(each) if H is None else H)
    return torch.logsumexp(torch.stack(each) + w.log(), 0)


def weighed(weigh):
    return lambda logits, T: mixed(logits, T, weigh)


mix.wrong("equal weights", weighed(lambda H: torch.ones_like(H) / len(H)))
mix.wrong(
    "the package's, equal weights",
    lambda logits, T: mixture_log_probs(logits, None, DistillationConfig(temperature=T)),
)
mix.wrong("unsure counts more", weighed(lambda H: H.softmax(0)))
mix.wrong("not normalised", weighed(lambda H: (-H).exp()))
mix.wrong("share of the entropy", weighed(lambda H: H / H.sum(0)))
mix.wrong("1 / H", weighed(lambda H: (1 / H) / (1 / H).sum(0)))
mix.wrong("in bits", weighed(lambda H: (-H / math.log(2)).softmax(0)))
mix.wrong("softmax of −H / T", lambda logits, T: mixed(logits, T, lambda H: (-H / T).softmax(0)))
mix.wrong(
    "entropy at temperature 1", lambda logits, T: mixed(logits, T, H=entropy(softened(logits, 1)))
)
mix.wrong("no temperature", lambda logits, T: mixed(logits, 1))
mix.wrong("times T", lambda logits, T: mixed(logits, 1 / T))
mix.wrong("T is 2", lambda logits, T: mixed(logits, 2.0))
mix.wrong("the surest alone", weighed(lambda H: (H.amin(0) == H).float()))
mix.wrong(
    "one weight a text",
    weighed(lambda H: (-H.flatten(1).mean(1)).softmax(0).reshape(-1, *[1] * (H.ndim - 1))),
)
mix.wrong(
    "weights over tokens", weighed(lambda H: (-H).softmax(1) if H.ndim > 2 else (-H).softmax(0) / 2)
)
mix.wrong(
    "by the largest probability",
    lambda logits, T: (
        lambda each: mixed(
            logits,
            T,
            lambda H: (lambda top: top / top.sum(0))(
                torch.stack([p.exp().amax(-1, keepdim=True) for p in each])
            ),
        )
    )(softened(logits, T)),
)
mix.wrong("probabilities", lambda logits, T: mixed(logits, T).exp())
mix.wrong(
    "logarithms averaged",
    lambda logits, T: (
        (-entropy(softened(logits, T))).softmax(0) * torch.stack(softened(logits, T))
    ).sum(0),
)
mix.wrong(
    "logarithms averaged, normalised",
    lambda logits, T: F.log_softmax(
        ((-entropy(softened(logits, T))).softmax(0) * torch.stack(softened(logits, T))).sum(0), -1
    ),
)
mix.wrong(
    "logits averaged",
    lambda logits, T: F.log_softmax(
        ((-entropy(softened(logits, T))).softmax(0) * torch.stack(logits)).sum(0) / T, -1
    ),
)
mix.wrong(
    "underflows",
    lambda logits, T: (
        ((-entropy(softened(logits, T))).softmax(0) * torch.stack(softened(logits, T)).exp())
        .sum(0)
        .log()
    ),
)
mix.wrong(
    "clamped",
    lambda logits, T: (
        ((-entropy(softened(logits, T))).softmax(0) * torch.stack(softened(logits, T)).exp())
        .sum(0)
        .clamp(min=1e-9)
        .log()
    ),
)
mix.wrong(
    "NaN in the entropy",
    lambda logits, T: mixed(
        logits,
        T,
        H=torch.stack(
            [-(p * p.log()).sum(-1, keepdim=True) for p in (F.softmax(z / T, -1) for z in logits)]
        ),
    ),
)
mix.wrong("two teachers", lambda logits, T: mixed(logits[:2], T))
mix.wrong(
    "softmax over the first dimension",
    lambda logits, T: mixed(logits, T, each=[F.log_softmax(z / T, 0) for z in logits]),
)
mix.wrong(
    "summed over tokens",
    lambda logits, T: mixed(
        logits,
        T,
        H=torch.stack([-(p.exp() * p).sum() for p in softened(logits, T)]).reshape(
            -1, *[1] * logits[0].ndim
        ),
    ),
)


@mix.wrong("divides the caller's logits")
def _(logits, T):
    for z in logits:
        z.div_(T)
    return mixed(logits, 1)


@mix.wrong("empties the caller's list")
def _(logits, T):
    answer = mixed(logits, T)
    logits.clear()
    return answer


mix.right("as the solution", mixed)
mix.right("in 64 bits", lambda logits, T: mixed([z.double() for z in logits], T))
mix.right("by name only", lambda *, teacher_logits, T: mixed(teacher_logits, T))
mix.right("numpy out", lambda logits, T: mixed(logits, T).numpy())
mix.right(
    "torch's entropy",
    lambda logits, T: mixed(
        logits,
        T,
        H=torch.stack(
            [torch.distributions.Categorical(logits=z / T).entropy()[..., None] for z in logits]
        ),
    ),
)


@mix.right("added up one by one")
def _(teacher_logits, T):
    total, weight = None, None
    for z in teacher_logits:
        p = F.log_softmax(z / T, -1)
        w = (p.exp() * p).sum(-1, keepdim=True)
        total = p + w if total is None else torch.logaddexp(total, p + w)
        weight = w if weight is None else torch.logaddexp(weight, w)
    return total - weight


@mix.right("numpy")
def _(teacher_logits, T):
    z = np.stack([t.double().numpy() for t in teacher_logits]) / T
    p = z - np.logaddexp.reduce(z, -1, keepdims=True)
    H = -(np.exp(p) * p).sum(-1, keepdims=True)
    return np.logaddexp.reduce(p - H - np.logaddexp.reduce(-H, 0), 0)


loss = Answers(check_jsd_loss)


def jsd(p, q, b):
    m = torch.logsumexp(torch.stack([p + math.log(b), q + math.log(1 - b)]), 0)
    return b * (p.exp() * (p - m)).sum(-1) + (1 - b) * (q.exp() * (q - m)).sum(-1)


def whole(
    s,
    t,
    y,
    b,
    T,
    divergence=jsd,
    factor=lambda T: T**2,
    over=lambda each, keep: each[keep].mean(),
    mask=None,
    shift=True,
    soft=None,
    each=None,
):
    z, u, label = (s[:, :-1], t[:, :-1], y[:, 1:]) if shift else (s, t, y)
    keep = label != -100 if mask is None else mask(y)
    soft = T if soft is None else soft
    return factor(T) * over(
        divergence(F.log_softmax(u / soft, -1), F.log_softmax(z / soft, -1), b), keep
    )


def other(**parts):
    return lambda *given: whole(*given, **parts)


def kl(p, q, b):
    return (p.exp() * (p - q)).sum(-1)


def middle(p, q, b):
    return torch.logsumexp(torch.stack([p + math.log(b), q + math.log(1 - b)]), 0)


loss.wrong("no T²", other(factor=lambda T: 1))
loss.wrong("T", other(factor=lambda T: T))
loss.wrong("2 T", other(factor=lambda T: 2 * T))
loss.wrong("2 ** T", other(factor=lambda T: 2**T))
loss.wrong("no shift", other(shift=False))
loss.wrong(
    "shifted the wrong way",
    lambda s, t, y, b, T: whole(s[:, 1:], t[:, 1:], y[:, :-1], b, T, shift=False),
)
loss.wrong(
    "teacher shifted the other way",
    lambda s, t, y, b, T: whole(s[:, :-1], t[:, 1:], y[:, 1:], b, T, shift=False),
)
loss.wrong("padding counts", other(mask=lambda y: torch.ones_like(y[:, 1:]).bool()))
loss.wrong("the position's own label", other(mask=lambda y: y[:, :-1] != -100))
loss.wrong("label 0 does not count", other(mask=lambda y: y[:, 1:] > 0))
loss.wrong("β exchanged", lambda s, t, y, b, T: whole(s, t, y, 1 - b, T))
loss.wrong("β is a half", lambda s, t, y, b, T: whole(s, t, y, 0.5, T))
loss.wrong("student and teacher exchanged", lambda s, t, y, b, T: whole(t, s, y, b, T))
loss.wrong("no temperature", other(soft=1.0))
loss.wrong("teacher at temperature 1", lambda s, t, y, b, T: whole(s, t * T, y, b, T))
loss.wrong("forward", other(divergence=kl))
loss.wrong("reverse", other(divergence=lambda p, q, b: kl(q, p, b)))
loss.wrong(
    "the package's forward divergence",
    lambda s, t, y, b, T: (
        distillation_loss(s, [t], y, DistillationConfig(alpha=1.0, temperature=T)).loss
    ),
)
loss.wrong(
    "teacher against the middle only",
    other(divergence=lambda p, q, b: b * kl(p, middle(p, q, b), b)),
)
loss.wrong(
    "student against the middle only",
    other(divergence=lambda p, q, b: (1 - b) * kl(q, middle(p, q, b), b)),
)
loss.wrong(
    "not weighted",
    other(divergence=lambda p, q, b: kl(p, middle(p, q, b), b) + kl(q, middle(p, q, b), b)),
)
loss.wrong(
    "from the middle",
    other(
        divergence=lambda p, q, b: (
            b * kl(middle(p, q, b), p, b) + (1 - b) * kl(middle(p, q, b), q, b)
        )
    ),
)
loss.wrong(
    "a geometric middle",
    other(
        divergence=lambda p, q, b: (
            b * kl(p, b * p + (1 - b) * q, b) + (1 - b) * kl(q, b * p + (1 - b) * q, b)
        )
    ),
)
loss.wrong("both KLs", other(divergence=lambda p, q, b: b * kl(p, q, b) + (1 - b) * kl(q, p, b)))
loss.wrong("detached", lambda s, t, y, b, T: whole(s.detach(), t, y, b, T))
loss.wrong(
    "detached with a graph", lambda s, t, y, b, T: whole(s.detach(), t, y, b, T) + 0 * s.sum()
)
loss.wrong(
    "half the gradient",
    lambda s, t, y, b, T: (whole(s.detach(), t, y, b, T) + whole(s, t, y, b, T)) / 2,
)
loss.wrong("a float", lambda *g: whole(*g).item())
loss.wrong("batchmean", other(over=lambda each, keep: each[keep].sum() / len(each)))
loss.wrong("a sum", other(over=lambda each, keep: each[keep].sum()))
loss.wrong("all positions", other(over=lambda each, keep: (each * keep).mean()))
loss.wrong(
    "rows alike",
    other(
        over=lambda each, keep: ((each * keep).sum(1) / keep.sum(1).clamp(min=1))[
            keep.any(1)
        ].mean()
    ),
)
loss.wrong(
    "NaN for a row without labels",
    other(
        over=lambda each, keep: (
            ((each * keep).sum(1) / keep.sum(1) * keep.sum(1)).sum() / keep.sum()
        )
    ),
)
loss.wrong("the vocabulary too", lambda s, t, y, b, T: whole(s, t, y, b, T) / s.shape[-1])
loss.wrong(
    "underflows",
    other(
        divergence=lambda p, q, b: (
            lambda P, Q: (lambda M: (b * P * (P / M).log() + (1 - b) * Q * (Q / M).log()).sum(-1))(
                b * P + (1 - b) * Q
            )
        )(p.exp(), q.exp())
    ),
)
loss.wrong("for each token", other(over=lambda each, keep: each[keep]))


@loss.wrong("overwrites −100 in the caller's labels")
def _(s, t, y, b, T):
    answer = whole(s, t, y, b, T)
    y[y == -100] = 0
    return answer


@loss.wrong("divides the caller's teacher")
def _(s, t, y, b, T):
    t.div_(T)
    return whole(s, t * T, y, b, T)


loss.right("as the solution", whole)
# the middle is where the divergence is smallest, so it carries no gradient
loss.right(
    "middle detached",
    other(
        divergence=lambda p, q, b: (
            b * kl(p, middle(p, q, b).detach(), b) + (1 - b) * kl(q, middle(p, q, b).detach(), b)
        )
    ),
)
loss.right("in 64 bits", lambda s, t, y, b, T: whole(s.double(), t.double(), y, b, T))
loss.right(
    "masked, then summed",
    other(over=lambda each, keep: each.masked_fill(~keep, 0).sum() / keep.sum()),
)
loss.right(
    "F.kl_div",
    other(
        divergence=lambda p, q, b: (
            b * F.kl_div(middle(p, q, b), p, reduction="none", log_target=True).sum(-1)
            + (1 - b) * F.kl_div(middle(p, q, b), q, reduction="none", log_target=True).sum(-1)
        )
    ),
)
loss.right(
    "by name only",
    lambda *, student_logits, teacher_logits, labels, beta, T: whole(
        student_logits, teacher_logits, labels, beta, T
    ),
)
loss.right(
    "entropies",
    other(
        divergence=lambda p, q, b: (
            lambda m: (
                -(m.exp() * m).sum(-1) + b * (p.exp() * p).sum(-1) + (1 - b) * (q.exp() * q).sum(-1)
            )
        )(middle(p, q, b))
    ),
)


@loss.right("a loop")
def _(s, t, y, b, T):
    total, count = 0, 0
    for row in range(len(y)):
        for i in range(y.shape[1] - 1):
            if y[row, i + 1] != -100:
                total = total + jsd(
                    (t[row, i] / T).log_softmax(0), (s[row, i] / T).log_softmax(0), b
                )
                count += 1
    return T**2 * total / count


@loss.right("labels padded instead of logits cut")
def _(s, t, y, b, T):
    shifted = F.pad(y[:, 1:], (0, 1), value=-100).flatten() != -100
    z, u = s.flatten(0, 1)[shifted], t.flatten(0, 1)[shifted].detach()
    return T**2 * jsd(F.log_softmax(u / T, -1), F.log_softmax(z / T, -1), b).mean()


token = Answers(check_a_token)


def counted(y):
    return (y != -100).sum()


token.wrong("nothing", lambda m, y: m)
token.wrong("the sum", lambda m, y: m * len(y))
token.wrong("T", lambda m, y: m / y.shape[1])
token.wrong("T − 1", lambda m, y: m / (y.shape[1] - 1))
token.wrong("all labels", lambda m, y: m * len(y) / counted(y))
token.wrong("all labels but B", lambda m, y: m * len(y) / (counted(y) - len(y)))
token.wrong("not times B", lambda m, y: m / counted(y[:, 1:]))
token.wrong("divided by B again", lambda m, y: m / len(y) / counted(y[:, 1:]))
token.wrong("own positions", lambda m, y: m * len(y) / counted(y[:, :-1]))
token.wrong("those that are −100", lambda m, y: m * len(y) / (y[:, 1:] == -100).sum())
token.wrong("label 0 left out", lambda m, y: m * len(y) / (y[:, 1:] > 0).sum())
token.wrong("all positions", lambda m, y: m * len(y) / y[:, 1:].numel())
token.wrong("T for B", lambda m, y: m * y.shape[1] / counted(y[:, 1:]))
token.wrong("B is 4", lambda m, y: m * 4 / counted(y[:, 1:]))
token.wrong(
    "the mean of rows",
    lambda m, y: m * (1 / (y[:, 1:] != -100).sum(1).clamp(min=1)).mean() * len(y),
)
token.wrong("rows with labels", lambda m, y: m * (y != -100).any(1).sum() / counted(y[:, 1:]))
token.wrong("the first row's tokens", lambda m, y: m * len(y) / (len(y) * counted(y[0, 1:])))
token.wrong("turned over", lambda m, y: counted(y[:, 1:]) / (m * len(y)))
token.wrong("whole numbers", lambda m, y: m * len(y) // counted(y[:, 1:]))
token.wrong("a number for each row", lambda m, y: m * len(y) / (y[:, 1:] != -100).sum(1))


@token.wrong("cuts the caller's labels")
def _(batchmean, labels):
    answer = batchmean * len(labels) / counted(labels[:, 1:])
    labels[:, 0] = -100
    return answer


token.right("as the solution", lambda m, y: m * len(y) / counted(y[:, 1:]))
token.right("a Python number", lambda m, y: float(m) * len(y) / int(counted(y[:, 1:])))
token.right(
    "by name only", lambda *, batchmean, labels: batchmean * len(labels) / counted(labels[:, 1:])
)
token.right("numpy", lambda m, y: np.float64(m) * len(y) / (y.numpy()[:, 1:] != -100).sum())
token.right("one element", lambda m, y: torch.as_tensor([m * len(y) / counted(y[:, 1:])]))
token.right(
    "counted by rows",
    lambda m, y: (
        m * y.size(0) / sum(sum(int(label != -100) for label in row[1:]) for row in y.tolist())
    ),
)
token.right(
    "a share of all", lambda m, y: m / (y.shape[1] - 1) / (y[:, 1:] != -100).double().mean()
)

reverse = Answers(check_reverse_gradient)


def from_gap(make):
    def answer(z, p, T):
        q = F.log_softmax(z / T, -1)
        gap = q - p.log()
        return make(q.exp(), gap, (q.exp() * gap).sum(-1, keepdim=True), p, T)

    return answer


by_hand = from_gap(lambda q, gap, D, p, T: T * q * (gap - D))

reverse.wrong("turned", from_gap(lambda q, gap, D, p, T: -T * q * (gap - D)))
reverse.wrong("forward", from_gap(lambda q, gap, D, p, T: T * (q - p)))
reverse.wrong("no D", from_gap(lambda q, gap, D, p, T: T * q * gap))
reverse.wrong("+ 1", from_gap(lambda q, gap, D, p, T: T * q * (gap + 1)))
reverse.wrong("+ 1 − D", from_gap(lambda q, gap, D, p, T: T * q * (gap + 1 - D)))
reverse.wrong("with respect to q", from_gap(lambda q, gap, D, p, T: T**2 * (gap + 1)))
reverse.wrong("no q", from_gap(lambda q, gap, D, p, T: T * (gap - D)))
reverse.wrong("p̄ for q", from_gap(lambda q, gap, D, p, T: T * p * (gap - D)))
reverse.wrong("no T", from_gap(lambda q, gap, D, p, T: q * (gap - D)))
reverse.wrong("T²", from_gap(lambda q, gap, D, p, T: T**2 * q * (gap - D)))
reverse.wrong("1/T", from_gap(lambda q, gap, D, p, T: q * (gap - D) / T))
reverse.wrong("at temperature 1", lambda z, p, T: T * by_hand(z, p, 1))
reverse.wrong("target softened again", lambda z, p, T: by_hand(z, F.softmax(p.log() / T, -1), T))
reverse.wrong("log p̄ of logits", lambda z, p, T: by_hand(z, F.softmax(p, -1), T))
reverse.wrong("D over all tokens", from_gap(lambda q, gap, D, p, T: T * q * (gap - D.sum())))
reverse.wrong(
    "the mean over tokens",
    from_gap(lambda q, gap, D, p, T: T * q * (gap - D) / max(1, q.numel() // q.shape[-1])),
)
reverse.wrong("D + gap", from_gap(lambda q, gap, D, p, T: T * q * (gap + D)))
reverse.wrong("D is a mean", from_gap(lambda q, gap, D, p, T: T * q * (gap - D / q.shape[-1])))
reverse.wrong("KL in 2 logs", from_gap(lambda q, gap, D, p, T: T * q * (gap - D) / math.log(2)))
reverse.wrong(
    "sum of squares",
    from_gap(lambda q, gap, D, p, T: T * q * (gap - (q * q * gap).sum(-1, keepdim=True))),
)
reverse.wrong(
    "softmax over the first dimension",
    lambda z, p, T: (
        by_hand(z.movedim(0, -1), p.movedim(0, -1), T).movedim(-1, 0)
        if z.ndim > 1
        else by_hand(z, p, T)
    ),
)
reverse.wrong(
    "underflows",
    lambda z, p, T: (lambda q: T * q * ((q / p).log() - (q * (q / p).log()).sum(-1, keepdim=True)))(
        F.softmax(z / T, -1)
    ),
)
reverse.wrong(
    "clamped",
    lambda z, p, T: (lambda q: T * q * ((q / p).log() - (q * (q / p).log()).sum(-1, keepdim=True)))(
        F.softmax(z / T, -1).clamp(min=1e-3)
    ),
)


@reverse.wrong("divides the caller's logits")
def _(z, p, T):
    z.div_(T)
    return T * by_hand(z, p, 1)


reverse.right("as the solution", by_hand)
reverse.right("in 64 bits", lambda z, p, T: by_hand(z.double(), p.double(), T))
reverse.right(
    "by name only", lambda *, student_logits, target, T: by_hand(student_logits, target, T)
)
reverse.right("multiplied out", from_gap(lambda q, gap, D, p, T: T * (q * gap - q * D)))


@reverse.right("autograd")
def _(z, p, T):
    leaf = z.clone().requires_grad_()
    q = F.log_softmax(leaf / T, -1)
    return torch.autograd.grad(T**2 * (q.exp() * (q - p.log())).sum(), leaf)[0]


@reverse.right("through the Jacobian of softmax")
def _(z, p, T):
    log_q = F.log_softmax(z / T, -1)
    q = log_q.exp()
    jacobian = torch.diag_embed(q) - q[..., None] * q[..., None, :]
    return T * (jacobian @ (log_q - p.log())[..., None])[..., 0]


@reverse.right("numpy")
def _(z, p, T):
    z, p = z.double().numpy() / T, p.double().numpy()
    log_q = z - np.logaddexp.reduce(z, -1, keepdims=True)
    q, gap = np.exp(log_q), log_q - np.log(p)
    return T * q * (gap - (q * gap).sum(-1, keepdims=True))


for name in ("student_logits", "teacher_logits"):
    soft = f"F.log_softmax({name}[:, :-1][keep] / T, dim=-1)"
    for last in ("", ", dim=1"):
        loss.equivalent(
            f"{soft} → F.log_softmax({name}[:, :-1][keep] / T{last})", "the last of two dimensions"
        )
for gap in ("(p.exp() * (p - m))", "(q.exp() * (q - m))"):
    loss.equivalent(f"{gap}.sum(-1) → {gap}.sum(1)", "the last of two dimensions")
loss.equivalent(
    "torch.logaddexp(p + math.log(beta), q + math.log(1 - beta)) → torch.logaddexp(q + math.log(1 - beta), p + math.log(beta))",
    "a sum",
)
