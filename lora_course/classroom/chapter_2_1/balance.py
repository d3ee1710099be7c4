"""Exercise 2.1-b: a balance loss of k choices."""

import torch

from lora_course.classroom.chapter_2_1.gates import is_kept
from lora_course.classroom.exercises import Draw, case, exercise


def balance(p, real, k, *, f=None, P=None, over=None, factor=None):
    """E · Σ f P over the tokens `over`; `f` and `P` make the shares of the weights of the tokens."""
    over = real if over is None else over
    weight = (over / over.sum().clamp(min=1))[..., None]
    chosen = (weight * is_kept(p, k) / k).sum((0, 1)) if f is None else f(p, weight)
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
        lambda p, real, k: balance(p, real, k, f=lambda p, w: (is_kept(p, k) / k).mean((0, 1))),
    "Padding is left out of the sums, but the number of tokens counts it.":
        lambda p, real, k: balance(p, real, k) * real.float().mean() ** 2,
    "`real` is turned round: it is true where a token is real.": lambda p, real, k: balance(p, ~real, k),
    "You took the mean probability twice: f is the share of choices.":
        _balance(f=lambda p, weight: (weight * p).sum((0, 1))),
    "You took the share of choices twice; one of the two factors is the mean probability, which has a gradient.":
        lambda p, real, k: balance(p, real, k, P=lambda p, w: (w * is_kept(p, k) / k).sum((0, 1))) + 0 * p.sum(),
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
