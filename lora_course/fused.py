"""What a LoRA layer costs, and three ways to pay less: merge it, fuse its training step, serve many at once.

    y = W₀ x + b + s · B A x

Merging is in `lora_course.lora`: `merge(model)`, then `unload(model)`; the base alone is left, and costs what it costs.

Fused training: `FusedLoRALinear` computes what `LoRALinear` does, with a gradient written by hand. With g = ∂L/∂y and
x̃ = dropout(x), as rows,

    ∂L/∂B = s · gᵀ (x̃ Aᵀ),    ∂L/∂A = s · (g B)ᵀ x̃,    ∂L/∂x = g W₀ + dropout'(s · (g B) A)

so that a step needs x, the weights and one byte an element for the dropout mask, and nothing else has to be kept.

Serving: `load_adapters` puts many adapters on one base, and `rows` says which row of a batch uses which.

    load_adapters(model, {"law": factor_state(one), "code": factor_state(other)})
    with rows(model, ["law", "code", None]):                       # three prompts; None is the base alone
        model.generate(input_ids, attention_mask=mask)

Sources: LoRA, arXiv 2106.09685; fused training steps, arXiv 2510.00206 (LoRAFusion); batches of several adapters,
arXiv 2310.18547 (Punica) and 2311.03285 (S-LoRA), whose kernels read the adapters where they lie. Here they are copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_course.injection import adapter_layers, inject, injection_of
from lora_course.linears import is_4bit
from lora_course.lora import LARGEST_COPIED_RANK, AdapterState, LoRALinear, register, update_dtype
from lora_course.states import concatenate, split_state

# ------------------------------------------------------------------------------------------------- a fused step


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
            h = _rows(dropped).to(ctx.dtype) @ A.to(ctx.dtype).t()
            _add_product(_rows(y), h, B.to(ctx.dtype).t().contiguous(), scaling)
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
            a, bt, g = A.to(ctx.dtype), B.to(ctx.dtype).t().contiguous(), _rows(grad).to(ctx.dtype)
            # What is left of x is divided by 1 − p: here it is the scale that is, as it multiplies thin matrices.
            scaling = ctx.scaling / (1 - ctx.p)
            mask = (
                None if mask is None else mask.view(torch.uint8)
            )  # the same bytes; products with bool are slower
            h = scaling * (g @ bt.t())  # s · g B, [rows, r]
            if need_A or need_B:
                dropped = _rows(x if mask is None else x * mask).to(ctx.dtype)
                grad_A = (h.t() @ dropped).to(A.dtype) if need_A else None
                if need_B:
                    ax = scaling * (dropped @ a.t())
                    # gᵀ (x̃ Aᵀ), in the order that is fast for its rank: see lora.LARGEST_COPIED_RANK
                    grad_B = (
                        (ax.t() @ g).t() if ax.shape[1] <= LARGEST_COPIED_RANK else g.t() @ ax
                    ).to(B.dtype)
                del dropped
            if need_x:
                grad_x = _through_base(_rows(grad), ctx.base, weight)
                if mask is None:
                    _add_product(grad_x, h, a, 1.0)
                else:
                    grad_x.add_((h @ a).mul_(_rows(mask)))
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
        return FusedLoRA.apply(x, *self.factors()[:2], self.base_layer, self.scaling, p)


def _rows(x: Tensor) -> Tensor:
    """`[..., n]` → `[rows, n]`, without a copy where that is possible; of no rows too."""
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def _add_product(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """`y += scaling · left @ right` in place."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=scaling)
    else:
        y.add_(left @ right, alpha=scaling)


def _through_base(grad: Tensor, base: nn.Linear, weight: Tensor) -> Tensor:
    """`grad` `[rows, out]` → `grad W₀` `[rows, in]`, in the type in which the base computes."""
    if is_4bit(base):
        grad = grad.to(base.compute_dtype or grad.dtype)
        weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
    return grad @ weight.to(grad.dtype)


# ------------------------------------------------------------------------------------------------- many adapters, one batch


