"""QLoRA: a frozen base of 4 bits a weight, an adapter of 32 bits on top, and what becomes of the two afterwards.

    y = x · dequantise(c₁, c₂, W_nf4)ᵀ + b + s · (x Aᵀ) Bᵀ        arXiv 2305.14314, equations 5 and 6

`W_nf4` are 4-bit codes, `c₂` one constant for each block of 64 weights, itself an 8-bit code, and `c₁` what decodes it.
Only A and B are trained; the gradient passes *through* the dequantised weight, which is rebuilt in every pass.

The number format is in `lora_course.nf4`, in plain torch. Here models of bitsandbytes' `Linear4bit` layers are loaded,
protected and merged.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_course.arguments import compute_dtype as fastest_dtype
from lora_course.injection import adapter_layers, adapter_parameters, unload, weight_owners
from lora_course.layers_4bit import layers_4bit, protect, say_4bit, set_weight, stored_bytes
from lora_course.linears import (
    check_mergeable,
    check_not_held,
    check_skip,
    check_sum_finite,
    dequantized,
    hold,
    is_4bit,
)
from lora_course.targets import input_embedding

__all__ = [
    "dequantize_model",
    "load_4bit",
    "merge_into",
    "merge_requantized",
    "optimizer_name",
    "protect",
    "quantize_model",
    "stored_bytes",
]


def load_4bit(
    path_or_name: str | Path,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    device_map: str | dict[str, object] | None = None,
    gradient_checkpointing: bool = True,
    **arguments: object,
) -> PreTrainedModel:
    """Load a causal LM from a folder or the hub with its linear layers in 4 bits, ready for `inject` and training.

    Prepared as `peft.prepare_model_for_kbit_training` does: everything is frozen and what stays out of 4 bits (norms,
    biases, embedding, head) is in fp32, which the training needs in the norms and pays for in the embedding: Qwen2.5-7B's two
    tables of 152,064 × 3,584 then take 4.1 GiB. Gradient checkpointing is the kind that needs no gradient of the input.

    Args:
        quant_type: "nf4" or "fp4".
        compute_dtype: of the matrix products; by default bf16 where the hardware has it, fp16 on older GPUs, where it
            may overflow, fp32 on other CPUs.
        device_map: by default the current GPU, or the CPU. "auto" spreads a model over several GPUs.
        gradient_checkpointing: less memory for about a third more time; acts in training mode only.
        arguments: for `from_pretrained`: `revision`, `attn_implementation`, ….

    Raises:
        ValueError: an unknown `quant_type`; `trust_remote_code`; a model in which no layer became 4-bit.
    """
    if arguments.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code=True runs code from the hub on your machine; a model that transformers knows needs none."
        )
    _check_quant_type(quant_type)
    dtype = compute_dtype or fastest_dtype()
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        path_or_name,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        ),
        dtype=dtype,
        device_map=device_map or {"": torch.cuda.current_device() if on_gpu else "cpu"},
        trust_remote_code=False,
        **arguments,
    )
    if not layers_4bit(model):
        raise ValueError(
            f"{str(path_or_name)!r}: no linear layer became 4-bit. Is its config known to this version of transformers?"
        )
    protect(model)
    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def quantize_model(
    model: nn.Module,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    skip: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Replace the linear layers of a model in memory by frozen 4-bit ones, in place, and protect them.

    An adapter on top stays. `copy.deepcopy(model)` first keeps the original. Blocks are of 64 weights.

    Args:
        compute_dtype: of the matrix products; by default the weights' own.
        skip: last names of layers to leave alone; an output layer that shares the embedding's weight is left alone anyway.

    Raises:
        ValueError: an unknown `quant_type`, a name in `skip` that no layer has, or a model without a linear layer to quantise.
        RuntimeError: an adapter is merged, or a part of it. Nothing has been changed then.
    """
    _check_quant_type(quant_type)
    for name, module in model.named_modules():
        if getattr(module, "merged", False) or getattr(module, "folded", False):
            raise RuntimeError(
                f"{name!r} is merged, wholly or in part: ΔW would be rounded with the base and could not be taken back. "
                "Call unmerge(model) first, or unload(model)."
            )
    check_skip(model, skip)
    embedding = getattr(input_embedding(model), "weight", None)
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name.removesuffix(".base_layer").rpartition(".")[2] not in skip
        and module.weight is not embedding
    }
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to quantise outside skip={skip}: is it quantised already?"
        )
    odd = [n for n, linear in linears.items() if linear.in_features % 2 and _on_cpu(linear)]
    if odd:
        warnings.warn(
            f"{odd[0]!r} is {linears[odd[0]].in_features} wide: for an odd width bitsandbytes compiles a kernel at the first forward "
            "pass on a CPU, which takes minutes. Leave such layers out with skip, or use a GPU.",
            stacklevel=2,
        )
    for name, linear in linears.items():
        bias = linear.bias is not None
        new = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias,
            compute_dtype or linear.weight.dtype,
            device="meta",
        )
        if bias:
            new.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        set_weight(new, linear.weight.detach(), quant_type, double_quant)
        model.set_submodule(name, new.train(linear.training))
    if isinstance(model, PreTrainedModel):
        say_4bit(model)
    return protect(model)


