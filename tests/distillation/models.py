"""Students and teachers that these tests share."""

import datasets
import torch
from torch import nn

from lora_course.injection import inject
from tests.models import config, qwen, randomize

KINDS = [{}, {"divergence": "reverse"}, {"mixture": "logits"}]


def adapted(seed: int = 1, base: nn.Module | None = None, **fields: object) -> nn.Module:
    """The tests' base (or `base`) with an adapter as after training."""
    return randomize(inject(qwen() if base is None else base, config(**fields)), seed)


def student(**fields: object) -> nn.Module:
    return adapted(seed=7, r=2, lora_alpha=4, **fields)


def rows(count: int = 24, length: int = 9) -> datasets.Dataset:
    """Random tokens of two domains; a different number of labels in every row counts."""
    ids = torch.randint(97, (count, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[: i % 6] = -100
    columns = {
        "input_ids": ids.numpy(),
        "labels": labels.numpy(),
        "domain": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(columns).with_format("torch")
