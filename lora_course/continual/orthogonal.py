"""The layer of O-LoRA (arXiv 2310.14152), and the loss that keeps adapters apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_course.injection import layers_of
from lora_course.lora import AdapterState, LoRALinear, register


@register
class OrthogonalLoRALinear(LoRALinear):
    """A LoRA layer that keeps the adapters of earlier tasks beside the one that is trained (O-LoRA, arXiv 2310.14152).

        y = base(x) + (Σ_{i<t} sᵢ Bᵢ Aᵢ + s · B_t A_t) dropout(x)

    Buffers: past_A `[Σ rᵢ, in]`, past_B `[out, Σ rᵢ]`, fp32, sᵢ within past_B. They are no parameters: no
    optimiser sees them.
    """

    past_A: Tensor
    past_B: Tensor

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, **arguments: Any) -> None:
        super().__init__(base_layer, r, lora_alpha, **arguments)
        self.register_buffer("past_A", self.A.detach()[:0].clone())
        self.register_buffer("past_B", self.B.detach()[:, :0].clone())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """All adapters as one: A `[Σ rᵢ + r, in]`, B `[out, Σ rᵢ + r]`, scaling 1."""
        return (
            torch.cat([self.past_A, self.A]),
            torch.cat([self.past_B, self.scaling * self.B], 1),
            1.0,
        )

    @torch.no_grad()
    def freeze(self) -> None:
        """Put the trained adapter behind the past ones; what it adds to the output stays until A and B change."""
        self.past_A = torch.cat([self.past_A, self.A])
        self.past_B = torch.cat([self.past_B, self.scaling * self.B], 1)

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        """As `LoRALinear`, and that the past factors fit as well."""
        super().check_tensors(name, tensors)
        A, B = tensors["past_A"], tensors["past_B"]
        if A.shape[1:] != (self.in_features,) or B.shape != (self.out_features, A.shape[0]):
            raise ValueError(
                f"The past factors for {name!r} are A {list(A.shape)} and B {list(B.shape)}; this layer needs "
                f"A [R, {self.in_features}] and B [{self.out_features}, R]: they were made for another base model."
            )


def overlap(model: nn.Module, squared: bool = False) -> Tensor:
    """Σ over layers, past tasks i and entries of |Aᵢ A_tᵀ|, or of its square; 0 iff each new row is orthogonal to all past ones.

    The paper squares the entries; its code (cmnfriend/O-LoRA) takes their absolute values, and so does this.
    Both are zero together, but the absolute value keeps its pull as an entry gets small and the square does
    not.
    """
    layers = layers_of(model, OrthogonalLoRALinear).values()
    products = [layer.past_A @ layer.A.t() for layer in layers if len(layer.past_A)]
    sums = [(product.square() if squared else product.abs()).sum() for product in products]
    return (
        torch.stack([part.to(sums[0].device) for part in sums]).sum() if sums else torch.zeros(())
    )
