"""What may lie under an adapter: an `nn.Linear` or a bitsandbytes `Linear4bit`, and what to know of either."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

PLAIN = {torch.Tensor}  # what holds a weight as it is computed with; subclasses may scale it
MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types in which a weight is what it says, so that an update can be added to it."""


def is_4bit(linear: nn.Module) -> bool:
    """Whether `linear` is a bitsandbytes `Linear4bit` (its weight is packed, two codes a byte)."""
    return type(linear).__name__ in {"Linear4bit", "LinearNF4", "LinearFP4"}


def dequantized(linear: Any) -> Tensor:
    """The weight `[out, in]` that a `Linear4bit` computes with."""
    from bitsandbytes.functional import dequantize_4bit  # a second to import, for 4-bit bases alone

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def check_linear(module: nn.Module, name: str) -> None:
    quantised_otherwise = (
        isinstance(module, nn.Linear)
        and not is_4bit(module)
        and not module.weight.is_floating_point()
    )
    inside_attention = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if (
        not (isinstance(module, nn.Linear) or is_4bit(module))
        or quantised_otherwise
        or inside_attention
    ):
        hint = {
            "Conv1D": "GPT-2's Conv1D stores its weight transposed: replace it by an nn.Linear of weight.T",
            "NonDynamicallyQuantizableLinear": "nn.MultiheadAttention reads its weight and never calls it",
        }.get(
            type(module).__name__,
            "leave it out of target_modules, or name the linear layers inside it",
        )
        raise TypeError(
            f"{name!r} is a {type(module).__name__}; nn.Linear or bitsandbytes' Linear4bit is expected: {hint}."
        )


def execution_device(linear: Any) -> torch.device | str | int:
    # A layer that accelerate keeps on the CPU or on disk runs on the device its hook names. A base that is only described
    # ("meta") has no device: factors then lie on the CPU, to be converted or looked at.
    hook = getattr(linear, "_hf_hook", None)
    device = "cpu" if linear.weight.is_meta else linear.weight.device
    return getattr(hook, "execution_device", None) or device


def keep_unpacked(linear: Any) -> None:
    """Keep bitsandbytes from repacking a 4-bit weight in an eval-mode forward on a CPU with AVX512-BF16.

    After the repacking, dequantising the weight, and so merging and the gradient below it, give garbage.
    """
    linear.support_avx512bf16_for_cpu = False
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise RuntimeError(
            "A 4-bit layer was run in eval mode before the adapter was injected, and this CPU's kernel has repacked its "
            "weight: gradients and merges would be wrong. Load the base again and inject, or call qlora.protect(model), "
            "before its first forward."
        )


def check_mergeable(linear: nn.Module, name: str) -> None:
    """Raise, with the layer's `name`, unless its forward pass computes with `linear.weight + ΔW` once ΔW is added.

    Raises:
        TypeError: the weight is quantised or scaled (4-bit, 8-bit, FP8, a tensor subclass), computed from other
        parameters (weight or spectral normalisation), or the class has a forward pass of its own.
        RuntimeError: it is offloaded.
    """
    kind = type(linear)
    if is_4bit(linear):
        raise TypeError(
            f"The base of {name!r} is 4-bit: adding ΔW would round the sum to 16 values a block. Call "
            "lora_course.qlora.dequantize_model(model) and merge then, or merge_requantized(model) to accept the loss."
        )
    weight = linear.weight
    if isinstance(weight, DTensor):
        raise RuntimeError(
            f"FSDP2 has spread the weight of {name!r} over several processes: save_adapter, load it in one process, and merge there."
        )
    if weight.is_meta:
        raise RuntimeError(
            f"The weight of {name!r} is offloaded to disk: load the base without offloading to merge."
        )
    if linear._parameters.get("weight") is None:
        raise TypeError(
            f"The weight of {name!r} is computed from other parameters (weight or spectral normalisation): a sum would "
            "be lost at the next forward pass. Remove the parametrisation first, or serve unmerged."
        )
    plain = kind.forward is nn.Linear.forward and type(weight.data) in PLAIN
    if not plain or weight.dtype not in MERGEABLE:
        raise TypeError(
            f"The base of {name!r} is a {kind.__name__} with a {type(weight.data).__name__} of {weight.dtype}, whose forward "
            "pass may scale the weight: ΔW added to it would be scaled too. Load the base in bf16 to merge, or serve unmerged."
        )


class ShownWeight(Tensor):
    """A weight that says what it is (`dtype`, `device`, `shape`, …), and raises where it is computed with.

    A layer such as T5's casts its input to `wo.weight.dtype`, and goes on working. What multiplies by `layer.weight` itself,
    as Mamba does, would pass the adapter over without a word.
    """

    ASKED = frozenset([
        *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "layout")),
        Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__repr__,
    ])  # fmt: skip

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in cls.ASKED:
            raise RuntimeError(
                "The weight of a layer with an adapter is computed with, past the adapter: leave this layer out of "
                "target_modules; base_layer.weight is the base's own weight, delta_weight() the update."
            )
        return super().__torch_function__(func, types, args, kwargs)


