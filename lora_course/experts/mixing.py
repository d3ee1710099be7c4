"""Experts of a model: put in from existing adapters, taken out, frozen, balanced, and their gates read or fixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lora_course.checkpoint import load_adapter
from lora_course.experts.layer import ExpertsLinear
from lora_course.experts.router import Router
from lora_course.export import load_peft
from lora_course.injection import inject, injection_of, layers_of, unload
from lora_course.lora import AdapterState
from lora_course.processes import count, sum_over_processes
from lora_course.states import adapter_state, concatenate, factor_state, split_state, use_adapter


def mix_experts(
    model: nn.Module,
    experts: Sequence[AdapterState | str | Path],
    train_experts: bool = False,
    **arguments: object,
) -> nn.Module:
    """Put existing adapters into the plain `model` as its experts, frozen, with routers that are ready to train.

    Args:
        model: without an adapter.
        experts: for each, a plain LoRA state (`factor_state`, `expert_state`, `concatenate`), or a folder that `save_adapter` or PEFT
            wrote. Ranks, scales and modules may differ: an expert adds nothing to a module that it lacks.
        train_experts: let the experts train too.
        arguments: `routing`, `gate_by`, `top_k`, `prefix` of `ExpertsLinear`.

    Returns:
        `model`, injected with `ExpertsLinear`. Their dropout is 0.

    Raises:
        ValueError: no expert, or one that does not fit. The model is then as it was.
    """
    if not experts:
        raise ValueError("experts is empty: give one or more adapter states or folders.")
    given = [
        expert if isinstance(expert, dict) else read_expert(model, Path(expert))
        for expert in experts
    ]
    together, states = split_state(concatenate(given)), [split_state(state) for state in given]
    together = {name: t for name, t in together.items() if len(t["A"])}  # rank 0 in all: pruned
    if not together:
        raise ValueError("Every module of every expert has rank 0: there is nothing to mix.")
    r = max(tensors["A"].shape[0] for state in states for tensors in state.values())
    config = LoraConfig(r=r, lora_alpha=r, target_modules=list(together), task_type="CAUSAL_LM")
    inject(
        model,
        config,
        ExpertsLinear,
        num_experts=len(states),
        train_experts=train_experts,
        **arguments,
    )
    mixed = adapter_state(model)
    for name, tensors in together.items():
        # The first expert's scale is kept, for training that goes on.
        scaling = next(state[name]["scaling"] for state in states if name in state)
        ranks = torch.tensor(
            [state[name]["A"].shape[0] if name in state else 0 for state in states]
        )
        new = {"A": tensors["A"], "B": tensors["B"] / scaling, "ranks": ranks, "scaling": scaling}
        mixed |= {f"{name}.{key}": tensor for key, tensor in new.items()}
    try:
        return use_adapter(model, mixed)
    except Exception:
        unload(model)
        raise


def read_expert(model: nn.Module, folder: Path) -> AdapterState:
    """The plain factors of the adapter in a folder, which is put into `model` for a moment and taken out again."""
    (load_peft if (folder / "adapter_config.json").is_file() else load_adapter)(model, folder)
    try:
        return factor_state(model)
    finally:
        unload(model)


def expert_state(model: nn.Module, index: int) -> AdapterState:
    """A copy of one expert as a plain LoRA state, for `use_adapter`, `mix_experts` or `export_peft`.

    Modules that the expert lacks are left out. Raises ValueError where there is no such expert.
    """
    state: AdapterState = {}
    for name, layer in layers_of(model, ExpertsLinear).items():
        if not 0 <= index < layer.num_experts:
            raise ValueError(
                f"index={index}: this model has the experts 0 to {layer.num_experts - 1}."
            )
        ranks = layer.ranks.tolist()
        rows = slice(sum(ranks[:index]), sum(ranks[: index + 1]))
        if ranks[index]:
            state |= {
                f"{name}.A": layer.A.detach()[rows].clone(),
                f"{name}.B": layer.B.detach()[:, rows].clone(),
                f"{name}.scaling": torch.tensor(layer.scaling, dtype=torch.float64),
            }
    return state


def freeze_experts(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Train routers only (or, with `frozen=False`, experts and routers), also after saving and loading."""
    for layer in layers_of(model, ExpertsLinear).values():
        layer.train_experts = not frozen
        layer.A.requires_grad_(not frozen)
        layer.B.requires_grad_(not frozen)
    injection_of(model).arguments["train_experts"] = not frozen
    return model