class AdapterBatchLinear(LoRALinear):
    """Several trained adapters on one frozen layer, each row of a batch with its own: `yᵢ = base(xᵢ) + B₍ₙ₎ A₍ₙ₎ xᵢ`, n = n(i).

    Made by `load_adapters`; which row uses which is said by `rows`. Lower ranks are filled up with zeros to the layer's
    largest. For inference: the factors are frozen, dropout is left out, and there is nothing to save, since each adapter has a file.

    Attributes:
        A: `[adapters + 1, r, in]`; the last is zero, for rows that use the base alone.
        B: `[adapters + 1, out, r]`, with each adapter's scale in it. Both fp32.    r: the largest rank.    scaling: 1.
        index: `[batch]`, the adapter of each row while `rows` is on, else None.

    Raises:
        NotImplementedError: `factors`, `merge`, `adapter_state` and what needs them.
    """

    supported_fields = frozenset(
        {
            "r",
            "lora_alpha",
            "target_modules",
            "task_type",
            "peft_type",
            "auto_mapping",
            "peft_version",
            "inference_mode",
        }
    )

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *_: Any,
        names: Sequence[str],
        **__: Any,
    ) -> None:
        super().__init__(base_layer, r, lora_alpha)
        self.names, self.index = tuple(names), None
        self._gathered: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def stack(self, factors: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Take over `(A, B)` of each adapter, in the order of `names`; None where an adapter leaves this layer alone."""
        self.r = max(A.shape[0] for A, _ in filter(None, factors))
        device, count = self.A.device, len(factors) + 1
        A = torch.zeros(count, self.r, self.in_features, device=device)
        B = torch.zeros(count, self.out_features, self.r, device=device)
        for i, pair in enumerate(factors):
            if pair is not None:
                A[i, : len(pair[0])], B[i, :, : len(pair[0])] = pair
        self.A, self.B = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)

    def use(self, index: Tensor | None) -> None:
        """Row i uses adapter `index[i]` from now on; None: it has not been said."""
        self.index = index
        self._gathered.clear()

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[batch, ..., in]` → `[batch, ..., out]`. Raises where it was not said which adapter each of its rows uses."""
        if not self.enabled:
            return self.base_layer(x)
        if self.index is None:
            raise RuntimeError(
                f"This model holds the adapters {list(self.names)}; say which row of the batch uses which: "
                "with rows(model, [name, …]): …; or disabled(model), for the base alone."
            )
        batch = len(self.index)
        if x.shape[0] != batch:
            raise ValueError(
                f"The input has {x.shape[0]} rows and rows(…) was given {batch} names: give one a row. Where generate makes several "
                "rows of a prompt (num_beams, num_return_sequences), repeat its name as often, one after the other."
            )
        y = self.base_layer(x)
        A, B = self._of_rows(update_dtype(y))
        h = x.reshape(batch, -1, self.in_features).to(A.dtype) @ A.mT
        return (
            torch.baddbmm(y.view(batch, -1, self.out_features).to(A.dtype), h, B.mT)
            .view(y.shape)
            .to(y.dtype)
        )

    def _of_rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Copied once for all tokens that are generated within `rows`, not once a token.
        if dtype not in self._gathered:
            self._gathered[dtype] = self.A[self.index].to(dtype), self.B[self.index].to(dtype)
        return self._gathered[dtype]

    def factors(self) -> NoReturn:
        """Refused: there is one pair for each adapter."""
        raise NotImplementedError(
            f"An AdapterBatchLinear holds {len(self.names)} adapters, of which the row decides: it has no factors, update or file of its own. "
            "Merge, export or save the states that load_adapters was given."
        )

    def check_merge(self, name: str) -> None:
        """Refused, as `factors`."""
        self.factors()

    def tensors(self) -> NoReturn:
        """Refused, as `factors`."""
        self.factors()


def load_adapters(model: nn.Module, states: Mapping[str, AdapterState]) -> nn.Module:
    """Put several adapters on the plain `model`, in place; `unload(model)` takes them off again.

    Args:
        model: a base without an adapter.
        states: by name, plain LoRA factors as `factor_state` gives them: any rank, scale and set of modules.

    Raises:
        ValueError: no state, a state that is no plain LoRA or was made for another base, a model that carries an adapter.
            Nothing has been changed then.
    """
    if not states:
        raise ValueError("states is empty: give {name: factor_state(model), …}.")
    # One state's concatenation is that state with its scale inside B, checked.
    plain = {name: split_state(concatenate([state])) for name, state in states.items()}
    modules = dict.fromkeys(module for adapter in plain.values() for module in adapter)
    linears = dict(model.named_modules())
    for name, adapter in plain.items():
        for module, tensors in adapter.items():
            linear = linears.get(module)
            shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
            if shape != (tensors["B"].shape[0], tensors["A"].shape[1]):
                found = "has no such linear layer" if None in shape else f"has {list(shape)} there"
                raise ValueError(
                    f"{name!r} changes {module!r}, [out, in] = {[tensors['B'].shape[0], tensors['A'].shape[1]]}; this model {found}: "
                    "the adapter was made for another base model."
                )
    exactly = "|".join(re.escape(module) for module in modules)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=exactly, inference_mode=True)
    inject(model, config, layer=AdapterBatchLinear, names=tuple(states))
    for module, layer in adapter_layers(model).items():
        layer.stack(
            [(a[module]["A"], a[module]["B"]) if module in a else None for a in plain.values()]
        )
    return model


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the block row i of every batch uses the adapter `names[i]`; None is the base alone.

    The factors of the rows are copied when they are first used: `len(names)` adapters' worth of memory.

    Raises:
        TypeError: the model was not made by `load_adapters`, or `names` is one string.    ValueError: an unknown name.
    """
    if injection_of(model).layer is not AdapterBatchLinear:
        raise TypeError(
            f"This model's layers are {injection_of(model).layer.__name__}, with one adapter: take its state and call load_adapters on the base."
        )
    if isinstance(names, str):
        raise TypeError(
            f"names={names!r}: a list with one name for each row of the batch is expected."
        )
    known: tuple[str, ...] = injection_of(model).arguments["names"]
    if unknown := [name for name in names if name is not None and name not in known]:
        raise ValueError(
            f"There is no adapter {unknown[0]!r}; there are {', '.join(known)}, and None for the base alone."
        )
    index = torch.tensor([len(known) if name is None else known.index(name) for name in names])
    layers = adapter_layers(model).values()
    before = {layer: layer.index for layer in layers}
    for layer in layers:
        layer.use(index.to(layer.A.device))
    try:
        yield model
    finally:
        for layer, previous in before.items():
            layer.use(previous)
