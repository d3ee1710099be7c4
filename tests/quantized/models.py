"""Quantised adapters that these tests share."""

from torch import nn

from lora_course.injection import inject
from lora_course.quantized import (
    QuantizedLoRALinear,
)
from tests.models import config, qwen, randomize

# 48, 80 and 24 are no multiples of 20: the last group of a row is shorter
GRIDS = [
    {"granularity": "tensor"},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 20},
]


def adapted(
    seed: int = 1, base: nn.Module | None = None, fields: dict | None = None, **arguments: object
) -> nn.Module:
    arguments = {"bits": 4, "group_size": 20} | arguments
    return randomize(
        inject(base or qwen(), config(**fields or {}), layer=QuantizedLoRALinear, **arguments), seed
    )


PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 7}, "use_rslora": True}
