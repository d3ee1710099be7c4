"""Nested-rank LoRA: one adapter, trained once, of which every prefix is an adapter too.

    y = W₀ x + b + s · Σ_{i ≤ b} Pᵢ Bᵢ Aᵢ x,        A ∈ R^{r×in},  B ∈ R^{out×r},  P ∈ R^r fixed,  s = α/r

Aᵢ is the i-th row of `A`, Bᵢ the i-th column of `B`, b ≤ r the rank at which the adapter is cut. A cut is a slice of both
factors, so the adapter at b is a prefix of that at b + 1. The scale s is that of the whole at every cut.

Two ways to make the prefixes good ones, both from one training:

- random truncation (DyLoRA, arXiv 2210.07558): a step trains the adapter cut at a rank that is drawn anew;
- Matryoshka weighting (MatryoshkaLoRA, arXiv 2605.07850): a step trains the mean of the adapter's cuts at the ranks it is to
  be served at. That is one low-rank update, with Pᵢ the share of these ranks that are ≥ i.

What the papers' code does about the scale is another thing. DyLoRA's multiplies both factors by √(r/b), so its scale is α/b.
MatryoshkaLoRA's trains the sum of the cuts, each with a scale of its own, and serves B[:, :b] A[:b] without P.

    inject(model, LoraConfig(r=8, …), layer=NestedLoRALinear, ranks=(1, 2, 4, 8))
    AdapterTrainer(model, args, callbacks=[RankSampler(model)], …).train()
    with at_rank(model, 2):
        export_peft(model, "adapter-2")                        # a plain LoRA adapter of rank 2
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_course.callbacks import ModelCallback
from lora_course.injection import layers_of
from lora_course.lora import AdapterState, LoRALinear, register
from lora_course.states import factor_state


@register
class NestedLoRALinear(LoRALinear):
    """A frozen linear layer plus an update that can be cut: `y = base(x) + scaling · B[:, :b] (P[:b] ∘ (A[:b] dropout(x)))`.

    The start is LoRA's: `B` zero, `A` not. Arguments are those of `LoRALinear`, and:

    Args:
        ranks: the ranks at which the adapter is to be served, rising, the last one r. By default the powers of two below
            r, and r.
        weighting: "equal" (P = 1) or "matryoshka" (Pᵢ = share of `ranks` that are ≥ i, so that the update is the mean of
            its cuts at `ranks`).

    Attributes:
        A: `[r, in]`.    B: `[out, r]`.    P: `[r]`, a buffer, saved with the adapter.    All fp32.
        rank: b, where the adapter is cut now; r after injecting or loading. Set it for a whole model with `at_rank`.
        weighted: whether P is used.    only_last: only the rows beyond the next smaller of `ranks` get a gradient.

    Raises:
        ValueError: ranks that do not rise to r, an unknown weighting, and as `LoRALinear`.
    """

    # One adapter is cut at one rank in all its layers.
    supported_fields = LoRALinear.supported_fields - {"rank_pattern"}

    P: Tensor

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        ranks: Sequence[int] | None = None,
        weighting: str = "equal",
        **fields: Any,
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, **fields)
        if ranks is not None and not isinstance(ranks, list | tuple | range):
            raise TypeError(
                f"ranks={ranks!r}: a list of rising ranks is expected, such as [1, 2, {r}]."
            )
        ranks = (
            [2**k for k in range(r.bit_length()) if 2**k < r] + [r]
            if ranks is None
            else list(ranks)
        )
        if (
            not all(isinstance(b, int) and b >= 1 for b in ranks)
            or sorted(set(ranks)) != ranks
            or ranks[-1:] != [r]
        ):
            raise ValueError(
                f"ranks={tuple(ranks)}, r={r}: rising whole numbers from 1 on are expected, of which the last is r."
            )
        if weighting not in ("equal", "matryoshka"):
            raise ValueError(f"weighting={weighting!r}: 'equal' or 'matryoshka' is expected.")
        self.ranks, self.weighting = tuple(ranks), weighting
        P = torch.ones(r) if weighting == "equal" else matryoshka_weights(ranks)
        self.register_buffer("P", P.to(self.A.device))
        self.rank, self.weighted, self.only_last = r, True, False
        # What `unmerge` goes back to; `at_rank` sets it.
        self.uncut: tuple[int, bool, bool] | None = None

    @property
    def kept(self) -> int:
        """How many of the first rows get no gradient: 0, or with `only_last` the next smaller of `ranks`."""
        return max((b for b in self.ranks if b < self.rank), default=0) if self.only_last else 0

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`(diag(P[:b]) A[:b], B[:, :b], scaling)` of the cut: the plain LoRA layer of rank b that computes the same."""
        A, B = self.A[: self.rank], self.B[:, : self.rank]
        if kept := self.kept:
            A, B = (
                torch.cat([A[:kept].detach(), A[kept:]]),
                torch.cat([B[:, :kept].detach(), B[:, kept:]], 1),
            )
        return A * self.P[: self.rank, None] if self.weighted else A, B, self.scaling

    def unmerge(self) -> None:
        """As `LoRALinear`; what was merged at a cut whose block has ended is then cut as it was before that block."""
        super().unmerge()
        if self.uncut:
            self.rank, self.weighted, self.only_last = self.uncut
            self.uncut = None

    def get_extra_state(self) -> Tensor:
        """As `LoRALinear`, and where it is cut: what is merged is the cut."""
        return torch.cat(
            [super().get_extra_state(), torch.tensor([self.rank, self.weighted]).double()]
        )

    def set_extra_state(self, state: Tensor) -> None:
        """As `LoRALinear`, cut as the merged part was; what is not merged, or of an earlier version, is whole."""
        super().set_extra_state(state)
        cut = self.merged and len(state) > 2
        self.rank, self.weighted = (int(state[2]), bool(state[3])) if cut else (self.r, True)
        self.uncut = (self.r, True, False) if cut else None

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        super().check_tensors(name, tensors)
        if tensors["A"].shape[0] != self.r or tensors["P"].shape != (self.r,):
            raise ValueError(
                f"The adapter's rank for {name!r} is {tensors['A'].shape[0]} and its P {list(tensors['P'].shape)}; this layer is "
                f"cut at {self.ranks} and needs rank {self.r}. Inject with the adapter's own r and ranks."
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}, weighting={self.weighting!r}, cut at {self.rank}"


