"""Muon, the optimiser of nano's matrices."""

from __future__ import annotations

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration (Jordan 2024), in fp32.

    torch.optim.Muon iterates in bfloat16, which is slow on CPUs without bfloat16 arithmetic.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(velocity, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The matrix with its singular values brought near 1, by a quintic Newton-Schulz iteration."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
