"""Exercise 2.1-c: gates of a sequence, from its prefix."""

import torch
from torch.nn import functional as F

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


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
