"""The layer: frozen stages beside the one that trains, or inside the base weight."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_course.lora import AdapterState, LoRALinear, register

HALVES = (torch.bfloat16, torch.float16)


@register
class StackedLoRALinear(LoRALinear):
    """A linear layer with frozen LoRA stages and one that trains: `y = base(x) + s · Σ_j B_j A_j x + s · B A dropout(x)`.

    It starts as a `LoRALinear` of one stage. `freeze` puts the trained factors to the frozen ones and `start` makes fresh
    ones, of any rank; the scaling s stays. Dropout is for what trains: a frozen stage acts as if it were merged.

    Args:
        keep_original: the first `merge` copies the base weight to the CPU's memory, so that `unmerge` gives it back to
            the bit. Without, it subtracts, which is exact to rounding only.
        others: as for `LoRALinear`; `use_rslora` is refused, as its scale changes with the rank.

    Attributes:
        A, B: `[r, in]` and `[out, r]`, of the stage that trains; r = 0 where it does not touch this layer.
        frozen_A, frozen_B: buffers `[R, in]`, `[out, R]`: the earlier stages, one after the other.
        ranks: buffer `[number of earlier stages]`, their ranks here, 0 included.
        folded: the base weight holds the frozen stages (merge-and-restart). Merged, it holds the one that trains too.
    """

    supported_fields = LoRALinear.supported_fields - {"use_rslora", "init_lora_weights"}
    frozen_A: Tensor
    frozen_B: Tensor
    ranks: Tensor

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        keep_original: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, **fields)
        self.register_buffer("frozen_A", self.A.new_empty(0, self.in_features))
        self.register_buffer("frozen_B", self.B.new_empty(self.out_features, 0))
        self.register_buffer("ranks", torch.empty(0, dtype=torch.long))
        self.keep_original = keep_original
        self.original: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` → `[..., out]`, in the base's type.

        Raises:
            RuntimeError: the layer is switched off while the base weight holds stages.
        """
        y = self.base_layer(x)
        if self.merged:
            return y
        if not self.enabled:
            if self.folded:
                raise RuntimeError(
                    "The base holds earlier stages: switching the adapter off would not remove them. Call merge(model) and unmerge(model) first."
                )
            return y
        A: Tensor = self.A
        B: Tensor = self.B
        if len(self.frozen_A) and not self.folded:
            if (
                isinstance(self.lora_dropout, nn.Dropout) and self.lora_dropout.training
            ):  # what is frozen is not dropped
                frozen = F.linear(
                    F.linear(x.to(y.dtype), self.frozen_A.to(y.dtype)), self.frozen_B.to(y.dtype)
                )
                y = torch.add(y, frozen.to(y.dtype), alpha=self.scaling)
            else:
                A, B, _ = self.factors()
        return self.add_update(y, x, A, B, self.scaling) if len(A) else y

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`([A_0; …; A_k], [B_0 … B_k], s)`: the one LoRA layer of the summed rank that computes the same update."""
        return (
            torch.cat([self.frozen_A, self.A]),
            torch.cat([self.frozen_B, self.B], 1),
            self.scaling,
        )

    def stages(self) -> list[tuple[Tensor, Tensor]]:
        """`(A_j, B_j)` of every stage in order, the one that trains last."""
        ranks = self.ranks.tolist()
        return [
            *zip(self.frozen_A.split(ranks), self.frozen_B.split(ranks, 1), strict=True),
            (self.A, self.B),
        ]

    @torch.no_grad()
    def freeze(self) -> None:
        """Make the stage that trains the last of the frozen ones. The function stays (to rounding); the rank is 0 until `start`.

        Raises:
            RuntimeError: earlier stages are in the base and this one is not: merge it first.
        """
        if self.folded and not self.merged and self.r:
            raise RuntimeError(
                "The earlier stages are merged into the base and this one is not: call merge(model), then freeze."
            )
        A, B, _ = self.factors()
        self.frozen_A, self.frozen_B = A.clone(), B.clone()
        self.ranks = torch.cat([self.ranks, self.ranks.new_tensor([self.r])])
        self.merged = False  # nothing trains: what the base holds are frozen stages
        self.start(0)

    @torch.no_grad()
    def start(self, r: int, generator: torch.Generator | None = None) -> None:
        """Replace the factors that train by fresh ones of rank r ≥ 0: `A` Kaiming-uniform, `B` zero, new parameters.

        New parameters, so that no optimiser holds moments for them. They are drawn on the CPU: equal on every device.

        Raises:
            RuntimeError: the layer is merged.
        """
        if self.merged:
            raise RuntimeError(
                "This layer is merged: fresh factors would make the base's share of the old ones untraceable. Call freeze() first."
            )
        A = torch.empty(r, self.in_features)
        if r:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(A.to(self.A.device), self.A.requires_grad)
        self.B = nn.Parameter(
            torch.zeros(self.out_features, r, device=self.B.device), self.B.requires_grad
        )
        self.r, self.lora_alpha = r, self.scaling * r

    @torch.no_grad()
    def merge(self) -> None:
        """Add to the base weight, in fp32 and stage by stage, what is not in it yet. Raises as `LoRALinear.merge`."""
        self.check_merge("this layer")
        if self.keep_original and self.original is None:
            self.original = self.base_layer.weight.detach().to("cpu", copy=True)
        for A, B in self.stages()[-1:] if self.folded else self.stages():
            if A.shape[0]:
                self._add_to_base(self.scaling * (B @ A))
        self.merged = self.folded = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all stages out of the base weight: to the bit with `keep_original`, else to rounding."""
        if not self.merged:
            raise RuntimeError(
                "This layer is not merged: there is nothing to take back. Call merge() first."
            )
        A, B, _ = self.factors()
        self._take_out_of_base(A, B)

    @classmethod
    def before_unload(cls, model: nn.Module, layers: dict[str, Any]) -> None:
        """Take stages out of the base where a run in mode "merge" was stopped half-way; merged, they stay in it.

        Raises:
            RuntimeError: in half precision a subtraction would not give the base back; nothing has been changed then.
        """
        halfway = [layer for layer in layers.values() if layer.folded and not layer.merged]
        for layer in halfway:
            if layer.original is None and layer.base_layer.weight.dtype in HALVES:
                raise RuntimeError(
                    "The base holds the stages of a run that was stopped, and in half precision they can't be subtracted "
                    "without a trace: load the base again, or train with keep_original=True."
                )
        for layer in halfway:
            layer._take_out_of_base(layer.frozen_A, layer.frozen_B)

    @torch.no_grad()
    def _take_out_of_base(self, A: Tensor, B: Tensor) -> None:
        if self.original is not None:
            self.base_layer.weight.data.copy_(self.original)
            self.original = None  # the next merge copies what the base is then
        else:
            self._add_to_base(-self.scaling * (B @ A))
        self.merged = self.folded = False

    def get_extra_state(self) -> Tensor:
        """As `LoRALinear`, and whether the base holds frozen stages."""
        return torch.cat([super().get_extra_state(), torch.tensor([float(self.folded)]).double()])

    def set_extra_state(self, state: Tensor) -> None:
        """As `LoRALinear`."""
        super().set_extra_state(state)
        self.original = None  # of another base
        self.folded = bool(state[2])

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        """As `LoRALinear`; and frozen stages that fit, and are those in the base where it holds some."""
        super().check_tensors(name, tensors)
        A, B, ranks = tensors["frozen_A"], tensors["frozen_B"], tensors["ranks"]
        if A.shape != (int(ranks.sum()), self.in_features) or B.shape != (
            self.out_features,
            A.shape[0],
        ):
            raise ValueError(
                f"The frozen stages for {name!r} are A {list(A.shape)}, B {list(B.shape)} of ranks {ranks.tolist()}; A [Σ ranks, "
                f"{self.in_features}] and B [{self.out_features}, Σ ranks] are expected: it was made for another base model."
            )
        same = (
            A.shape == self.frozen_A.shape
            and torch.equal(A.to(self.frozen_A), self.frozen_A)
            and torch.equal(B.to(self.frozen_B), self.frozen_B)
        )
        if self.folded and not same:
            raise ValueError(
                f"The base weight of {name!r} holds other stages than this adapter's: load the base again."
            )

    def extra_repr(self) -> str:
        return f"frozen={self.ranks.tolist()}, {super().extra_repr()}, folded={self.folded}"