def optimizer_name(device: str | torch.device, bits: int = 32) -> str:
    """What to give `TrainingArguments(optim=…)`: a paged AdamW on a GPU, torch's own on a CPU.

    Pages move an optimiser's state to the host when the GPU runs short, in a long sequence for instance, instead of ending
    the run. Only tensors of 100,000 numbers or more are paged, and with 8 bits only those of 4,096 or more are quantised:
    for a small adapter both change little. A CPU has nothing to page; bitsandbytes would warn and take plain buffers.

    Raises:
        ValueError: `bits` is neither 8 nor 32.
    """
    if bits not in (8, 32):
        raise ValueError(f"bits={bits}: 8 or 32 is expected.")
    return f"paged_adamw_{bits}bit" if torch.device(device).type == "cuda" else "adamw_torch"


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace each 4-bit layer by an `nn.Linear` of the weight it computed with, in place; an adapter on top stays.

    The right way to merge: the adapter was trained on these weights, so `merge(model)` afterwards keeps the function,
    to rounding in `dtype`. What was never in 4 bits (norms, biases, embedding, head) goes to `dtype` too, so that the model
    runs; the adapter stays in fp32. The price is the memory of a full model.

    Raises:
        ValueError: no layer is 4-bit.    RuntimeError: a weight was repacked (see `protect`).
    """
    layers = layers_4bit(protect(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no 4-bit layer: nothing to dequantise.")
    for name, layer in layers.items():
        linear = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(dequantized(layer).to(dtype), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        model.set_submodule(name, linear.train(layer.training))
    kept = adapter_parameters(model)
    for parameter in model.parameters():  # what stayed out of 4 bits: norms, embedding, head
        if parameter.is_floating_point() and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)  # or saving it would say that it is 4-bit
    elif isinstance(model, PreTrainedModel) and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


@torch.no_grad()
def merge_requantized(model: nn.Module) -> nn.Module:
    """Add each adapter to its dequantised weight, quantise the sum again, and take the adapter out; in place.

    As small as the base, and wrong: the base lies on its codes, so a change of less than half a gap is rounded away. The
    smaller ΔW is against the weight, the less of it survives; of a small one nothing does. It is what PEFT's `merge_and_unload` does to a 4-bit base.

    Raises:
        ValueError: no adapter, or an update that is not finite.    TypeError: an adapter's base is not 4-bit.
        RuntimeError: see `protect`. Nothing has been changed then.
    """
    layers = adapter_layers(protect(model))
    for name, layer in layers.items():
        if not is_4bit(layer.base_layer):
            raise TypeError(
                f"{name!r} has a {type(layer.base_layer).__name__} for a base, not a Linear4bit: call merge(model)."
            )
        check_sum_finite(dequantized(layer.base_layer), layer.delta_weight(), name)
    for layer in layers.values():
        base: Any = layer.base_layer
        state = base.weight.quant_state
        merged = dequantized(base).float() + layer.delta_weight()
        set_weight(base, merged.to(state.dtype), state.quant_type, state.nested)
    return unload(model)


@torch.no_grad()
def merge_into(original: nn.Module, model: nn.Module) -> nn.Module:
    """Add the adapter of `model` to the weights of `original`, the plain model before quantisation, in place.

    Common, and wrong too: the adapter was trained on the quantised weights, and the function changes by all of the
    quantisation error. Whether the loss suffers has to be measured.

    Raises:
        ValueError: no adapter, an update that is not finite, or `original` lacks a layer or has it in another shape.
        TypeError, RuntimeError: as `merge`, also where `original` shares a weight, or holds this update already. Nothing has
        been changed then.
    """
    layers = adapter_layers(model)
    linears: dict[str, Any] = dict(original.named_modules())
    for name, layer in layers.items():
        shape = getattr(getattr(linears.get(name), "weight", None), "shape", None)
        if shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{name!r} is {[layer.out_features, layer.in_features]} in the model and {shape and list(shape)} in the original: "
                "give the plain, unquantised model without an adapter that the 4-bit one was made from."
            )
    owners = weight_owners(original)
    for name, layer in layers.items():
        check_mergeable(linears[name], name)
        weight = linears[name].weight
        if others := [owner for owner in owners[id(weight)] if owner != name]:
            raise RuntimeError(
                f"{name!r} shares its weight with {others[0]!r} in the original: ΔW would be written to both. "
                "Give one of them a weight of its own (a copy) first."
            )
        delta = layer.delta_weight().to(weight.device)
        check_sum_finite(weight, delta, name)
        check_not_held(weight, delta, name)
    for name, layer in layers.items():
        hold(linears[name].weight, layer.delta_weight())
    return original


def _on_cpu(linear: nn.Linear) -> bool:
    return linear.weight.device.type == "cpu"


def _check_quant_type(quant_type: str) -> None:
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type={quant_type!r}: 'nf4' or 'fp4' is expected.")