def matryoshka_weights(ranks: Sequence[int]) -> Tensor:
    """P `[max(ranks)]`, with Pᵢ (i from 1 on) the share of `ranks` that are ≥ i.

    Since a cut at b holds the rows up to b, the mean over b in `ranks` of B[:, :b] A[:b] is B diag(P) A. With a scale s_b for
    each cut, and the sum in place of the mean, this is algorithm 1 of arXiv 2605.07850.
    """
    rows, cuts = torch.arange(1, max(ranks) + 1), torch.tensor(list(ranks))
    return (cuts >= rows[:, None]).float().mean(1)


@contextmanager
def at_rank(
    model: nn.Module, b: int, *, weighted: bool = True, only_last: bool = False
) -> Iterator[nn.Module]:
    """Within the block the adapter of `model` is its first b rows and columns: to run, to train, to merge, to export.

    Args:
        b: 1 … r, the same in all layers; one of `ranks` or not.
        weighted: False leaves P out, as MatryoshkaLoRA's authors serve. The function is then another one than was trained.
        only_last: True sends a gradient only to the rows beyond the next smaller of `ranks` (DyLoRA's "frozen" mode).

    With gradient checkpointing, `backward()` runs the layers again: call it within the block too. An adapter that is merged
    within the block stays cut at b after it, until `unmerge`.

    Raises:
        ValueError: another layer than `NestedLoRALinear`, a rank that it does not have.    RuntimeError: merged.
    """
    layers = list(layers_of(model, NestedLoRALinear).values())
    before = [(layer, (layer.rank, layer.weighted, layer.only_last)) for layer in layers]
    _set(layers, b, weighted, only_last)
    try:
        yield model
    finally:
        for layer, switches in before:
            if layer.merged:
                layer.uncut = switches
            else:
                layer.rank, layer.weighted, layer.only_last = switches


