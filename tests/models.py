"""Small models, batches and measures that tests share."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lora_course.injection import adapter_layers, inject

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
PATTERNS = {
    "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"k_proj": 7}, "use_rslora": True,
    "lora_dropout": 0.1,
}  # fmt: skip
"""Fields of a configuration whose ranks and scales differ from layer to layer."""


def qwen(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()  # q, k, v have a bias


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Factors as after training: none is zero, so that nothing agrees by accident."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for factor in (layer.A, layer.B):
            factor.data.normal_(std=0.1, generator=generator)
    return model


def config(**fields: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | fields
    )


def pair(base: nn.Module | None = None, **fields: object) -> tuple[nn.Module, PeftModel]:
    """The same base with the same random factors, in this package's layers and in PEFT's."""
    base = base or qwen()
    ours = randomize(inject(copy.deepcopy(base), config(**fields)))
    theirs = get_peft_model(copy.deepcopy(base), config(**fields))
    names = set()
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            layer = adapter_layers(ours)[name]
            module.lora_A["default"].weight.data.copy_(layer.A)
            module.lora_B["default"].weight.data.copy_(layer.B)
            assert module.scaling["default"] == pytest.approx(layer.scaling)
            names.add(name)
    assert names == set(adapter_layers(ours))
    return ours, theirs


def batch(rows: int = 2, length: int = 9, vocab: int = 97) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


class Calls(TorchDispatchMode):
    """Everything that torch computes within the block: (name, arguments, result), in `made`."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple, object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
        out = function(*args, **(kwargs or {}))
        self.made.append((str(function), args, out))
        return out


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def linear4bit(quant_type: str = "nf4") -> nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        128, 192, bias=True, compute_dtype=torch.float32, quant_type=quant_type
    )
    return layer.to("cpu").requires_grad_(False)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit: 0.0 and -0.0 differ, as `torch.equal` would not tell."""
    view = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(view), b.contiguous().view(view))
    )
