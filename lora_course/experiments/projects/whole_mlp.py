"""The project of chapter 4.4: the whole MLP of a block as one function, with plain LoRA on its three layers.

    g = W_g x + s B_g A_g x̃,    u = W_u x + s B_u A_u x̃',    h = silu(g) ∘ u,    y = W_d h + s B_d A_d h̃

Kept are x, g, u and for dropout three masks of one byte an element; silu(g) and h are computed again. Counted before: the three
fused layers of the chapter keep silu(g) and h as well, which silu, the product and the last layer ask for, so that this function keeps
2 · tokens · width · 4 bytes less in each block, at every rank and with dropout too. Expected, before the first run: the measured
difference is that number, to the byte; the plain model keeps more than both; a step takes no longer than the fused layers', to 5%, as
what is computed again is no matrix product but a thin one; checkpointing the MLP has a lower peak, and takes longer, as it repeats
three wide products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from lora_course import lab
from lora_course.experiments import Runs, Study, Witness
from lora_course.experiments import fused_costs as costs
from lora_course.lab.memory import saved_bytes

SETTINGS: dict[str, Any] = {
    key: costs.SETTINGS[key] for key in ("model", "batch", "length", "dropout")
} | {"ranks": [16, 64], "rounds": 15, "rank of the steps": 16}
Layer = tuple[Tensor, Tensor, Tensor]  # W [out, in], A [r, in], B [out, r]


def forward_of(x: Tensor, layer: Layer, s: float, p: float) -> tuple[Tensor, Tensor | None]:
    """`[rows, in]` → `[rows, out]`, and the mask of the dropout."""
    W, A, B = layer
    dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
    return (x @ W.t()).addmm_(dropped @ A.t(), B.t().contiguous(), alpha=s), mask


def backward_of(
    grad: Tensor, x: Tensor, layer: Layer, s: float, p: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂y `[rows, out]` → ∂L/∂x, ∂L/∂A, ∂L/∂B."""
    W, A, B = layer
    thin = s * (grad @ B)
    if mask is None:
        dropped, grad_x = x, (grad @ W).addmm_(thin, A)
    else:
        keep = mask.to(x.dtype) / (1 - p)
        dropped, grad_x = x * keep, (grad @ W).add_((thin @ A) * keep)
    return grad_x, thin.t() @ dropped, ((s * (dropped @ A.t())).t() @ grad).t()


