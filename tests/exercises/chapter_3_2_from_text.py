"""Answers to chapter 3.2's exercises by somebody who has read no more than the text and the stub."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from tests.exercises.chapter_3_2 import loss, mix, reverse, token


def certain(zs, T, *, entropy=None, weights=None, mixed=None):
    log_p = F.log_softmax(torch.stack(list(zs)) / T, -1)
    h = (
        entropy(log_p, torch.stack(list(zs)))
        if entropy
        else -(log_p.exp() * log_p).sum(-1, keepdim=True)
    )
    log_w = weights(h) if weights else F.log_softmax(-h, 0)
    return mixed(log_p, log_w) if mixed else torch.logsumexp(log_p + log_w, 0)


def sure(**parts):
    return lambda zs, T: certain(zs, T, **parts)


mix.wrong(
    "entropy in bits", sure(entropy=lambda p, z: -(p.exp() * p).sum(-1, keepdim=True) / math.log(2))
)
mix.wrong(
    "entropy by the vocabulary's",
    sure(entropy=lambda p, z: -(p.exp() * p).sum(-1, keepdim=True) / math.log(p.shape[-1])),
)
mix.wrong(
    "entropy at T = 1",
    sure(entropy=lambda p, z: -(F.softmax(z, -1) * F.log_softmax(z, -1)).sum(-1, keepdim=True)),
)
mix.wrong(
    "mean for sum in the entropy", sure(entropy=lambda p, z: -(p.exp() * p).mean(-1, keepdim=True))
)
mix.wrong("the surest word", sure(entropy=lambda p, z: -p.amax(-1, keepdim=True)))
mix.wrong(
    "one weight a teacher",
    sure(
        entropy=lambda p, z: (
            (h := -(p.exp() * p).sum(-1, keepdim=True))
            .flatten(1)
            .mean(1)
            .reshape(-1, *[1] * (h.dim() - 1))
            .expand_as(h)
        )
    ),
)
mix.wrong("sure counts less", sure(weights=lambda h: F.log_softmax(h, 0)))
mix.wrong("entropies divided by T", sure(weights=lambda h: F.log_softmax(-h / 2, 0)))
mix.wrong("not normalised", sure(weights=lambda h: -h))
mix.wrong("one over the entropy", sure(weights=lambda h: (1 / h / (1 / h).sum(0)).log()))
mix.wrong("over the wrong dimension", sure(weights=lambda h: F.log_softmax(-h, -1)))
mix.wrong("all alike", sure(weights=lambda h: torch.zeros_like(h) - math.log(len(h))))
mix.wrong("geometric", sure(mixed=lambda p, w: F.log_softmax((w.exp() * p).sum(0), -1)))
mix.wrong("the mean of logarithms", sure(mixed=lambda p, w: (w.exp() * p).sum(0)))
mix.wrong("the probabilities", sure(mixed=lambda p, w: torch.logsumexp(p + w, 0).exp()))
mix.wrong("log of a sum", sure(mixed=lambda p, w: (w.exp() * p.exp()).sum(0).log()))
mix.wrong(
    "log of a sum, with a floor", sure(mixed=lambda p, w: ((w + p).exp().sum(0) + 1e-30).log())
)
mix.wrong("clamped", sure(mixed=lambda p, w: torch.logsumexp(p + w, 0).clamp(min=-100)))
mix.wrong(
    "the surest alone",
    sure(mixed=lambda p, w: torch.take_along_dim(p, w.argmax(0, keepdim=True), 0)[0]),
)
mix.wrong("T on the result too", lambda zs, T: F.log_softmax(certain(zs, T) / T, -1))


@mix.wrong("divides the logits where they stand")
def _(teacher_logits, T):
    for z in teacher_logits:
        z.div_(T)
    return certain(teacher_logits, 1.0)


@mix.wrong("entropy by p log p of rounded p")
def _(teacher_logits, T):
    p = torch.stack(teacher_logits).div(T).softmax(-1)
    h = -(p * p.log()).sum(-1, keepdim=True)
    return (F.softmax(-h, 0) * p).sum(0).log()


@mix.right("torch.distributions")
def _(teacher_logits, T):
    each = [torch.distributions.Categorical(logits=z / T) for z in teacher_logits]
    log_w = torch.stack([-d.entropy() for d in each]).log_softmax(0)
    return torch.stack(
        [d.logits + w.unsqueeze(-1) for d, w in zip(each, log_w, strict=True)]
    ).logsumexp(0)


@mix.right("teacher after teacher")
def _(teacher_logits, T):
    total, norm = None, None
    for z in teacher_logits:
        z = z / T
        log_p = z - z.logsumexp(-1, keepdim=True)
        minus_h = torch.sum(log_p.exp() * log_p, -1, keepdim=True)
        new = log_p + minus_h
        total = new if total is None else torch.logaddexp(total, new)
        norm = minus_h if norm is None else torch.logaddexp(norm, minus_h)
    return total - norm


@mix.right("numpy and scipy in float64")
def _(teacher_logits, T):
    from scipy.special import log_softmax, logsumexp

    log_p = log_softmax(np.stack([z.double().numpy() for z in teacher_logits]) / T, axis=-1)
    minus_h = (np.exp(log_p) * log_p).sum(-1, keepdims=True)
    return logsumexp(log_p + log_softmax(minus_h, axis=0), axis=0)


mix.right(
    "cross-entropy with itself",
    sure(entropy=lambda p, z: torch.einsum("...v,...v->...", p.exp(), -p).unsqueeze(-1)),
)
mix.right("float64", lambda zs, T: certain([z.double() for z in zs], T))
mix.right(
    "teachers last",
    lambda zs, T: torch.logsumexp(
        (s := F.log_softmax(torch.stack(list(zs), -1) / T, -2))
        + F.log_softmax((s.exp() * s).sum(-2, keepdim=True), -1),
        -1,
    ),
)
mix.right(
    "torch.special.entr",
    sure(entropy=lambda p, z: torch.special.entr(p.exp()).sum(-1, keepdim=True)),
)


def jensen(
    student, teacher, labels, beta, T, *, kept=None, m=None, p=None, q=None, end=None, parts=None
):
    kept = kept(labels) if kept else labels[:, 1:] != -100
    log_q, log_p = ((z[:, :-1] / T).log_softmax(-1)[kept] for z in (student, teacher))
    log_p, log_q = (p or (lambda v: v))(log_p), (q or (lambda v: v))(log_q)
    mid = (
        m(log_p, log_q, beta)
        if m
        else torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    )
    a = (log_p.exp() * (log_p - mid)).sum(-1)
    b = (log_q.exp() * (log_q - mid)).sum(-1)
    each = parts(a, b, beta) if parts else beta * a + (1 - beta) * b
    return end(each, labels, T) if end else T**2 * each.mean()


def js(**parts):
    return lambda *arguments: jensen(*arguments, **parts)


loss.wrong("labels as shifted", js(kept=lambda y: y[:, :-1] != -100))
loss.wrong("every token", js(kept=lambda y: torch.ones_like(y[:, 1:], dtype=torch.bool)))
loss.wrong("labels above 0", js(kept=lambda y: y[:, 1:] > 0))
loss.wrong("both labels must count", js(kept=lambda y: (y[:, 1:] != -100) & (y[:, :-1] != -100)))
loss.wrong(
    "β the other way round in m",
    js(m=lambda p, q, b: torch.logaddexp(p + math.log(1 - b), q + math.log(b))),
)
loss.wrong(
    "β the other way round in the sum", js(parts=lambda a, b, beta: (1 - beta) * a + beta * b)
)
loss.wrong("half and half", js(parts=lambda a, b, beta: (a + b) / 2))
loss.wrong("m as the mean", js(m=lambda p, q, b: torch.logaddexp(p, q) - math.log(2)))
loss.wrong("a geometric m", js(m=lambda p, q, b: (b * p + (1 - b) * q).log_softmax(-1)))
loss.wrong("log of a sum", js(m=lambda p, q, b: (b * p.exp() + (1 - b) * q.exp()).log()))
loss.right(
    "log of a sum and 1e-8, which changes no digit",
    js(m=lambda p, q, b: (b * p.exp() + (1 - b) * q.exp() + 1e-8).log()),
)
loss.right(
    "log of a sum that is clamped, which changes no digit",
    js(m=lambda p, q, b: (b * p.exp() + (1 - b) * q.exp()).clamp(min=1e-12).log()),
)
loss.right(
    "m without a gradient, since what comes through it sums to zero",
    js(m=lambda p, q, b: torch.logaddexp(p + math.log(b), q + math.log(1 - b)).detach()),
)
loss.wrong(
    "the second part without a gradient",
    js(parts=lambda a, b, beta: beta * a + (1 - beta) * b.detach()),
)
loss.wrong("T once", js(end=lambda e, y, T: T * e.mean()))
loss.wrong("no T", js(end=lambda e, y, T: e.mean()))
loss.wrong("over the texts", js(end=lambda e, y, T: T**2 * e.sum() / len(y)))
loss.wrong("over all labels", js(end=lambda e, y, T: T**2 * e.sum() / (y != -100).sum()))
loss.wrong("over all tokens", js(end=lambda e, y, T: T**2 * e.sum() / y[:, 1:].numel()))
loss.wrong("the sum", js(end=lambda e, y, T: T**2 * e.sum()))
loss.wrong("detached", js(end=lambda e, y, T: (T**2 * e.mean()).detach().requires_grad_()))
loss.wrong("the two exchanged", lambda s, t, y, b, T: jensen(t, s, y, b, T))
loss.wrong("the student at T = 1", lambda s, t, y, b, T: jensen(s * T, t, y, b, T))
loss.wrong(
    "logits clamped", lambda s, t, y, b, T: jensen(s.clamp(-30, 30), t.clamp(-30, 30), y, b, T)
)


@loss.wrong("a mean for each text first")
def _(student_logits, teacher_logits, labels, beta, T):
    rows = [
        jensen(s[None], t[None], y[None], beta, T)
        for s, t, y in zip(student_logits, teacher_logits, labels, strict=True)
        if (y[1:] != -100).any()
    ]
    return torch.stack(rows).mean()


@loss.wrong("kl_div the other way")
def _(student_logits, teacher_logits, labels, beta, T):
    kept = labels[:, 1:] != -100
    q, p = ((z[:, :-1][kept] / T).log_softmax(-1) for z in (student_logits, teacher_logits))
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))

    def kl(a, b):
        return F.kl_div(a, b, log_target=True, reduction="batchmean")

    return T**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))


@loss.wrong("kl_div by its default mean")
def _(student_logits, teacher_logits, labels, beta, T):
    kept = labels[:, 1:] != -100
    q, p = ((z[:, :-1][kept] / T).log_softmax(-1) for z in (student_logits, teacher_logits))
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    return T**2 * (
        beta * F.kl_div(m, p, log_target=True) + (1 - beta) * F.kl_div(m, q, log_target=True)
    )


@loss.right("kl_div")
def _(student_logits, teacher_logits, labels, beta, T):
    kept = labels[:, 1:] != -100
    q, p = ((z[:, :-1][kept] / T).log_softmax(-1) for z in (student_logits, teacher_logits))
    m = torch.logsumexp(torch.stack([p + math.log(beta), q + math.log1p(-beta)]), 0)

    def kl(a, b):
        return F.kl_div(b, a, log_target=True, reduction="batchmean")

    return T**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))


@loss.right("masked, not chosen")
def _(student_logits, teacher_logits, labels, beta, T):
    q, p = ((z / T).log_softmax(-1)[:, :-1] for z in (student_logits, teacher_logits))
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    each = (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)
    mask = (labels[:, 1:] != -100).float()
    return (each * mask).sum() / mask.sum() * T * T


@loss.right("token by token")
def _(student_logits, teacher_logits, labels, beta, T):
    total, count = 0.0, 0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if int(labels[b, t + 1]) == -100:
                continue
            q, p = ((z[b, t] / T).log_softmax(0) for z in (student_logits, teacher_logits))
            m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
            total = total + beta * p.exp() @ (p - m) + (1 - beta) * q.exp() @ (q - m)
            count += 1
    return T**2 * total / count


loss.right("float64", lambda s, t, y, b, T: jensen(s.double(), t.double(), y, b, T))
loss.right("the teacher without a graph", lambda s, t, y, b, T: jensen(s, t.detach(), y, b, T))
loss.right("nanmean", js(end=lambda e, y, T: T**2 * e.nanmean()))
loss.right("labels from 0", js(kept=lambda y: ~torch.eq(y, -100)[:, 1:]))


@loss.right("entropies")
def _(student_logits, teacher_logits, labels, beta, T):
    kept = labels[:, 1:] != -100
    q, p = (
        (z.double()[:, :-1][kept] / T).log_softmax(-1) for z in (student_logits, teacher_logits)
    )
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))

    def h(v):
        return -(v.exp() * v).sum(-1)

    return T**2 * (h(m) - beta * h(p) - (1 - beta) * h(q)).mean()


token.wrong("the number itself", lambda n, y: n)
token.wrong("labels not shifted", lambda n, y: n * len(y) / (y != -100).sum())
token.wrong("all but the last", lambda n, y: n * len(y) / (y[:, :-1] != -100).sum())
token.wrong("length for texts", lambda n, y: n * y.shape[1] / (y[:, 1:] != -100).sum())
token.wrong(
    "length less one for texts", lambda n, y: n * (y.shape[1] - 1) / (y[:, 1:] != -100).sum()
)
token.wrong("all tokens", lambda n, y: n * len(y) / y.numel())
token.wrong("all that have a next", lambda n, y: n / (y.shape[1] - 1))
token.wrong("divided only", lambda n, y: n / (y[:, 1:] != -100).sum())
token.wrong("times the texts only", lambda n, y: n * len(y))
token.wrong("the share that counts", lambda n, y: n / (y[:, 1:] != -100).float().mean())
token.wrong("labels above 0", lambda n, y: n * len(y) / (y[:, 1:] > 0).sum())
token.wrong(
    "texts with a label",
    lambda n, y: n * (y[:, 1:] != -100).any(1).sum() / (y[:, 1:] != -100).sum(),
)
token.wrong(
    "the mean of the texts' means",
    lambda n, y: n * (1 / (y[:, 1:] != -100).sum(1).clamp(min=1)).mean(),
)
token.wrong("whole numbers", lambda n, y: int(n * len(y) // (y[:, 1:] != -100).sum()))
token.wrong(
    "the labels that don't count", lambda n, y: n * len(y) / (y[:, 1:] == -100).sum().clamp(min=1)
)
token.wrong("upside down", lambda n, y: n * (y[:, 1:] != -100).sum() / len(y))
token.wrong("one more", lambda n, y: n * len(y) / ((y[:, 1:] != -100).sum() + 1))


@token.wrong("sets labels to 0")
def _(batchmean, labels):
    count = (labels[:, 1:] != -100).sum()
    labels[labels == -100] = 0
    return batchmean * len(labels) / count


token.right(
    "from a list",
    lambda n, y: (
        float(n) * len(rows := y.tolist()) / sum(v != -100 for row in rows for v in row[1:])
    ),
)
token.right(
    "numpy", lambda n, y: np.float64(n) * y.shape[0] / np.count_nonzero(y.numpy()[:, 1:] + 100)
)
token.right("rolled away", lambda n, y: n * y.size(0) / y.roll(-1, 1)[:, :-1].ne(-100).sum().item())
token.right(
    "the mean of the mask", lambda n, y: n / ((y[:, 1:] != -100).double().mean() * (y.shape[1] - 1))
)
token.right("padded", lambda n, y: n * len(y) / (F.pad(y, (0, 1), value=-100)[:, 1:] != -100).sum())
token.right(
    "less what doesn't count",
    lambda n, y: n * len(y) / (y[:, 1:].numel() - (y[:, 1:] == -100).sum()),
)
token.right(
    "one number in a tensor",
    lambda n, y: torch.as_tensor(n).reshape(1) * len(y) / torch.sum(y[:, 1:] != -100),
)


def slope(z, p, T, *, log_q=None, log_p=None, factor=None, base=None, sign=1):
    log_q = log_q(z, T) if log_q else (z / T).log_softmax(-1)
    gap = log_q - (log_p(p, T) if log_p else p.log())
    mean = base(log_q, gap) if base else (log_q.exp() * gap).sum(-1, keepdim=True)
    return sign * (factor(T) if factor else T) * log_q.exp() * (gap - mean)


def back(**parts):
    return lambda z, p, T: slope(z, p, T, **parts)


reverse.wrong("T twice", back(factor=lambda T: T * T))
reverse.wrong("no T", back(factor=lambda T: 1.0))
reverse.wrong("one over T", back(factor=lambda T: 1 / T))
reverse.wrong("the sign", back(sign=-1))
reverse.wrong("without the mean", back(base=lambda q, g: 0.0))
reverse.wrong("the plain mean", back(base=lambda q, g: g.mean(-1, keepdim=True)))
reverse.wrong("the sum", back(base=lambda q, g: g.sum(-1, keepdim=True)))
reverse.wrong(
    "one mean for all tokens", back(base=lambda q, g: (q.exp() * g).sum() / q[..., 0].numel())
)
reverse.wrong("1 for the mean", back(base=lambda q, g: -1.0))
reverse.wrong("student at T = 1", back(log_q=lambda z, T: z.log_softmax(-1)))
reverse.wrong("softened again", back(log_p=lambda p, T: (p.log() / T).log_softmax(-1)))
reverse.wrong("the target as logits", back(log_p=lambda p, T: (p / T).log_softmax(-1)))
reverse.wrong("a floor", back(log_p=lambda p, T: p.clamp(min=1e-6).log()))
reverse.wrong("1e-8 is added", back(log_p=lambda p, T: (p + 1e-8).log()))
reverse.wrong("softmax over tokens", back(log_q=lambda z, T: (z / T).log_softmax(0)))
reverse.wrong("softmax over dimension 1", back(log_q=lambda z, T: (z / T).log_softmax(1)))
reverse.wrong("the forward one", lambda z, p, T: T * ((z / T).softmax(-1) - p))
reverse.wrong(
    "weighted by the target",
    lambda z, p, T: (
        T * p * ((g := (z / T).log_softmax(-1) - p.log()) - (p * g).sum(-1, keepdim=True))
    ),
)
reverse.wrong("the mean over tokens", lambda z, p, T: slope(z, p, T) / z[..., 0].numel())


@reverse.wrong("turns the student's gradient on")
def _(student_logits, target, T):
    q = (student_logits.requires_grad_() / T).log_softmax(-1)
    return torch.autograd.grad(T**2 * (q.exp() * (q - target.log())).sum(), student_logits)[0]


@reverse.right("the Jacobian of a softmax")
def _(student_logits, target, T):
    q = (student_logits / T).softmax(-1)
    J = torch.diag_embed(q) - q.unsqueeze(-1) * q.unsqueeze(-2)
    log_ratio = (student_logits / T).log_softmax(-1) - target.log()
    return T * (J @ (1 + log_ratio).unsqueeze(-1)).squeeze(-1)


@reverse.right("autograd on a copy")
def _(student_logits, target, T):
    z = student_logits.detach().clone().requires_grad_()
    q = (z / T).log_softmax(-1)
    return torch.autograd.grad(T**2 * (q.exp() * (q - target.log())).sum(), z)[0]


@reverse.right("torch.func")
def _(student_logits, target, T):
    def f(z):
        return T**2 * F.kl_div(
            target.log(), F.log_softmax(z / T, -1), log_target=True, reduction="sum"
        )

    return torch.func.grad(f)(student_logits)


@reverse.right("numpy, token by token")
def _(student_logits, target, T):
    out = np.zeros(student_logits.shape)
    for at in np.ndindex(*student_logits.shape[:-1]):
        z, p = student_logits[at].double().numpy() / T, target[at].double().numpy()
        q = np.exp(z - z.max())
        q /= q.sum()
        gap = z - z.max() - np.log(np.exp(z - z.max()).sum()) - np.log(p)
        out[at] = T * q * (gap - q @ gap)
    return out


reverse.right(
    "without the log-softmax's constant",
    lambda z, p, T: (
        T * (q := (z / T).softmax(-1)) * ((g := z / T - p.log()) - (q * g).sum(-1, keepdim=True))
    ),
)
reverse.right("float64", lambda z, p, T: slope(z.double(), p.double(), T))
reverse.right(
    "einsum", back(base=lambda q, g: torch.einsum("...v,...v->...", q.exp(), g)[..., None])
)
