"""Wrong and right answers to the exercises of chapter 2.1."""

import numpy as np
import torch
from torch.nn import functional as F

from lora_course.classroom.chapter_2_1 import (
    check_balance_over,
    check_sequence_gates,
    check_spread_rest,
)
from tests.exercises import Answers

gates = Answers(check_spread_rest)


def top(p, k):
    return torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1.0)


def rest_shared(logits, k):
    p = logits.softmax(-1)
    kept = p * top(p, k)
    return kept + top(p, k) * (1 - kept.sum(-1, keepdim=True)) / k


def from_mass(make):
    return lambda logits, k: make(logits.softmax(-1), top(logits, k), k)


gates.wrong("all", lambda logits, k: logits.softmax(-1))
gates.wrong("the rest is lost", from_mass(lambda p, m, k: p * m))
gates.wrong(
    "divided by their sum", from_mass(lambda p, m, k: p * m / (p * m).sum(-1, keepdim=True))
)
gates.wrong(
    "masked with -inf",
    lambda logits, k: logits.masked_fill(top(logits, k) == 0, -torch.inf).softmax(-1),
)
gates.wrong("masked with 0", lambda logits, k: (logits * top(logits, k)).softmax(-1))
gates.wrong("equal gates", from_mass(lambda p, m, k: 0 * p + m / k))
gates.wrong(
    "the rest to all",
    from_mass(lambda p, m, k: p * m + (1 - (p * m).sum(-1, keepdim=True)) / p.shape[-1]),
)
gates.wrong(
    "the rest to the others",
    from_mass(
        lambda p, m, k: (
            p * m + (1 - m) * (1 - (p * m).sum(-1, keepdim=True)) / (p.shape[-1] - k + 1e-9)
        )
    ),
)
gates.wrong(
    "the whole rest to each", from_mass(lambda p, m, k: m * (p + 1 - (p * m).sum(-1, keepdim=True)))
)
gates.wrong(
    "the rest to the largest",
    from_mass(lambda p, m, k: p * m + top(p, 1) * (1 - (p * m).sum(-1, keepdim=True))),
)
gates.wrong("the smallest", lambda logits, k: rest_shared(-logits, k))
gates.wrong("k is 2", lambda logits, k: rest_shared(logits, 2))
gates.wrong("k + 1", lambda logits, k: rest_shared(logits, min(k + 1, logits.shape[-1])))
gates.wrong("values only", lambda logits, k: rest_shared(logits, k).topk(k).values)
gates.wrong(
    "over the batch",
    lambda logits, k: rest_shared(logits.movedim(0, -1), min(k, logits.shape[0])).movedim(-1, 0),
)
gates.wrong("softmax over tokens", lambda logits, k: rest_shared(logits.softmax(0).log(), k))
gates.wrong("detached", lambda logits, k: rest_shared(logits, k).detach())
gates.wrong(
    "rest detached",
    from_mass(lambda p, m, k: p * m + m * (1 - (p * m).sum(-1, keepdim=True)).detach() / k),
)
gates.wrong(
    "kept detached",
    from_mass(lambda p, m, k: (p * m).detach() + m * (1 - (p * m).sum(-1, keepdim=True)) / k),
)
gates.wrong("numpy: no gradient", lambda logits, k: rest_shared(logits.detach(), k).numpy())
gates.wrong(
    "exp of large logits",
    lambda logits, k: (
        lambda e: (
            lambda p: p * top(p, k) + top(p, k) * (1 - (p * top(p, k)).sum(-1, keepdim=True)) / k
        )(e / e.sum(-1, keepdim=True))
    )(logits.exp()),
)
gates.wrong(
    "two dimensions only",
    lambda logits, k: torch.stack(
        [torch.stack([rest_shared(t, k) for t in row]) for row in logits]
    ),
)


@gates.wrong("subtracts in the caller's logits")
def _(logits, k):
    answer = rest_shared(logits, k)
    logits.data -= logits.data.amax(-1, keepdim=True)
    return answer