def balance_loss(model: nn.Module, weight: float = 1.0) -> Tensor:
    """Switch's loss of the latest forward pass, mean over routers: `weight` · E · Σ_e f_e P_e (arXiv 2101.03961, section 2.2).

    f_e: share of the real tokens (of the sequences, for a sequence gate) whose largest gate, or k largest, is e's;
    P_e: mean probability of e. 1 where experts are used equally, E where all goes to one; only P_e has a gradient.
    With several processes f and P are those of their batches together (arXiv 2501.11873), and every process calls this.
    For `AdapterTrainer`: `auxiliary_loss=functools.partial(balance_loss, weight=0.01)`.

    Raises RuntimeError before the first forward pass.
    """
    losses = []
    for router in _routers(model):
        p = router.probabilities
        if p is None:
            raise RuntimeError(
                "There are no gates yet: balance_loss follows a forward pass of the model."
            )
        real = (
            torch.ones_like(p[..., 0])
            if router.owner.gate_by == "sequence"
            else router.current.real.to(p)
        )
        # With several processes f and the number of tokens are those of all, so that the mean of the processes' losses, which
        # is what they train on, is the loss of the whole batch.
        share = (real / sum_over_processes(real.sum()) * count())[..., None]
        chosen = p.topk(router.owner.top_k or 1).indices
        f = (share * torch.zeros_like(p).scatter(-1, chosen, 1 / chosen.shape[-1])).sum((0, 1))
        f = sum_over_processes(f) / count()
        losses.append(p.shape[-1] * (f * (share * p).sum((0, 1))).sum())
    return weight * torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def latest_gates(model: nn.Module) -> dict[str, Tensor]:
    """The gates of the latest forward pass, `[B, T, E]`, by the name of the block, or of the stack for a shared router."""
    return {
        router.name: router.gates.detach() for router in _routers(model) if router.gates is not None
    }


@contextmanager
def fixed_gates(model: nn.Module, gates: Tensor | Sequence[float]) -> Iterator[nn.Module]:
    """Within the block all routers give these gates: `[E]`, `[B, 1, E]` or `[B, T, E]`; one-hot ones choose one expert.

    Within another such block these gates hold, and after it the outer ones again.

    Raises ValueError where their last dimension is not the number of experts, or one of them is negative or not finite.
    """
    try:
        gates = torch.as_tensor(gates, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"gates={gates!r}: a tensor or a list with a number for each expert is expected."
        ) from None
    routers = _routers(model)
    if not gates.ndim or gates.shape[-1] != routers[0].owner.num_experts:
        raise ValueError(
            f"gates has the shape {list(gates.shape)}; [E], [B, 1, E] or [B, T, E] with E = {routers[0].owner.num_experts} is expected."
        )
    if not bool((torch.isfinite(gates) & (gates >= 0)).all()):
        raise ValueError(
            "gates holds numbers that are negative, NaN or infinite: weights of 0 or more are expected."
        )
    before = [router.fixed for router in routers]
    for router in routers:
        router.fixed = gates
    try:
        yield model
    finally:
        for router, fixed in zip(routers, before, strict=True):
            router.fixed = fixed


def mask_prefix(labels: Tensor, prefix: int, attention_mask: Tensor | None = None) -> Tensor:
    """A copy of `labels` `[B, T]` that scores no token of a sequence's prefix: -100 on its first `prefix` real tokens, and on padding."""
    mask = torch.ones_like(labels) if attention_mask is None else attention_mask.long()
    return labels.masked_fill((mask.cumsum(1) <= prefix) | (mask == 0), -100)


def _routers(model: nn.Module) -> list[Router]:
    found = (layer.gating for layer in layers_of(model, ExpertsLinear).values())
    return list(dict.fromkeys(router for router in found if router is not None))
