"""AdaLoRA models and steps that these tests share."""

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

from lora_course.adalora import (
    AdaLoRALinear,
)
from lora_course.injection import adapter_layers, inject
from tests.models import qwen

SCHEDULE = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": 11,
    "beta1": 0.8,
    "beta2": 0.7,
}


def config(**fields: object) -> AdaLoraConfig:
    return AdaLoraConfig(
        **{
            **SCHEDULE,
            "lora_alpha": 12,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **fields,
        }
    )


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Factors as after training: λ is not zero, so that nothing agrees by accident."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for factor, std in ((layer.A, 0.2), (layer.E, 1.0), (layer.B, 0.2)):
            factor.data.normal_(std=std, generator=generator)
    return model


def adapted(seed: int = 1, **fields: object) -> nn.Module:
    return randomize(inject(qwen(), config(**fields), layer=AdaLoRALinear), seed)


def peft_of(ours: nn.Module, base: nn.Module, **fields: object) -> PeftModel:
    """PEFT's AdaLoRA on the same base with the same factors, in the base's type."""
    theirs = get_peft_model(base, config(**fields)).to(base.dtype)
    for name, layer in adapter_layers(ours).items():
        peft = theirs.base_model.model.get_submodule(name)
        # PEFT divides by ranknum + 1e-5, and makes ranknum trainable where the base is not fp32: take out both
        peft.ranknum["default"].requires_grad_(False).sub_(1e-5)
        for key in "AEB":
            getattr(peft, f"lora_{key}")["default"].data.copy_(getattr(layer, key))
    return theirs


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Momentum, so that masked triplets move; not Adam, which divides by the gradient's size and so amplifies last bits."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
