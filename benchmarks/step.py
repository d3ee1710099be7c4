"""What is timed of a model: one step of training, or one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass
class Arm:
    """What is timed: a training step, or a forward pass. A model with nothing to train goes without an optimiser.

    after: called between the optimiser's step and zero_grad.
    """

    model: nn.Module
    ids: torch.Tensor
    autocast: bool = False
    auxiliary_loss: Callable[[nn.Module], torch.Tensor] | None = None
    after: Callable[[], object] | None = None
    training: bool = True
    forward: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.model.train(self.training)
        if self.training and (trained := [p for p in self.model.parameters() if p.requires_grad]):
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # a Trainer's default

    def run(self) -> None:
        with (
            torch.set_grad_enabled(self.training),
            torch.autocast("cpu", torch.bfloat16, enabled=self.autocast),
        ):
            out = self.model(input_ids=self.ids, labels=self.ids, use_cache=False, **self.forward)
        if self.training:
            loss = out.loss + self.auxiliary_loss(self.model) if self.auxiliary_loss else out.loss
            loss.backward()
        if self.optimizer:
            self.optimizer.step()
            if self.after:
                self.after()
            self.optimizer.zero_grad()