gates.right("as the solution", rest_shared)
gates.right(
    "scatter of values",
    lambda logits, k: (
        lambda t: torch.zeros_like(logits).scatter(
            -1, t.indices, t.values + (1 - t.values.sum(-1, keepdim=True)) / k
        )
    )(logits.softmax(-1).topk(k)),
)
gates.right(
    "from the others' sum",
    from_mass(lambda p, m, k: m * (p + (p * (1 - m)).sum(-1, keepdim=True) / k)),
)
gates.right(
    "sorted",
    lambda logits, k: (
        lambda p: torch.where(
            p >= p.sort(-1, descending=True).values[..., k - 1 : k],
            p + (1 - p.topk(k).values.sum(-1, keepdim=True)) / k,
            0 * p,
        )
    )(logits.softmax(-1)),
)
gates.right(
    "log-softmax",
    lambda logits, k: (lambda p: top(p, k) * (p + (1 - (top(p, k) * p).sum(-1, keepdim=True)) / k))(
        F.log_softmax(logits, -1).exp()
    ),
)
gates.right("in 64 bits", lambda logits, k: rest_shared(logits.double(), k))


@gates.right("one token at a time")
def _(logits, k):
    rows = []
    for row in logits.reshape(-1, logits.shape[-1]):
        p = row.softmax(0)
        kept = p.argsort(descending=True)[:k]
        gate = torch.zeros_like(p)
        gate[kept] = p[kept] + (1 - p[kept].sum()) / k
        rows.append(gate)
    return torch.stack(rows).reshape(logits.shape)


@gates.wrong("shifted by the largest of all tokens")
def _(logits, k):
    e = (logits - logits.max()).exp()
    p = e / e.sum(-1, keepdim=True)
    return top(p, k) * (p + (1 - (top(p, k) * p).sum(-1, keepdim=True)) / k)


@gates.right("by log-sum-exp")
def _(logits, k):
    p = (logits - logits.logsumexp(-1, keepdim=True)).exp()
    return top(p, k) * (p + (1 - (top(p, k) * p).sum(-1, keepdim=True)) / k)


loss = Answers(check_balance_over)


def share(p, real, k):
    return (top(p, k) * real[..., None]).sum((0, 1)) / k / real.sum().clamp(min=1)


def mean(p, real):
    return (p * real[..., None]).sum((0, 1)) / real.sum().clamp(min=1)


def balanced(p, real, k):
    return p.shape[-1] * (share(p, real, k) * mean(p, real)).sum()


def every(real):
    return torch.ones_like(real)


def printed(p):
    """The chapter's own function, for one choice a token."""
    f = torch.bincount(p.argmax(-1), minlength=p.shape[-1]) / len(p)
    return p.shape[-1] * (f * p.mean(0)).sum()