class FusedMLP(torch.autograd.Function):
    """`(x, s, p, W, A, B of gate, of up, of down)` → y; W frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: float, p: float, *tensors: Tensor) -> Tensor:
        gate, up, down = _layers(tensors)
        (g, of_gate), (u, of_up) = (forward_of(x, layer, s, p) for layer in (gate, up))
        y, of_down = forward_of(silu(g) * u, down, s, p)
        ctx.save_for_backward(x, g, u, of_gate, of_up, of_down, *tensors)
        ctx.s, ctx.p = s, p
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, of_gate, of_up, of_down, *tensors = ctx.saved_tensors
        gate, up, down = _layers(tensors)
        a, sigma = silu(g), g.sigmoid()
        grad_h, *of_last = backward_of(grad, a * u, down, ctx.s, ctx.p, of_down)
        grad_g = grad_h * u * (sigma + a * (1 - sigma))
        grad_x, *of_first = backward_of(grad_g, x, gate, ctx.s, ctx.p, of_gate)
        more, *of_second = backward_of(grad_h * a, x, up, ctx.s, ctx.p, of_up)
        return grad_x + more, None, None, None, *of_first, None, *of_second, None, *of_last


def _layers(tensors: Sequence[Tensor]) -> tuple[Layer, Layer, Layer]:
    one, two, three = (tuple(tensors[i : i + 3]) for i in (0, 3, 6))
    return one, two, three  # type: ignore[return-value]  # three tensors each


def tensors_of(mlp: Any) -> list[Tensor]:
    layers = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return [t for layer in layers for t in (layer.base_layer.weight, layer.A, layer.B)]


def fused_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        dropout, s = mlp.gate_proj.lora_dropout, mlp.gate_proj.scaling
        p = dropout.p if mlp.training and isinstance(dropout, nn.Dropout) else 0.0
        return FusedMLP.apply(x.flatten(0, -2), s, p, *tensors_of(mlp)).view(x.shape)

    return forward


def made(kind: str, r: int, dropout: float) -> Any:
    """nano with plain layers, fused ones, a fused MLP beside fused ones, or a checkpointed MLP beside them."""
    model: Any = costs.injected("plain" if kind == "plain" else "fused", r, dropout)
    for block in model.model.layers:
        if kind == "whole MLP":
            block.mlp.forward = fused_forward(block.mlp)
        if kind == "checkpointed":
            again = type(block.mlp).forward.__get__(block.mlp)
            block.mlp.forward = lambda x, again=again: checkpoint(again, x, use_reentrant=False)
    return model


KINDS = ("plain", "fused", "whole MLP", "checkpointed")


def checked(dropout: float) -> dict[str, Any]:
    """`gradcheck` in float64 on 3 rows, in 5, width 7, rank 2, all factors at random; and the gradients of a whole model's step,
    as far as they lie from the plain model's, relative to their size (without dropout, whose draws differ)."""
    torch.manual_seed(0)
    shapes = [(7, 5), (2, 5), (7, 2)] * 2 + [(5, 7), (2, 7), (5, 2)]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    factors = [t.requires_grad_(i % 3 > 0) for i, t in enumerate(drawn)]

    def function(*inputs: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same masks in every call
        return FusedMLP.apply(inputs[0], 0.7, dropout, *inputs[1:])

    found = {"gradcheck": float(torch.autograd.gradcheck(function, (x, *factors)))}
    if not dropout:
        ids, grads = costs.tokens(2, 32), {}
        for kind in ("plain", "whole MLP"):
            model = made(kind, 4, 0.0)
            costs.step(model, ids)
            grads[kind] = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.requires_grad]
            )
        apart = (grads["whole MLP"] - grads["plain"]).norm() / grads["plain"].norm()
        found["model"] = apart.item()
    return found


def memory(kind: str, r: int, dropout: float) -> dict[str, int]:
    """As `fused_costs.memory`; a checkpoint keeps its input outside of what autograd's hooks see, so its peak alone counts."""
    model, ids = made(kind, r, dropout), costs.tokens(SETTINGS["batch"], SETTINGS["length"])
    peak = lab.peak_memory(lambda: costs.step(model, ids))[1]
    if kind == "checkpointed":
        return {"peak": peak}
    saved = saved_bytes(model, lambda: costs.forward(model, ids))
    config, rows = model.config, SETTINGS["batch"] * SETTINGS["length"]
    return {"saved": saved, "peak": peak, "counted": 2 * rows * config.intermediate_size * 4 * config.num_hidden_layers}  # fmt: skip


def times() -> dict[str, list[float]]:
    r, ids = SETTINGS["rank of the steps"], costs.tokens(SETTINGS["batch"], SETTINGS["length"])
    models = {kind: made(kind, r, 0.0) for kind in KINDS}

    def arm(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            costs.step(model, ids)

        return run

    return costs.race({kind: arm(model) for kind, model in models.items()}, SETTINGS["rounds"])


def body(runs: Runs) -> None:
    modes = (0.0, SETTINGS["dropout"])
    runs.expect(len(modes) + len(KINDS) * len(SETTINGS["ranks"]) * len(modes) + 1)
    for dropout in modes:
        runs(f"check/{dropout:g}", checked, dropout)
        for r in SETTINGS["ranks"]:
            for kind in KINDS:
                runs(f"memory/{dropout:g}/{r}/{kind}", memory, kind, r, dropout)
    runs("step", times)


WITNESS = Witness(
    ("check/0.1", "memory/0.1/64/whole MLP"),
    {"gradcheck": 0, "saved": 0, "peak": 0},
    "bytes are counted, and times are not compared",
)
STUDY = Study("4_4_project", SETTINGS, body, WITNESS)
