"""Checks of the exercises in chapter 2.1, multi-expert LoRA."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def _kept(p: Tensor, k: int) -> Tensor:
    """Which are the k largest of the last dimension, bool."""
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(k).indices, True)


def spread_rest(logits, k):
    p = logits.softmax(-1)
    kept = p * _kept(p, k)
    return kept + _kept(p, k) * (1 - kept.sum(-1, keepdim=True)) / k


def _gates(make):
    """Gates of probabilities and of what is kept of them."""
    return lambda logits, k: make(logits.softmax(-1), _kept(logits, k), k)


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
        _gates(lambda p, kept, k: p * kept + _kept(p, 1) * (1 - (p * kept).sum(-1, keepdim=True))),
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
        100 + 60 * logits(T, B, E),
        2,
        hint="With large logits it goes wrong: exp() of them overflows.",
    )


def balance(p, real, k, *, f=None, P=None, over=None, factor=None):
    """E · Σ f P over the tokens `over`; `f` and `P` make the shares of the weights of the tokens."""
    over = real if over is None else over
    weight = (over / over.sum().clamp(min=1))[..., None]
    chosen = (weight * _kept(p, k) / k).sum((0, 1)) if f is None else f(p, weight)
    mean = (weight * p).sum((0, 1)) if P is None else P(p, weight)
    return (p.shape[-1] if factor is None else factor) * (chosen.detach() * mean).sum()


def _balance(**other):
    return lambda p, real, k: balance(p, real, k, **other)


BALANCE_MISTAKES = {
    "The factor E is missing: the loss is 1 where all experts are used equally.": _balance(factor=1),
    "f counts the largest probability only; each token has k choices here.": lambda p, real, k: balance(p, real, 1),
    "Each of a token's k choices counts fully, so the shares sum to k: divide by k.":
        lambda p, real, k: k * balance(p, real, k),
    "Padding counts: leave out the tokens that `real` says are none.":
        lambda p, real, k: balance(p, real, k, over=torch.ones_like(real)),
    "Padding counts in P: its mean is over the real tokens.": _balance(P=lambda p, weight: p.mean((0, 1))),
    "Padding counts in f: its shares are of the real tokens.":
        lambda p, real, k: balance(p, real, k, f=lambda p, w: (_kept(p, k) / k).mean((0, 1))),
    "Padding is left out of the sums, but the number of tokens counts it.":
        lambda p, real, k: balance(p, real, k) * real.float().mean() ** 2,
    "`real` is turned round: it is true where a token is real.": lambda p, real, k: balance(p, ~real, k),
    "You took the mean probability twice: f is the share of choices.":
        _balance(f=lambda p, weight: (weight * p).sum((0, 1))),
    "You took the share of choices twice; one of the two factors is the mean probability, which has a gradient.":
        lambda p, real, k: balance(p, real, k, P=lambda p, w: (w * _kept(p, k) / k).sum((0, 1))) + 0 * p.sum(),
}  # fmt: skip


@exercise(
    "2.1-b",
    points=2,
    right=lambda p, real, k: balance(p, real, k),
    gradients=("p",),
    mistakes=BALANCE_MISTAKES,
    otherwise="This is not E · Σ f P over the real tokens, or its gradient is not that of P.",
)
def check_balance_over(draw: Draw):
    """The balance loss over real tokens, with k choices a token."""
    for k, kind, hint in [
        (1, "all", ""),
        (2, "all", "With two choices a token it goes wrong."),
        (1, "left", "With padding it goes wrong: f and P are both of the real tokens only."),
        (3, "any", "With padding anywhere and three choices it goes wrong."),
        (
            2,
            "row",
            "Where a row has no real token it goes wrong: all real tokens count alike, whatever row they are in.",
        ),
        (2, "one", "Where a single token is real it goes wrong."),
        (
            2,
            "none",
            "Where no token is real it goes wrong: the loss is 0 then, and so is its gradient.",
        ),
    ]:
        B, T, E = draw.sizes(3, 4, 8)
        real = torch.ones(B, T, dtype=torch.bool)
        if kind == "left":
            lengths = torch.tensor([draw.integer(1, T) for _ in range(B - 1)] + [1])
            real = torch.arange(T) >= T - lengths[:, None]
        elif kind in ("any", "row"):
            real = draw.uniform(B, T) < 0.6
            real[0], real[1, 0] = kind == "any", True
        elif kind in ("one", "none"):
            real.zero_()[0, 1] = kind == "one"
        yield case((draw.normal(B, T, E) * 2).softmax(-1), real, k, hint=hint)


def sequence_gates(
    hidden, real, W, prefix, *, pool=None, own=True, first=F.normalize, last=F.normalize, mean=False
):
    inside = real.long().cumsum(1) <= prefix
    pool = inside & real if pool is None else pool
    total = (first(hidden, dim=-1) * pool[..., None]).sum(1)
    u = last(total / pool.sum(1, keepdim=True) if mean else total, dim=-1)
    p = (u @ W.T).softmax(-1)[:, None].expand(-1, hidden.shape[1], -1)
    return torch.where(inside[..., None], 1 / len(W), p) if own else p


def _use_gates(found, hidden, real, W, prefix):
    """The gates of real tokens: what padding gets is left open."""
    tensor, shape = as_tensor(found), [*real.shape, len(W)]
    mistake(
        tensor is None or list(tensor.shape) != shape,
        "Gates [B, T, E] = {} are expected: one set for each token of each sequence.", shape,
    )  # fmt: skip
    return torch.where(real[..., None], tensor, torch.zeros((), dtype=tensor.dtype))


def _not(x, dim):
    return x


SEQUENCE_MISTAKES = {
    "A token's gates change with the tokens after it: average over the first `prefix` real tokens only.":
        lambda h, real, W, prefix: sequence_gates(h, real, W, prefix, pool=real),
    "The prefix's own tokens see the average over the whole prefix, so the first one looks ahead: give them equal gates.":
        lambda h, real, W, prefix: sequence_gates(h, real, W, prefix, own=False),
    "The first `prefix` *places* of a row are taken; where padding is on the left they are not its first real tokens.":
        lambda h, real, W, prefix: torch.where(
            (torch.arange(real.shape[1]) < prefix)[None, :, None], 1 / len(W), sequence_gates(
                h, real, W, prefix, pool=(torch.arange(real.shape[1]) < prefix) & real, own=False)),
    "Padding is averaged too: it is no token.":
        lambda h, real, W, prefix: sequence_gates(h, real, W, prefix, pool=real.long().cumsum(1) <= prefix),
    "`prefix` is one too many.": lambda h, real, W, prefix: sequence_gates(h, real, W, prefix + 1),
    "`prefix` is one too few.": lambda h, real, W, prefix: sequence_gates(h, real, W, prefix - 1),
    "Hidden states are averaged as they are; each is divided by its norm first.":
        lambda h, real, W, prefix: sequence_gates(h, real, W, prefix, first=_not),
    "The average is not divided by its norm.":
        lambda h, real, W, prefix: sequence_gates(h, real, W, prefix, last=_not, mean=True),
    "The sum of the prefix is not divided by its norm.":
        lambda h, real, W, prefix: sequence_gates(h, real, W, prefix, last=_not),
    "Each token has gates of its own here: a sequence gate has one set for all tokens after the prefix.":
        lambda h, real, W, prefix: torch.where(
            (real.long().cumsum(1) <= prefix)[..., None], 1 / len(W), (F.normalize(h, dim=-1) @ W.T).softmax(-1)),
}  # fmt: skip


@exercise(
    "2.1-c",
    points=2,
    right=lambda hidden, real, W, prefix: sequence_gates(hidden, real, W, prefix),
    look=_use_gates,
    mistakes=SEQUENCE_MISTAKES,
    otherwise="The gates are not softmax(W u) for u, the normalised mean of the first `prefix` normalised hidden states.",
)
def check_sequence_gates(draw: Draw):
    """Gates of a sequence router that looks at a prefix."""
    for kind, hint in [
        ("all", ""),
        (
            "left",
            "With padding on the left it goes wrong: the prefix is the first *real* tokens of each row.",
        ),
        ("right", "With padding on the right it goes wrong: it is not averaged."),
        (
            "short",
            "Where a row has no more real tokens than `prefix` it goes wrong: they all have equal gates.",
        ),
        ("one", "With a prefix of one token it goes wrong."),
        ("long", "With a prefix longer than the sequence it goes wrong."),
        (
            "left",
            "With padding on the left it goes wrong: the prefix is the first *real* tokens of each row.",
        ),
    ]:
        B, T, E, width = draw.sizes(4, 4, 9)
        T += 3
        prefix = {"one": 1, "long": T + 2}.get(kind, draw.integer(2, 4))
        lengths = torch.tensor(
            [draw.integer(prefix + 1, T) for _ in range(B)] if prefix < T else [T] * B
        )
        if kind == "short":
            lengths[:2] = torch.tensor([1, prefix])
        real = (
            torch.arange(T) < lengths[:, None]
            if kind in ("right", "short")
            else torch.ones(B, T).bool()
        )
        if kind == "left":
            real = torch.arange(T) >= T - lengths[:, None]
        hidden = draw.normal(B, T, width) * draw.uniform(B, T, 1, low=0.2, high=5)
        yield case(hidden, real, 2 * draw.normal(E, width), prefix, hint=hint)
