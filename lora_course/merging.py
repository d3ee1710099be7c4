"""Merging adapters that were trained apart on one base: states in, one state out.

    ΔWₖ = sₖ Bₖ Aₖ        what is wanted is a function of the ΔWₖ, not of the Aₖ and the Bₖ

    | merge | update of the result | rank | exact |
    |---|---|---|---|
    | `states.concatenate(states, weights)` | Σ wₖ ΔWₖ | Σ rₖ | yes |
    | `states.truncate(concatenate(…), r)` | the same, cut to its r largest singular triplets | r | from r = Σ rₖ on |
    | `ties` | TIES of the ΔWₖ, cut to r | r | at full rank |
    | `dare` | Σ wₖ (ΔWₖ with random entries dropped), cut to r | r | on average, at full rank |
    | `average_factors` | (Σ wₖ Bₖ)(Σ wₖ Aₖ): holds Bᵢ Aⱼ of different adapters | r | no: `cross_term_error` |

Sources: task arithmetic, arXiv 2212.04089; TIES, arXiv 2306.01708; DARE, arXiv 2311.03099. In PEFT's
`add_weighted_adapter` "cat" and "svd" are the first two; "ties_svd" and "dare_linear_svd" are `ties` and
`dare`; "linear", "ties" and "dare_linear" act on the factors, so they hold the cross terms.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_course.lora import AdapterState
from lora_course.states import (
    check_finite,
    check_rank,
    check_weights,
    concatenate,
    relative_error,
    split_state,
    widened,
)


class Merged(NamedTuple):
    """A merge and what the cut to rank r lost of it: ‖ΔW − ΔW_r‖ / ‖ΔW‖ over all modules (Frobenius)."""

    state: AdapterState
    truncation_error: float


def average_factors(
    states: Sequence[AdapterState], weights: Sequence[float] | None = None
) -> AdapterState:
    """Σ wₖ Aₖ and Σ wₖ Bₖ, 1/n each by default, with the first adapter's scaling: what the notes do, and **not** an average of updates.

    Its update is s Σᵢⱼ wᵢ wⱼ Bᵢ Aⱼ. Even a single adapter comes out wrong unless its weight is 1. Here to be
    measured (`cross_term_error`), not to be used.

    With wₖ = √(vₖ sₖ) in place of the wₖ (and scaling 1) it is PEFT's combination_type="linear" of the
    weights vₖ: right in the terms i = j, wrong by the others (PEFT issue 3004).

    Raises:
        ValueError: weights of another number, states of different ranks or modules.
    """
    weights = _check(states, weights, default=1 / max(1, len(states)))
    for state in states:
        split_state(state)
        check_finite(state)
    merged: AdapterState = {}
    for key in dict.fromkeys(key for state in states for key in state):
        tensors = [state[key] for state in states if key in state]
        first = tensors[0]
        shapes = [list(state[key].shape) if key in state else None for state in states]
        if any(shape != list(first.shape) for shape in shapes):
            raise ValueError(
                f"{key!r} has the shapes {shapes}: factors can only be averaged at one rank. Use concatenate, which needs none."
            )
        mean = _sum(w * widened(tensor) for w, tensor in zip(weights, tensors, strict=True))
        merged[key] = first.clone() if key.endswith(".scaling") else mean
    return merged


def cross_term_error(
    states: Sequence[AdapterState], weights: Sequence[float] | None = None
) -> float:
    """How far `average_factors` is from the weighted sum of the updates, relative to that sum.

    √(1 − 1/n) is expected of n independent adapters of equal size and weight: of the n² terms Bᵢ Aⱼ/n² that
    should be n.
    """
    weights = _check(states, weights, default=1 / max(1, len(states)))
    return relative_error(average_factors(states, weights), concatenate(states, weights))


def ties(
    states: Sequence[AdapterState],
    r: int | None,
    density: float = 0.2,
    weights: Sequence[float] | None = None,
) -> Merged:
    """TIES: trim each update, elect a sign for each entry, average the entries that have it.

        (sign 0 = +1, as in PEFT)
        τₖ = the `density` · numel largest entries of ΔWₖ, else 0        γ = sign Σₖ τₖ
        ΔW = Σ_{k: sign τₖ = γ} wₖ τₖ / #{k: sign τₖ = γ}

    Args:
        states: plain LoRA states (`factor_state(model)`); a module that some lack is merged from the others.
        r: rank of the result; None keeps all min(out, in) singular triplets, so that nothing is cut.
        density: share of each update's entries that is kept, in (0, 1]; the paper's default is the top 20%.
        weights: wₖ, 1 each by default; the paper's λ is wₖ = λ for all. As in PEFT the signs are elected before weighting.

    Returns:
        The merged state, scaling 1, and the share that the cut to rank r lost.

    One module's dense updates are in memory at a time. So the trimming is by module, as in PEFT; the paper's
    code trims the whole model's entries together, which would need all of them at once.
    """
    weights = _check(states, weights, default=1.0, density=density)

    def merge(deltas: list[Tensor], weights: list[float]) -> Tensor:
        trimmed = [_largest(delta, density) for delta in deltas]
        elected = torch.where(_sum(trimmed) >= 0, 1.0, -1.0)
        agreeing = [tensor.sign() == elected for tensor in trimmed]
        total = _sum(
            w * tensor * agrees
            for w, tensor, agrees in zip(weights, trimmed, agreeing, strict=True)
        )
        return total / _sum(agrees.to(total.dtype) for agrees in agreeing).clamp(min=1)

    return _merge(states, weights, merge, r)


def dare(
    states: Sequence[AdapterState],
    r: int | None,
    density: float = 0.5,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Merged:
    """DARE: drop entries of each update at random, rescale the rest, add up.

        ΔW = Σ wₖ mₖ ⊙ ΔWₖ / density,   mₖ ~ Bernoulli(density) an entry,   E[ΔW] = Σ wₖ ΔWₖ

    The mask makes a low-rank update one of full rank, with noise of relative size √(1/density − 1) that lies
    in all directions. A cut to a small r removes most of that noise, and the mean is no longer exactly kept.

    Args and returns as `ties`. density: what the paper calls 1 − p. weights: 1 each by default, which *adds*
    the updates; 1/n for their mean. seed: of the masks, drawn on the CPU, adapter by adapter within module by
    module.
    """
    weights = _check(states, weights, default=1.0, density=density)
    generator = torch.Generator().manual_seed(seed)

    def merge(deltas: list[Tensor], weights: list[float]) -> Tensor:
        kept = [
            torch.bernoulli(torch.full(d.shape, density), generator=generator).to(d) * d
            for d in deltas
        ]
        return _sum(w / density * delta for w, delta in zip(weights, kept, strict=True))

    return _merge(states, weights, merge, r)


def _merge(
    states: Sequence[AdapterState],
    weights: list[float],
    merge: Callable[[list[Tensor], list[float]], Tensor],
    r: int | None,
) -> Merged:
    if r is not None:
        check_rank(r)
    # concatenate folds the scaling into B, and refuses what is not plain LoRA
    parts = [split_state(concatenate([state])) for state in states]
    merged: AdapterState = {}
    lost, whole = 0.0, 0.0
    for module in split_state(concatenate(states)):  # refuses states of different bases
        here = [
            (part[module], weight)
            for part, weight in zip(parts, weights, strict=True)
            if module in part
        ]
        delta = merge(
            [factors["B"] @ factors["A"] for factors, _ in here], [weight for _, weight in here]
        )
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        root = S[:r].sqrt()
        A, B = root[:, None] * Vh[:r], U[:, :r] * root
        # An SVD's factors lie transposed in memory; saved and loaded again they would give other last bits.
        merged |= {f"{module}.A": A.contiguous(), f"{module}.B": B.contiguous()}
        merged[f"{module}.scaling"] = torch.ones((), dtype=torch.float64)
        squares = S.double().square()
        lost, whole = lost + squares[len(root) :].sum().item(), whole + squares.sum().item()
    return Merged(merged, math.sqrt(lost / whole) if whole else 0.0)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return sum(parts, torch.zeros(()))


def _largest(delta: Tensor, density: float) -> Tensor:
    """`delta` with all but its int(density · numel) largest entries at zero."""
    flat, kept = delta.flatten(), int(density * delta.numel())
    places = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view_as(delta)


def _check(
    states: Sequence[AdapterState],
    weights: Sequence[float] | None,
    default: float,
    density: float = 1.0,
) -> list[float]:
    weights = check_weights(states, weights, default)
    if not isinstance(density, numbers.Real) or not 0 < density <= 1:
        raise ValueError(
            f"density={density!r}: the share of entries kept is expected, more than 0 and at most 1."
        )
    return weights