loss.wrong("no E", lambda p, real, k: balanced(p, real, k) / p.shape[-1])
loss.wrong("the chapter's", lambda p, real, k: printed(p[real]))
loss.wrong("T for E", lambda p, real, k: balanced(p, real, k) / p.shape[-1] * p.shape[1])
loss.wrong("k for E", lambda p, real, k: balanced(p, real, k) / p.shape[-1] * k)
loss.wrong("not divided by k", lambda p, real, k: k * balanced(p, real, k))
loss.wrong("one choice", lambda p, real, k: balanced(p, real, 1))
loss.wrong("P twice", lambda p, real, k: p.shape[-1] * mean(p, real).square().sum())
loss.wrong(
    "P twice, one detached",
    lambda p, real, k: p.shape[-1] * (mean(p, real).detach() * mean(p, real)).sum(),
)
loss.wrong(
    "f twice", lambda p, real, k: p.shape[-1] * share(p, real, k).square().sum() + 0 * p.sum()
)
loss.wrong("padding in both", lambda p, real, k: balanced(p, every(real), k))
loss.wrong(
    "padding in P", lambda p, real, k: p.shape[-1] * (share(p, real, k) * p.mean((0, 1))).sum()
)
loss.wrong(
    "padding in f",
    lambda p, real, k: p.shape[-1] * (share(p, every(real), k) * mean(p, real)).sum(),
)
loss.wrong(
    "padding in the number", lambda p, real, k: balanced(p, real, k) * real.float().mean() ** 2
)
loss.wrong("turned round", lambda p, real, k: balanced(p, ~real, k))
loss.wrong("a number", lambda p, real, k: balanced(p, real, k).item())
loss.wrong("detached", lambda p, real, k: balanced(p.detach(), real, k))
loss.wrong("detached with a graph", lambda p, real, k: balanced(p.detach(), real, k) + 0 * p.sum())
loss.wrong(
    "half the gradient",
    lambda p, real, k: (balanced(p, real, k) + balanced(p.detach(), real, k)) / 2,
)
loss.wrong(
    "NaN where nothing is real", lambda p, real, k: balanced(p, real, k) * (real.sum() / real.sum())
)
loss.wrong("minus", lambda p, real, k: -balanced(p, real, k))
loss.wrong("a vector", lambda p, real, k: p.shape[-1] * share(p, real, k) * mean(p, real))
loss.wrong(
    "unweighted rows",
    lambda p, real, k: torch.stack(
        [balanced(a[None], r[None], k) for a, r in zip(p, real, strict=True)]
    ).mean(),
)
loss.wrong(
    "rows with real tokens",
    lambda p, real, k: torch.stack(
        [balanced(a[None], r[None], k) for a, r in zip(p, real, strict=True) if r.any()]
        or [0 * p.sum()]
    ).mean(),
)
loss.wrong("minus one", lambda p, real, k: balanced(p, real, k) - 1)
loss.wrong(
    "k smallest", lambda p, real, k: p.shape[-1] * (share(-p, real, k) * mean(p, real)).sum()
)
loss.wrong(
    "probabilities of the chosen",
    lambda p, real, k: p.shape[-1] * (share(p, real, k) * mean(p * top(p, k), real)).sum(),
)


@loss.wrong("zeroes the caller's padding")
def _(p, real, k):
    p.data[~real] = 0
    return balanced(p, real, k)


@loss.wrong("fills the caller's mask")
def _(p, real, k):
    answer = balanced(p, real, k)
    real.fill_(True)
    return answer


loss.right("as the solution", balanced)
loss.right(
    "rows taken out",
    lambda p, real, k: (
        p.shape[-1]
        * (
            F.one_hot(p[real].topk(k).indices, p.shape[-1]).sum((0, 1))
            / max(1, k * int(real.sum()))
            * p[real].sum(0)
            / max(1, int(real.sum()))
        ).sum()
    ),
)
loss.right(
    "bincount",
    lambda p, real, k: (
        p.shape[-1]
        * (
            torch.bincount(p[real].topk(k).indices.flatten(), minlength=p.shape[-1])
            / max(1, k * int(real.sum()))
            @ p[real].sum(0)
        )
        / max(1, int(real.sum()))
    ),
)
loss.right(
    "a loop over experts",
    lambda p, real, k: (
        p.shape[-1] * sum(share(p, real, k)[e] * mean(p, real)[e] for e in range(p.shape[-1]))
    ),
)
loss.right("in 64 bits", lambda p, real, k: balanced(p.double(), real, k))
loss.right("one element", lambda p, real, k: balanced(p, real, k).reshape(()))
loss.right(
    "einsum",
    lambda p, real, k: (
        p.shape[-1]
        * torch.einsum("e,bte,bt->", share(p, real, k), p, real.float())
        / real.sum().clamp(min=1)
    ),
)
loss.right(
    "nothing real: zero times p",
    lambda p, real, k: balanced(p, real, k) if real.any() else 0 * p.sum(),
)


loss.right("a tensor of one element", lambda p, real, k: balanced(p, real, k).reshape(1))


sequence = Answers(check_sequence_gates)


