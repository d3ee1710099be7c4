"""bitsandbytes' 4-bit layers in a model: which they are, what they weigh, and how their weights are set and kept as they are."""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel


def layers_4bit(model: nn.Module) -> dict[str, Any]:
    """By name. Any: bitsandbytes gives its weights attributes that their types don't have."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }


def set_weight(layer: Linear4bit, weight: Tensor, quant_type: str, double_quant: bool) -> None:
    """Quantise a weight `[out, in]` into a layer: `Params4bit` does so when it is sent to a device, even if it is there already."""
    new: Any = Params4bit(
        weight,
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=double_quant,
        module=layer,
    )
    layer.weight = new.to(weight.device)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all 4-bit weights of a model (or of one layer) with their constants: Σ n · `nf4.storage_bits(n)` / 8.

    bitsandbytes keeps another 1,088 bytes a layer that are not counted: a copy of each codebook.
    `model.get_memory_footprint()` counts the codes but none of the constants.
    """
    total = 0
    for layer in layers_4bit(model).values():
        state = layer.weight.quant_state
        constants = (
            [state.absmax, state.state2.absmax, state.offset] if state.nested else [state.absmax]
        )
        total += layer.weight.nbytes + sum(tensor.nbytes for tensor in constants)
    return total


def protect(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking the 4-bit weights of a model in place; call it before the first forward.

    On a CPU with AVX512-BF16 the first forward in eval mode, such as an evaluation before training, rearranges the codes
    and rounds the constants for a faster kernel. What dequantises the weight later reads the new order as if it were the
    old one: merges and the gradients of all layers below are wrong, without an error. `load_4bit`, `quantize_model` and `inject` do this.

    Raises:
        RuntimeError: a weight is repacked already. bitsandbytes can turn the order back but not the rounding.
    """
    for name, layer in layers_4bit(model).items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name!r} was repacked by a forward in eval mode: gradients and merges would be wrong. Load the model again "
                "and call protect(model) before its first forward."
            )
        layer.support_avx512bf16_for_cpu = False
    return model


def say_4bit(model: PreTrainedModel) -> None:
    """Write into a model's configuration how its layers are packed and which are not: what is saved can be loaded then."""
    layer = next(iter(layers_4bit(model).values()))
    left = [n for n, module in model.named_modules() if type(module) is nn.Linear]
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=layer.weight.quant_type,
        bnb_4bit_use_double_quant=layer.weight.compress_statistics,
        bnb_4bit_compute_dtype=layer.compute_dtype,
        llm_int8_skip_modules=[name.removesuffix(".base_layer") for name in left],
    )
