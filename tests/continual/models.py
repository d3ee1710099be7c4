"""Tasks and models that these tests share."""

import functools
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from torch import Tensor, nn

from lora_course.arguments import training_arguments
from lora_course.continual import (
    Isolated,
    Orthogonal,
    Replay,
    Sequential,
    Task,
)
from lora_course.injection import inject
from lora_course.lora import LoRALinear
from tests.models import config, qwen

LENGTH = 10


@functools.cache
def rows(task: int, count: int = 16, seed: int = 0) -> datasets.Dataset:
    """Task k: any order of the tokens 10k … 10k + 4; what one task teaches is wrong for the others."""
    ids = 10 * task + torch.randint(
        5, (count, LENGTH), generator=torch.Generator().manual_seed(100 * task + seed)
    )
    return datasets.Dataset.from_dict(
        {"input_ids": ids.numpy(), "labels": ids.numpy()}
    ).with_format("torch")


def tasks(count: int = 3) -> list[Task]:
    return [Task(f"task {k}", rows(k), rows(k, 8, seed=1)) for k in range(count)]


def injected(
    strategy: Sequential | None = None, base: nn.Module | None = None, **fields: object
) -> nn.Module:
    torch.manual_seed(5)
    fields = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1} | fields
    return inject(base or decided(), config(**fields), strategy.layer if strategy else LoRALinear)


def decided() -> nn.Module:
    """A base whose logits can get far apart, so that there is something to learn and to forget."""
    base = qwen()
    base.lm_head.weight.data.mul_(10)
    return base


def arguments(folder: Path, **overrides: object):
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 2,
        "bf16": False, "disable_tqdm": True, **overrides,
    }  # fmt: skip
    return training_arguments(folder, device="cpu", **settings)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


STRATEGIES: dict[str, Callable[[], Sequential]] = {
    "sequential": Sequential, "replay": lambda: Replay(1000), "orthogonal": lambda: Orthogonal(0.01), "isolated": Isolated,
}  # fmt: skip


def plain(count: int, size: int = 3, start: int = 0) -> list[dict[str, list[int]]]:
    return [{"input_ids": [start + i] * size} for i in range(count)]