def router(h, real, W, prefix, pool=None, own=True, unit=F.normalize, last=F.normalize):
    inside = real.long().cumsum(1) <= prefix
    pool = (inside & real) if pool is None else pool
    u = last((unit(h, dim=-1) * pool[..., None]).sum(1), dim=-1)
    p = (u @ W.T).softmax(-1)[:, None].expand(-1, h.shape[1], -1)
    return torch.where(inside[..., None], torch.full_like(p, 1 / len(W)), p) if own else p


def places(real, prefix):
    return (torch.arange(real.shape[1]) < prefix)[None].expand_as(real)


def plain(x, dim):
    return x


sequence.wrong("the whole row", lambda h, real, W, prefix: router(h, real, W, prefix, pool=real))
sequence.wrong(
    "the prefix looks ahead", lambda h, real, W, prefix: router(h, real, W, prefix, own=False)
)
sequence.wrong(
    "padding is real", lambda h, real, W, prefix: router(h, torch.ones_like(real), W, prefix)
)
sequence.wrong(
    "first places", lambda h, real, W, prefix: router(h, real, W, prefix, pool=places(real, prefix))
)
sequence.wrong(
    "first places that are real",
    lambda h, real, W, prefix: router(h, real, W, prefix, pool=places(real, prefix) & real),
)
sequence.wrong(
    "padding before the prefix is averaged",
    lambda h, real, W, prefix: router(h, real, W, prefix, pool=real.long().cumsum(1) <= prefix),
)
sequence.wrong("prefix 3", lambda h, real, W, prefix: router(h, real, W, 3))
sequence.wrong("one too many", lambda h, real, W, prefix: router(h, real, W, prefix + 1))
sequence.wrong("one too few", lambda h, real, W, prefix: router(h, real, W, prefix - 1))
sequence.wrong(
    "own tokens one too few",
    lambda h, real, W, prefix: torch.where(
        (real.long().cumsum(1) < prefix)[..., None],
        1 / len(W),
        router(h, real, W, prefix, own=False),
    ),
)
sequence.wrong("one set a row", lambda h, real, W, prefix: router(h, real, W, prefix)[:, -1])
sequence.wrong("no first norm", lambda h, real, W, prefix: router(h, real, W, prefix, unit=plain))
sequence.wrong("no last norm", lambda h, real, W, prefix: router(h, real, W, prefix, last=plain))
sequence.wrong(
    "no norm at all", lambda h, real, W, prefix: router(h, real, W, prefix, unit=plain, last=plain)
)
sequence.wrong(
    "norms over the batch",
    lambda h, real, W, prefix: router(
        h, real, W, prefix, unit=lambda x, dim: F.normalize(x, dim=0)
    ),
)
sequence.wrong(
    "1-norm",
    lambda h, real, W, prefix: router(
        h, real, W, prefix, last=lambda x, dim: F.normalize(x, p=1, dim=dim)
    ),
)
sequence.wrong(
    "own gates zero",
    lambda h, real, W, prefix: torch.where(
        (real.long().cumsum(1) <= prefix)[..., None], 0.0, router(h, real, W, prefix, own=False)
    ),
)
sequence.wrong(
    "own gates 1",
    lambda h, real, W, prefix: torch.where(
        (real.long().cumsum(1) <= prefix)[..., None], 1.0, router(h, real, W, prefix, own=False)
    ),
)
sequence.wrong(
    "token gates",
    lambda h, real, W, prefix: torch.where(
        (real.long().cumsum(1) <= prefix)[..., None],
        1 / len(W),
        (F.normalize(h, dim=-1) @ W.T).softmax(-1),
    ),
)
sequence.wrong(
    "a running mean",
    lambda h, real, W, prefix: torch.where(
        (real.long().cumsum(1) <= prefix)[..., None],
        1 / len(W),
        (F.normalize((F.normalize(h, dim=-1) * real[..., None]).cumsum(1), dim=-1) @ W.T).softmax(
            -1
        ),
    ),
)
sequence.wrong(
    "last prefix tokens",
    lambda h, real, W, prefix: router(
        h, real, W, prefix, pool=real & (real.flip(1).long().cumsum(1).flip(1) <= prefix)
    ),
)
sequence.wrong(
    "softmax over the batch",
    lambda h, real, W, prefix: torch.where(
        (real.long().cumsum(1) <= prefix)[..., None],
        1 / len(W),
        (
            F.normalize(
                (
                    F.normalize(h, dim=-1) * (real & (real.long().cumsum(1) <= prefix))[..., None]
                ).sum(1),
                dim=-1,
            )
            @ W.T
        ).softmax(0)[:, None],
    ),
)
sequence.wrong("softmax twice", lambda h, real, W, prefix: router(h, real, W, prefix).softmax(-1))
sequence.wrong(
    "the first row's gates for all",
    lambda h, real, W, prefix: router(h, real, W, prefix)[:1].expand(len(h), -1, -1),
)


