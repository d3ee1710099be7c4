"""The layer that computes with rounded factors, and a trained adapter rounded afterwards."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_course.injection import adapter_layers, inject, injection_of, unload
from lora_course.lora import LoRALinear, register
from lora_course.quantized.grid import check_grid, fake_quantize
from lora_course.states import factor_state, use_adapter


@register
class QuantizedLoRALinear(LoRALinear):
    """A frozen linear layer plus a low-rank update with quantised factors: `y = base(x) + scaling · Q(B) Q(A) dropout(x)`.

    The parameters `A` and `B` stay fp32: they collect the optimiser's small steps, and the forward pass rounds them anew.
    `factors()` are the rounded ones, so that merging, ΔW and `export_peft` give what the forward pass computes. A state of
    a plain `LoRALinear` fits, which quantises it; with 32 bits this is `LoRALinear`. Arguments are those of `LoRALinear`, and:

    Args:
        bits: of both factors, 2 to 16, or 32 for none.    bits_A, bits_B: of one factor, instead.
        granularity, group_size, clip: as in `quantize`; rows are A's rows and B's columns, so a scale never spans components
            unless granularity is "tensor".

    Raises:
        ValueError: one of these outside its range, and as `LoRALinear`.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        bits: int = 4,
        bits_A: int | None = None,
        bits_B: int | None = None,
        granularity: str = "group",
        group_size: int = 64,
        clip: float = 1.0,
        **fields: Any,
    ) -> None:
        bits_A, bits_B = (bits if own is None else own for own in (bits_A, bits_B))
        for own in (bits_A, bits_B):
            check_grid(own, granularity, group_size, clip)
        super().__init__(base_layer, r, lora_alpha, **fields)
        self.bits_A, self.bits_B = bits_A, bits_B
        self.granularity, self.group_size, self.clip = granularity, group_size, clip

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`(Q(A), Q(B), scaling)`: the plain LoRA layer that computes the same update."""
        grid = (self.granularity, self.group_size, self.clip)
        return (
            fake_quantize(self.A, self.bits_A, *grid),
            fake_quantize(self.B.T, self.bits_B, *grid).T,
            self.scaling,
        )

    def extra_repr(self) -> str:
        grid = f"group of {self.group_size}" if self.granularity == "group" else self.granularity
        return f"{super().extra_repr()}, bits_A={self.bits_A}, bits_B={self.bits_B}, a scale per {grid}, clip={self.clip:g}"


def quantize_after_training(model: nn.Module, **arguments: Any) -> nn.Module:
    """Replace the plain LoRA layers of `model` by quantised ones with the same factors, in place.

    Args:
        model: injected with `LoRALinear`, not merged.    arguments: as `inject` passes on to `QuantizedLoRALinear`.

    Raises:
        ValueError: other layers, or an argument outside its range.    RuntimeError: the model is merged. Nothing has been
        changed then.
    """
    info, layers = injection_of(model), adapter_layers(model)
    if info.layer is not LoRALinear:
        raise ValueError(
            f"This model was injected with {info.layer.__name__}: a plain LoRALinear adapter is expected (export_peft and load_peft make one)."
        )
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise RuntimeError(
            f"{merged[0]!r} is merged: its ΔW would stay in the base. Call unmerge(model) first."
        )
    QuantizedLoRALinear(nn.Linear(1, 1), 1, 1, **arguments)  # raises before anything has changed
    state, training = factor_state(model), model.training
    inject(unload(model), info.config, layer=QuantizedLoRALinear, **arguments)
    return use_adapter(model, state).train(training)