def cut(model: nn.Module, b: int, *, weighted: bool = True) -> AdapterState:
    """A copy of the adapter at rank b as plain LoRA factors: what `concatenate`, and `use_adapter` on plain LoRA, take.

    The slices of `A` and `B` (P goes into `A`), with the scale of the whole. Raises as `at_rank`.
    """
    with at_rank(model, b, weighted=weighted):
        return factor_state(model)


class RankSampler(ModelCallback):
    """Random truncation: before each step the adapter is cut at a rank drawn from the layers' `ranks`, all equally likely.

    In a loop: `sampler.begin_step(t); …backward(); optimizer.step(); sampler.end_step()`, t from 1 on. With a Trainer:
    `callbacks=[sampler]`, which does the same. The rank of a step depends on seed and step alone, so that a resumed run goes
    on as it was; micro-batches of one step share it. Between steps, and so in evaluation, the adapter is whole.

    Args:
        model: injected with `NestedLoRALinear`, of equal weighting: a cut of weighted cuts is neither method.
        seed: of the draws.
        only_last: see `at_rank`.
        hold: a row that the step does not train stays where it is. False leaves it to the optimiser, which goes on moving it
            by momentum and weight decay while no gradient says where to.

    Raises:
        ValueError: another layer, or Matryoshka weighting.
    """

    def __init__(
        self, model: nn.Module, seed: int = 0, *, only_last: bool = False, hold: bool = True
    ) -> None:
        super().__init__(model)
        self.layers = list(layers_of(model, NestedLoRALinear).values())
        self.seed, self.only_last, self.hold = seed, only_last, hold
        self.ranks = self.layers[0].ranks
        self.held: list[tuple[Tensor, Tensor]] = []
        if self.layers[0].weighting != "equal":
            raise ValueError(
                "These layers have Matryoshka weighting, which trains all cuts in each step: leave the sampler out, or inject with weighting='equal'."
            )

    def settings(self) -> dict[str, Any]:
        """Seed, and what is trained of a cut."""
        return {"seed": self.seed, "only_last": self.only_last, "hold": self.hold}

    def stopped(self) -> None:
        """The adapter is whole again."""
        self.end_step()

    def rank(self, t: int) -> int:
        """The rank of step t."""
        return random.Random(f"{self.seed}/{t}").choice(self.ranks)

    def begin_step(self, t: int) -> int:
        """Cuts the adapter for step t (the first is 1), to be called before its forward pass; returns the rank."""
        self.check_model()
        b = self.rank(t)
        _set(self.layers, b, True, self.only_last)
        if self.hold:
            kept = self.layers[0].kept
            self.held = [
                (part, part.clone())
                for layer in self.layers
                for part in (
                    layer.A.detach()[b:],
                    layer.B.detach()[:, b:],
                    layer.A.detach()[:kept],
                    layer.B.detach()[:, :kept],
                )
            ]
        return b

    @torch.no_grad()
    def end_step(self) -> None:
        """After the optimiser's step: puts back what was to be held, and makes the adapter whole again."""
        for part, value in self.held:
            part.copy_(value)
        self.held = []
        _set(self.layers, self.layers[0].r, True, False)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """`begin_step`, once a step."""
        self.begin_step(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """`end_step`, before the step is evaluated or saved."""
        self.end_step()


def _set(layers: list[NestedLoRALinear], b: int, weighted: bool, only_last: bool) -> None:
    r = layers[0].r
    if not isinstance(b, int) or not 1 <= b <= r:
        raise ValueError(
            f"rank {b!r}: this adapter can be cut at a whole number from 1 to its rank, {r}."
        )
    if any(layer.merged for layer in layers):
        raise RuntimeError(
            "The adapter is merged at another cut: call unmerge(model) first, then cut it."
        )
    for layer in layers:
        layer.rank, layer.weighted, layer.only_last = b, weighted, only_last