@sequence.wrong("zeroes the caller's padding")
def _(hidden, real, W, prefix):
    hidden[~real] = 0
    return router(hidden, real, W, prefix)


@sequence.wrong("normalises the caller's hidden states")
def _(hidden, real, W, prefix):
    hidden /= hidden.norm(dim=-1, keepdim=True)
    return router(hidden, real, W, prefix)


sequence.right("as the solution", router)
sequence.right(
    "the mean instead of the sum",
    lambda h, real, W, prefix: router(
        h, real, W, prefix, last=lambda x, dim: F.normalize(x / prefix, dim=dim)
    ),
)
sequence.right("numpy out", lambda h, real, W, prefix: router(h, real, W, prefix).numpy())
sequence.right(
    "in 64 bits", lambda h, real, W, prefix: router(h.double(), real, W.double(), prefix)
)
sequence.right(
    "equal gates for padding",
    lambda h, real, W, prefix: torch.where(real[..., None], router(h, real, W, prefix), 1 / len(W)),
)
sequence.right(
    "zeros for padding", lambda h, real, W, prefix: router(h, real, W, prefix) * real[..., None]
)


@sequence.right("row by row")
def _(hidden, real, W, prefix):
    out = torch.full((*hidden.shape[:2], len(W)), 1 / len(W))
    for row, mask in enumerate(real):
        positions = mask.nonzero().flatten()
        unit = torch.stack([h / h.norm() for h in hidden[row, positions[:prefix]]]).mean(0)
        out[row, positions[prefix:]] = (W @ (unit / unit.norm())).softmax(0)
    return out


@sequence.right("numpy")
def _(hidden, real, W, prefix):
    h, r, w = hidden.numpy(), real.numpy(), W.numpy()
    out = np.full((*h.shape[:2], len(w)), 1 / len(w))
    for i in range(len(h)):
        places = np.flatnonzero(r[i])
        u = (
            h[i, places[:prefix]] / np.linalg.norm(h[i, places[:prefix]], axis=1, keepdims=True)
        ).mean(0)
        z = w @ (u / np.linalg.norm(u))
        out[i, places[prefix:]] = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return out


loss.equivalent("tokens.sum(0) → tokens", "all of it is summed in the end")
sequence.equivalent("real.long() → real", "cumsum counts truth values as numbers")
sequence.equivalent("unit.sum → unit.mean", "the norm is divided out")
sequence.equivalent(
    "F.softmax(F.normalize(unit.sum(1), dim=-1) @ W.T, dim=-1) → F.softmax(F.normalize(unit.sum(1), dim=-1) @ W.T)",
    "the last dimension is the default of a matrix",
)
sequence.equivalent(
    "F.softmax(F.normalize(unit.sum(1), dim=-1) @ W.T, dim=-1) → F.softmax(F.normalize(unit.sum(1), dim=-1) @ W.T, dim=1)",
    "dimension 1 is the last of a matrix",
)
sequence.equivalent(
    "F.normalize(unit.sum(1), dim=-1) → F.normalize(unit.sum(1))", "dimension 1 is the default"
)
sequence.equivalent(
    "F.normalize(unit.sum(1), dim=-1) → F.normalize(unit.sum(1), dim=1)",
    "dimension 1 is the last of a matrix",
)
