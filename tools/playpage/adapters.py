"""The adapters' files, and nano with what is in them."""

from __future__ import annotations

import functools

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lora_course import lab
from lora_course.experts import mix_experts
from lora_course.injection import adapter_layers, inject
from lora_course.lora import AdapterState
from lora_course.quantized import fake_quantize
from lora_course.states import adapter_state, use_adapter
from tools.playpage.record import DOMAINS, FOLDER, SETTINGS


def config(r: int, alpha: float) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=SETTINGS["target_modules"])


def write(name: str, state: AdapterState) -> None:
    kept = {k: t.bfloat16().contiguous() for k, t in state.items() if not k.endswith(".scaling")}
    save_file(kept, FOLDER / f"{name}.safetensors")


def read(name: str) -> AdapterState:
    """A file's tensors in fp32."""
    return {k: t.float() for k, t in load_file(FOLDER / f"{name}.safetensors").items()}


def read_adapter(name: str, r: int | None = None) -> AdapterState:
    """A written adapter as a plain LoRA state of scaling 1, cut to its first `r` components."""
    state = read(name)
    one = torch.ones((), dtype=torch.float64)
    cut = {k: t[:r] if k.endswith(".A") else t[:, :r].contiguous() for k, t in state.items()}
    return cut | {f"{k[:-2]}.scaling": one.clone() for k in state if k.endswith(".A")}


def first(state: AdapterState, r: int) -> AdapterState:
    """The first r rows of each A and columns of each B."""
    return {
        k: t[:r] if k.endswith(".A") else t[:, :r].contiguous() if k.endswith(".B") else t
        for k, t in state.items()
    }


def mixture() -> nn.Module:
    """nano with the four written adapters as experts, their routers not yet trained."""
    torch.manual_seed(SETTINGS["seed"])
    return mix_experts(
        lab.load_base(SETTINGS["model"])[0], [read_adapter(domain) for domain in DOMAINS]
    )


def routed() -> nn.Module:
    """`mixture` with the routers that were written."""
    model = mixture()
    return use_adapter(model, adapter_state(model) | read("router"))


@functools.cache
def plain() -> nn.Module:
    """The model into which adapters are put."""
    return inject(lab.load_base(SETTINGS["model"])[0], config(1, 1))


def with_state(state: AdapterState) -> nn.Module:
    return use_adapter(plain(), state)


def quantized_state(state: AdapterState, bits: int, granularity: str) -> AdapterState:
    """Both factors rounded as `QuantizedLoRALinear` rounds them: A's rows and B's columns share scales."""
    grid = (bits, granularity, SETTINGS["group_size"])
    rounded = dict(state)
    for key, tensor in state.items():
        if key.endswith(".A"):
            rounded[key] = fake_quantize(tensor, *grid)
        elif key.endswith(".B"):
            rounded[key] = fake_quantize(tensor.T.contiguous(), *grid).T.contiguous()
    return rounded


@torch.no_grad()
def quantized_base(model: nn.Module, bits: int, granularity: str) -> nn.Module:
    """The adapted linear layers' frozen weights rounded in place; embedding, norms and biases stay."""
    for layer in adapter_layers(model).values():
        weight = layer.base_layer.weight
        weight.copy_(fake_quantize(weight, bits, granularity, SETTINGS["group_size"]))
    return model
