"""The layer: pairs of factors side by side, and how much it matters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_course.lora import AdapterState, LoRALinear, register

MERGED = "merged, so a new pair would get no gradient: call unmerge(model) before it grows."


@register
class GrowingLoRALinear(LoRALinear):
    """A LoRA layer whose rank can grow: `y = base(x) + s · Σ_k B_k A_k dropout(x)`, s held at α/r₀ (or α/√r₀).

    It computes what the plain layer of its concatenated factors computes: however many pairs, two matrix products, and a
    copy of the factors for the time of a pass. Arguments are those of `LoRALinear`.

    Attributes:
        A, B, A1, B1, …: the pairs, `[r_k, in]` and `[out, r_k]`, in the order in which they came; r = Σ r_k.
        importance, uncertainty: the smoothed sensitivity J̄ and its smoothed deviation Ū, scalars; see `observe`.
        grown_at: the step at which each later pair came, `[K]` int64. With the pairs' shapes it is the layer's whole
            history, and like the averages it is saved and loaded with the adapter.
    """

    importance: Tensor
    uncertainty: Tensor
    grown_at: Tensor

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        init_lora_weights: bool | str = True,
        **fields: Any,
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, init_lora_weights=init_lora_weights, **fields)
        self.gaussian = init_lora_weights == "gaussian"
        self.register_buffer("importance", torch.zeros((), device=self.A.device))
        self.register_buffer("uncertainty", torch.zeros((), device=self.A.device))
        self.register_buffer("grown_at", torch.zeros(0, dtype=torch.int64, device=self.A.device))

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """`[(A, B), (A1, B1), …]`."""
        return [(getattr(self, a), getattr(self, b)) for a, b in pair_names(len(self.grown_at))]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """All pairs side by side: `A` `[r, in]`, `B` `[out, r]`, and s."""
        if len(self.grown_at) == 0:
            return self.A, self.B, self.scaling
        As, Bs = zip(*self.pairs, strict=True)
        return torch.cat(As), torch.cat(Bs, 1), self.scaling

    def grow(
        self, k: int, step: int, generator: torch.Generator | None = None
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Add a pair of rank `k`: `A` `[k, in]` drawn as the first one was, `B` `[out, k]` zero.

        Args:
            step: kept in `grown_at`.    generator: of the CPU, so that the draw is the same on every device.

        Returns:
            The new pair, which no optimiser knows yet: `RankGrower.grow` tells it.

        Raises:
            ValueError: k < 1, or more rank than any matrix of this shape has.    RuntimeError: the layer is merged.
        """
        room = min(self.in_features, self.out_features) - self.r
        if not 1 <= k <= room:
            raise ValueError(
                f"k={k}: a layer of rank {self.r} and shape {[self.out_features, self.in_features]} can gain 1 to {room}."
            )
        if self.merged:
            raise RuntimeError(f"This layer is {MERGED}")
        A = torch.empty(k, self.in_features)
        if self.gaussian:
            nn.init.normal_(A, std=1 / self.A.shape[0], generator=generator)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.grown_at = torch.cat([self.grown_at, self.grown_at.new_tensor([step])])
        self._set_pair(pair_names(len(self.grown_at))[-1], A, torch.zeros(self.out_features, k))
        self._count()
        return self.pairs[-1]

    @torch.no_grad()
    def sensitivity(self) -> Tensor:
        """J = Σᵢ |⟨ΔWᵢ, G⟩| / √(in · out), a scalar, with G = ∂L/∂ΔW, from the gradients that lie there.

        ΔWᵢ = s bᵢ aᵢ is the i-th part of rank one, and ⟨ΔWᵢ, G⟩, to first order, what the loss would change without it.
        As ∂L/∂B = s G Aᵀ, it is bᵢ · ∂L/∂bᵢ (and as well aᵢ · ∂L/∂aᵢ): G itself is not needed. For random factors and
        gradients it grows as √(in · out), by which large layers compare with small ones. The sum is the *layer's*; that
        of IncreLoRA, |ΔW ∘ G| over all elements, needs both matrices.

        Raises:
            RuntimeError: a pair has no gradient.
        """
        parts = []
        for _, B in self.pairs:
            if B.grad is None:
                raise RuntimeError(
                    "There is no gradient: call observe() after backward() and before zero_grad()."
                )
            parts.append((B * B.grad).float().sum(0))
        return torch.cat(parts).abs().sum() / math.sqrt(self.in_features * self.out_features)

    @torch.no_grad()
    def observe(self, beta: float) -> None:
        """J̄ ← β J̄ + (1 − β) J, then Ū ← β Ū + (1 − β) |J − J̄|. A J that overflowed, as fp16's may, is passed over."""
        sensitivity = self.sensitivity()
        finite = sensitivity.isfinite()  # used on the device: a GPU need not be waited for
        importance = torch.lerp(sensitivity, self.importance, beta)
        uncertainty = torch.lerp((sensitivity - importance).abs(), self.uncertainty, beta)
        self.importance.copy_(torch.where(finite, importance, self.importance))
        self.uncertainty.copy_(torch.where(finite, uncertainty, self.uncertainty))

    def load_tensors(self, tensors: AdapterState) -> None:
        """Take over `tensors`, with as many pairs as they have. If the number changes, optimisers have to be made anew.

        Plain factors, such as PEFT's, become the first pair: so an adapter that exists goes on growing.
        """
        tensors = _ungrown(tensors)
        wanted = pair_names(len(tensors["grown_at"]))
        for a, b in pair_names(len(self.grown_at))[len(wanted) :]:
            delattr(self, a)
            delattr(self, b)
        for names in wanted[len(self.grown_at) + 1 :]:
            self._set_pair(names, *(torch.empty_like(tensors[name]) for name in names))
        super().load_tensors(tensors)
        self._count()

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        """Raise ValueError unless `tensors` are of such a layer of this size; the number of pairs may be another, and
        plain factors are a layer that has not grown."""
        tensors = _ungrown(tensors)
        names = pair_names(len(tensors.get("grown_at", ())))
        expected = {"scaling", "importance", "uncertainty", "grown_at"}.union(*names)
        if set(tensors) != expected:
            raise ValueError(
                f"The adapter holds {sorted(tensors)} for {name!r}, a {type(self).__name__} that grew {len(names) - 1} times keeps "
                f"{sorted(expected)}: it was made with another kind of layer. Inject that layer, or use factor_state() of its model."
            )
        for a, b in names:
            A, B = list(tensors[a].shape), list(tensors[b].shape)
            if [A[1:], B[:1], B[1:]] != [[self.in_features], [self.out_features], A[:1]]:
                raise ValueError(
                    f"The adapter's factors for {name!r} are {a} {A} and {b} {B}; this layer needs A [r, {self.in_features}] "
                    f"and B [{self.out_features}, r]: it was made for another base model."
                )

    def _set_pair(self, names: tuple[str, str], *factors: Tensor) -> None:
        for name, tensor in zip(names, factors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor.to(self.A), self.A.requires_grad))

    def _count(self) -> None:
        self.r = sum(A.shape[0] for A, _ in self.pairs)
        # the α with which a plain layer of this rank has the same scale
        self.lora_alpha = self.scaling * (math.sqrt(self.r) if self.use_rslora else self.r)


def _ungrown(tensors: AdapterState) -> AdapterState:
    """Plain factors with what a layer keeps that has neither grown nor been observed; others as they are."""
    if set(tensors) != {"A", "B", "scaling"}:
        return tensors
    unseen = {"importance": torch.zeros(()), "uncertainty": torch.zeros(())}
    return tensors | unseen | {"grown_at": torch.zeros(0, dtype=torch.int64)}


def pair_names(growths: int) -> list[tuple[str, str]]:
    """The pairs' attributes. Without a dot, which in an adapter's state ends the module's name."""
    return [("A", "B"), *((f"A{k}", f"B{k}") for k in range(1, growths + 1))]
