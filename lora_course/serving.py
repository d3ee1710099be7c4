"""Many trained adapters on one base, each row of a batch with its own.

    yᵢ = W₀ xᵢ + b + s₍ₙ₎ B₍ₙ₎ A₍ₙ₎ xᵢ,      n = n(i): the adapter of row i

`load_adapters` puts adapters on one base, and `row_adapters` says which row of a batch uses which.

    load_adapters(model, {"law": factor_state(one), "code": factor_state(other)})
    with row_adapters(model, ["law", "code", None]):               # three prompts; None is the base alone
        model.generate(input_ids, attention_mask=mask)

Sources: batches of several adapters, arXiv 2310.18547 (Punica) and 2311.03285 (S-LoRA), whose kernels read the adapters
where they lie. Here they are copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lora_course.folders import read_factors, warn_of_its_base
from lora_course.injection import inject, injection_of, layers_of
from lora_course.linears import update_dtype
from lora_course.lora import AdapterState, LoRALinear
from lora_course.states import concatenate, split_state


class AdapterBatchLinear(LoRALinear):
    """Several trained adapters on one frozen layer, each row of a batch with its own: `yᵢ = base(xᵢ) + B₍ₙ₎ A₍ₙ₎ xᵢ`, n = n(i).

    Made by `load_adapters`; which row uses which is said by `row_adapters`. Lower ranks are filled up with zeros to the layer's
    largest. For inference: the factors are frozen, dropout is left out, and there is nothing to save, since each adapter has a file.

    Attributes:
        A: `[adapters + 1, r, in]`; the last is zero, for rows that use the base alone.
        B: `[adapters + 1, out, r]`, with each adapter's scale in it. Both fp32.    r: the largest rank.    scaling: 1.
        index: `[batch]`, the adapter of each row while `row_adapters` is on, else None.

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
        self.names = tuple(names)
        self.index: Tensor | None = None
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
                "with row_adapters(model, [name, …]): …; or disabled(model), for the base alone."
            )
        batch = len(self.index)
        if x.ndim == 2 and x.shape[0] > batch:
            raise ValueError(
                f"A layer of this model gets {x.shape[0]} tokens in one dimension, [tokens, in], and can't tell whose they are (OPT's fc1 "
                "and fc2, or routed experts): serve adapters that leave it out, or one adapter at a time."
            )
        if x.shape[0] != batch:
            raise ValueError(
                f"The input has {x.shape[0]} rows and row_adapters(…) was given {batch} names: give one a row. Where generate makes several "
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
        # Copied once for all tokens that are generated within `row_adapters`, not once a token.
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


def load_adapters(model: nn.Module, states: Mapping[str, AdapterState | str | Path]) -> nn.Module:
    """Put several adapters on the plain `model`, in place; `unload(model)` takes them off again.

    Args:
        model: a base without an adapter.
        states: by name, plain LoRA factors as `factor_state` gives them, or a folder of them (`read_factors`): any rank, scale and set of modules.

    Raises:
        ValueError: no state, a state that is no plain LoRA or was made for another base, a model that carries an adapter.
            Nothing has been changed then.

    Warns:
        UserWarning: an adapter in a folder of `save_adapter` was trained on another base.
    """
    if not states:
        raise ValueError("states is empty: give {name: factor_state(model), …}.")
    # One state's concatenation is that state with its scale inside B, checked.
    plain = {
        name: split_state(concatenate([read_factors(state)])) for name, state in states.items()
    }
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
    layers = layers_of(model, AdapterBatchLinear)
    for name, state in states.items():
        warn_of_its_base(model, state, {module: layers[module] for module in plain[name]})
    for module, layer in layers.items():
        layer.stack(
            [(a[module]["A"], a[module]["B"]) if module in a else None for a in plain.values()]
        )
    return model


@contextmanager
def row_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
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
    layers = layers_of(model, AdapterBatchLinear).values()
    before = {layer: layer.index for layer in layers}
    for layer in layers:
        layer.use(index.to(layer.A.device))
    try:
        yield model
    finally:
        for layer, previous in before.items():
            layer.use(previous)
