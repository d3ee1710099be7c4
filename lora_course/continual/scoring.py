"""How well a model does a task: the mean loss a token over held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from lora_course.continual.memory import Rows
from lora_course.runs import sample_of


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    rows: Rows,
    batch_size: int = 8,
    data_collator: Callable[..., Any] | None = None,
) -> float:
    """Mean −log p a token over `rows`, in nats; labels of −100 don't count, and without any other the mean is NaN. Each
    module's mode is left as it was.

    data_collator: makes a batch of rows of several lengths. Raises ValueError for such rows without one.
    """
    lengths = {len(row["input_ids"]) for row in sample_of(rows)}
    if data_collator is None and len(lengths) > 1:
        raise ValueError(
            f"Rows have {min(lengths)} to {max(lengths)} tokens, and nothing pads them: give data_collator="
            "transformers.DataCollatorForSeq2Seq(tokenizer), which pads labels too."
        )
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    total, tokens = 0.0, 0
    found: Any = (
        rows  # a DataLoader takes what has a length and an index, and its type says Dataset
    )
    for batch in DataLoader(found, batch_size, collate_fn=data_collator or default_data_collator):
        count = int((batch["labels"][:, 1:] != -100).sum())
        batch = {name: value.to(device) for name, value in batch.items()}
        if count:
            total += model(**batch, use_cache=False).loss.item() * count
            tokens += count
    for module, training in modes:
        module.training = training
    return total / tokens if tokens else math.nan
