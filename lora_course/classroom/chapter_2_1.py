"""Checks of the exercises in chapter 2.1, multi-expert LoRA."""

import torch
from torch.nn import functional as F

from lora_course.classroom.first_exercises import exercise, mistake


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found.float(), expected, atol=1e-5)


@exercise("2.1-a", points=1)
def check_top_k(learner):
    """`learner(logits, k)` → gates `[..., E]`: the k largest probabilities, divided by their sum."""
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 2
    p = logits.softmax(-1)
    values, chosen = p.topk(2)
    kept = torch.zeros_like(p).scatter(-1, chosen, values)
    found = learner(logits.clone(), 2)
    mistake(
        not isinstance(found, torch.Tensor) or found.shape != logits.shape,
        "Gates of the shape {} are expected, one for each expert: zeros for those that are not chosen.",
        list(logits.shape),
    )
    mistake(_close(found, p), "All experts still have a gate: keep the k largest only.")
    mistake(
        _close(found, kept),
        "The gates don't sum to one: divide the kept probabilities by their sum.",
    )
    mistake(
        _close(found, torch.where(kept > 0, logits, 0).softmax(-1)),
        "You set the other logits to zero before the softmax; a logit of zero is not a probability of zero. Use -inf, or choose after the softmax.",
    )
    mistake(
        _close(found, (kept > 0).float() / 2),
        "The chosen experts all have the same gate: keep their probabilities.",
    )
    mistake(
        not _close(found, kept / kept.sum(-1, keepdim=True)),
        "The gates are not the two largest probabilities divided by their sum.",
    )
    three = p.topk(3)
    expected = torch.zeros_like(p).scatter(
        -1, three.indices, three.values / three.values.sum(-1, keepdim=True)
    )
    mistake(
        not _close(learner(logits.clone(), 3), expected),
        "With k = 3 it goes wrong: use the argument.",
    )


@exercise("2.1-b", points=2)
def check_balance(learner):
    """`learner(p, real)` → Switch's balance loss of probabilities `[B, T, E]` over the real tokens `[B, T]`."""
    generator = torch.Generator().manual_seed(1)
    p = (torch.randn(4, 6, 5, generator=generator) * 2).softmax(-1)
    real = torch.arange(6)[None] >= torch.tensor([0, 2, 3, 5])[:, None]

    def loss(p: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        rows = p[real]
        f = torch.bincount(rows.argmax(-1), minlength=p.shape[-1]) / len(rows)
        return p.shape[-1] * (f * rows.mean(0)).sum()

    def number(*arguments: torch.Tensor) -> float:
        found = learner(*arguments)
        return (
            found.item() if isinstance(found, torch.Tensor) and found.numel() == 1 else float(found)
        )

    everything = torch.ones_like(real)
    whole, right = loss(p, everything).item(), loss(p, real).item()
    close = lambda a, b: abs(a - b) < 1e-4  # noqa: E731
    found = number(p, everything)
    mistake(
        close(found, whole / 5),
        "The factor E is missing: the loss is 1 where all experts are used equally.",
    )
    mistake(
        close(found, (5 * p.mean((0, 1)).square().sum()).item()),
        "You took the mean probability twice: f is the share of tokens whose largest probability is the expert's.",
    )
    mistake(
        close(
            found,
            (5 * (torch.bincount(p.argmax(-1).flatten(), minlength=5) / 24).square().sum()).item(),
        ),
        "You took the share of tokens twice: it has no gradient. One of the two factors is the mean probability.",
    )
    mistake(not close(found, whole), "Without padding it is {:.4f}, not {:.4f}.", whole, found)
    found = number(p, real)
    mistake(close(found, whole), "Padding counts: leave out the tokens that `real` says are none.")
    mistake(
        not close(found, right),
        "With padding it is {:.4f}, not {:.4f}: divide both f and P by the number of real tokens.",
        right,
        found,
    )
    q = p.clone().requires_grad_()
    result = learner(q, everything)
    mistake(
        not (isinstance(result, torch.Tensor) and result.requires_grad),
        "The loss has no gradient: return a tensor, and let the mean probability keep its graph.",
    )


@exercise("2.1-c", points=2)
def check_sequence_gates(learner):
    """`learner(hidden, real, W, prefix)` → gates `[B, T, E]` of a sequence gate."""
    generator = torch.Generator().manual_seed(2)
    hidden, W = (
        torch.randn(3, 8, 6, generator=generator) * 3,
        torch.randn(4, 6, generator=generator) * 2,
    )
    left = torch.arange(8)[None] >= torch.tensor([0, 2, 4])[:, None]

    def gates(
        hidden: torch.Tensor, real: torch.Tensor, prefix: int, pool: torch.Tensor | None = None
    ) -> torch.Tensor:
        inside = real.long().cumsum(1) <= prefix
        pooled = F.normalize(
            (
                F.normalize(hidden, dim=-1) * (real & inside if pool is None else pool)[..., None]
            ).sum(1),
            dim=-1,
        )
        p = (pooled @ W.T).softmax(-1)[:, None]
        return torch.where(inside[..., None], torch.full_like(p, 1 / W.shape[0]), p)

    everything = torch.ones_like(left)
    found = learner(hidden.clone(), everything, W, 3)
    mistake(
        not isinstance(found, torch.Tensor) or found.shape != (3, 8, 4),
        "Gates [3, 8, 4] are expected: one set for each token of each sequence.",
    )
    mistake(
        not torch.allclose(found.sum(-1), torch.ones(3, 8), atol=1e-4),
        "The gates of a token don't sum to one.",
    )
    changed = hidden.clone()
    changed[:, 5:] += 1
    again = learner(changed, everything, W, 3)
    mistake(
        not torch.allclose(again[:, :5], found[:, :5], atol=1e-6),
        "A token's gates change with the tokens after it: average over the first `prefix` tokens only.",
    )
    expected = gates(hidden, everything, 3)
    mistake(
        _close(found[:, 3:], expected[:, 3:]) and not _close(found, expected),
        "The prefix's own tokens see the average over the whole prefix, so the first one looks ahead: give them equal gates.",
    )
    mistake(
        not _close(found, expected),
        "Without padding the gates are not softmax(W u) for u, the normalised mean of the first `prefix` normalised hidden states.",
    )
    found, expected = learner(hidden.clone(), left, W, 3), gates(hidden, left, 3)
    valid = left[..., None].expand_as(expected)
    mistake(
        not torch.allclose(found[valid], expected[valid], atol=1e-5),
        "With padding on the left it goes wrong: the prefix is the first *real* tokens of each row, and padding is not averaged.",
    )
    mistake(
        not _close(learner(hidden.clone(), everything, W, 5), gates(hidden, everything, 5)),
        "With prefix=5 it goes wrong: use the argument.",
    )
