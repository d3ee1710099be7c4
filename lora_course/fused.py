"""A LoRA training step from less memory: one node of the graph, with a gradient written by hand.

    y = W₀ x + b + s · B A x

`FusedLoRALinear` computes what `LoRALinear` does. With g = ∂L/∂y and x̃ = dropout(x), as rows,

    ∂L/∂B = s · gᵀ (x̃ Aᵀ),    ∂L/∂A = s · (g B)ᵀ x̃,    ∂L/∂x = g W₀ + dropout'(s · (g B) A)

so that a step needs x, the weights and one byte an element for the dropout mask, and nothing else has to be kept.

The other two ways to pay less: merging (`injection.merge`, then `unload`; the base alone is left, and costs what it
costs), and serving many adapters at once (`serving`).

Sources: LoRA, arXiv 2106.09685; fused training steps, arXiv 2510.00206 (LoRAFusion).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_course.linears import dequantized, is_4bit, update_dtype
from lora_course.lora import LARGEST_COPIED_RANK, LoRALinear, register


class FusedLoRA(torch.autograd.Function):
    """`(x, A, B, base, s, p)` → `y = base(x) + s · B A dropout(x)`: one node of the graph, with its gradient by hand.

    Kept for the backward pass: x as it came in, the factors and the base's weight, which exist anyway, and for p > 0 the
    mask, `[..., in]` bool. `x Aᵀ` is computed a second time instead. Both updates, of y and of ∂L/∂x, are added in
    place by the product that makes them.

    Args (of `apply`):
        x: `[..., in]`.    A: `[r, in]`.    B: `[out, r]`.    base: the frozen layer.    s: the scale.    p: dropout's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, base: nn.Linear, scaling: float, p: float
    ) -> Tensor:
        y = base(x)  # gradients are off in here, so this keeps nothing
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        ctx.dtype = update_dtype(y)
        with torch.autocast(x.device.type, enabled=False):
            h = as_rows(dropped).to(ctx.dtype) @ A.to(ctx.dtype).t()
            _add_product(as_rows(y), h, B.to(ctx.dtype).t().contiguous(), scaling)
        ctx.save_for_backward(x, A, B, base.weight, mask)
        ctx.base, ctx.scaling, ctx.p = base, scaling, p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weight, mask = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        grad_x = grad_A = grad_B = None
        with torch.autocast(x.device.type, enabled=False):
            a, bt, g = (
                A.to(ctx.dtype),
                B.to(ctx.dtype).t().contiguous(),
                as_rows(grad).to(ctx.dtype),
            )
            # What is left of x is divided by 1 − p: here it is the scale that is, as it multiplies thin matrices.
            scaling = ctx.scaling / (1 - ctx.p)
            mask = (
                None if mask is None else mask.view(torch.uint8)
            )  # the same bytes; products with bool are slower
            h = scaling * (g @ bt.t())  # s · g B, [rows, r]
            if need_A or need_B:
                dropped = as_rows(x if mask is None else x * mask).to(ctx.dtype)
                grad_A = (h.t() @ dropped).to(A.dtype) if need_A else None
                if need_B:
                    ax = scaling * (dropped @ a.t())
                    # gᵀ (x̃ Aᵀ), in the order that is fast for its rank: see lora.LARGEST_COPIED_RANK
                    grad_B = (
                        (ax.t() @ g).t() if ax.shape[1] <= LARGEST_COPIED_RANK else g.t() @ ax
                    ).to(B.dtype)
                del dropped
            if need_x:
                grad_x = _through_base(as_rows(grad), ctx.base, weight)
                if mask is None:
                    _add_product(grad_x, h, a, 1.0)
                else:
                    grad_x.add_((h @ a).mul_(as_rows(mask)))
                grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad_x, grad_A, grad_B, None, None, None


@register
class FusedLoRALinear(LoRALinear):
    """`LoRALinear` with a fused training step: equal outputs and gradients, to rounding, from less memory.

    Arguments, tensors and checkpoints are those of `LoRALinear`: the adapters of one load into the other.
    Dropout, autocast, gradient checkpointing of both kinds and 4-bit bases are supported. The gradient can be taken
    once: what needs gradients of gradients needs `LoRALinear`.

    Raises:
        TypeError: the base is a linear layer with a forward pass of its own, whose gradient is not known here; and as
            `LoRALinear`.
        RuntimeError: in `forward`, while training: the base's weight is offloaded.
    """

    def __init__(self, base_layer: nn.Linear, *arguments: Any, **keywords: Any) -> None:
        if (
            isinstance(base_layer, nn.Linear)
            and not is_4bit(base_layer)
            and type(base_layer).forward is not nn.Linear.forward
        ):
            raise TypeError(
                f"{type(base_layer).__name__} has a forward pass of its own, and the gradient written here is that of nn.Linear "
                "and of bitsandbytes' Linear4bit: use LoRALinear for it."
            )
        super().__init__(base_layer, *arguments, **keywords)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` → `[..., out]`, as `LoRALinear`; fused while gradients are recorded, or in train mode."""
        if self.merged or not self.enabled or not (self.training or torch.is_grad_enabled()):
            return super().forward(x)
        if self.base_layer.weight.is_meta:
            raise RuntimeError(
                "The base's weight is offloaded, and the fused backward pass would not find it: load the base without offloading, or use LoRALinear."
            )
        p = (
            self.lora_dropout.p
            if isinstance(self.lora_dropout, nn.Dropout) and self.lora_dropout.training
            else 0.0
        )
        A, B, scaling = self.factors()
        # Rows in and out: a view made inside a custom function could not be changed in place, as ReLU(inplace=True) does.
        y = FusedLoRA.apply(as_rows(x), A, B, self.base_layer, scaling, p)
        return y.view(*x.shape[:-1], self.out_features)


def as_rows(x: Tensor) -> Tensor:
    """`[..., n]` → `[rows, n]`, without a copy where that is possible; of no rows too."""
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def _add_product(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """`y += scaling · left @ right` in place."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=scaling)
    else:
        y.add_(left @ right, alpha=scaling)


def _through_base(grad: Tensor, base: Any, weight: Tensor) -> Tensor:
    """`grad` `[rows, out]` → `grad W₀` `[rows, in]`, in the type in which the base computes."""
    if is_4bit(base):
        grad = grad.to(base.compute_dtype or grad.dtype)
        weight = dequantized(base)
    return grad @ weight.to(grad.dtype)