def shown(weight: Tensor) -> Tensor:
    """`weight`, to be looked at and not computed with (`ShownWeight`)."""
    return weight.data.as_subclass(ShownWeight)


def update_dtype(y: Tensor) -> torch.dtype:
    """The type in which the update of the base's output `y` is computed: autocast's where it is on, else y's."""
    kind = y.device.type
    return (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind) and y.dtype != torch.float64
        else y.dtype
    )


def whole(tensor: Tensor) -> Tensor:
    """`tensor` without its gradient's history, gathered if FSDP2 has sharded it (`DTensor`).

    Raises RuntimeError where accelerate has offloaded it: there are no numbers to copy then.
    """
    if tensor.is_meta:
        raise RuntimeError(
            "A tensor of the adapter is offloaded, so it can't be read here: let accelerate dispatch the base first, and "
            "inject then (factors stay where the layer computes), or call accelerate.hooks.remove_hook_from_submodules(model)."
        )
    return gathered(tensor.detach())


def gathered(tensor: Tensor) -> Tensor:
    """As `whole`, with the gradient's history: for a loss that is computed from parameters."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the parameters of `model` over several processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Raise RuntimeError, naming `what` would be done, if FSDP2 has spread the parameters of `model`."""
    if is_sharded(model):
        raise RuntimeError(
            f"FSDP2 (fully_shard) has spread this model's parameters over several processes, where {what} is not supported: "
            "train with DistributedDataParallel (accelerate launch), where each process holds the model."
        )


@torch.no_grad()
def zero_where(tensor: Tensor, mask: Tensor) -> None:
    """Set `tensor` to zero where `mask`, which has its whole shape, is True; in place, sharded or not."""
    if isinstance(tensor, DTensor):
        new = whole(tensor).masked_fill(mask, 0.0)
        tensor.copy_(distribute_tensor(new, tensor.device_mesh, tensor.placements))
    else:
        tensor.masked_fill_(mask, 0.0)


@torch.no_grad()
def check_sum_finite(weight: Tensor, delta: Tensor, name: str) -> None:
    """Raise ValueError, with the layer's `name`, if `delta` has a NaN or `weight + delta` could leave the weight's range."""
    if not delta.numel():
        return
    largest = float(weight.abs().max().double() + delta.abs().max().double())
    if not largest <= torch.finfo(weight.dtype).max:  # so that NaN is refused too
        raise ValueError(
            f"The update of {name!r} is not finite in {weight.dtype}: its training diverged, or its scale is too large. "
            "Load an earlier checkpoint."
        )


def check_base_comes_along(layer: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook before `load_state_dict`: raise RuntimeError where an adapter is taken over without the base that it is merged into."""
    state = state_dict.get(f"{prefix}_extra_state")
    if state is None or f"{prefix}base_layer.weight" in state_dict:
        return
    if layer.merged or state[1]:
        raise RuntimeError(
            f"{prefix.rstrip('.')!r} is merged, and this state_dict lacks the base weight, which holds the update: call unmerge(model) "
            "before a state is taken or loaded, or use adapter_state and use_adapter."
        )


def check_skip(model: nn.Module, skip: Iterable[str]) -> None:
    """Raise ValueError unless `skip` is a list of last names of the model's layers; `lm_head` may be missing."""
    names = {n.removesuffix(".base_layer").rpartition(".")[2] for n, _ in model.named_modules()}
    if unknown := sorted({skip} if isinstance(skip, str) else set(skip) - names - {"lm_head"}):
        raise ValueError(
            f"skip holds {unknown[0]!r}: a list of last names of this model's layers is expected, such as ('lm_head', 'down_proj')."
        )


@torch.no_grad()
def hold(weight: Any, delta: Tensor) -> None:
    """Add an update to a weight of another model, in place, and note on the weight that it holds it."""
    weight.copy_(weight.float() + delta.to(weight.device))
    weight.holds = _mark(weight, delta)


def check_not_held(weight: Tensor, delta: Tensor, name: str) -> None:
    """Raise RuntimeError, with the layer's `name`, if `hold` has added this update already and nothing was written since."""
    if delta.any() and getattr(weight, "holds", None) == _mark(weight, delta):
        raise RuntimeError(
            f"{name!r} of the original holds this update already: a second merge would add it twice. Load the original again."
        )


def _mark(weight: Tensor, delta: Tensor) -> tuple[int, float]:
    return weight._version, float(delta.double().norm())
