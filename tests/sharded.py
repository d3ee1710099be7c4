"""What two processes train under FSDP2 in the tests: `accelerate launch -m tests.sharded FOLDER`, and the same in one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import AdaLoraConfig
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_course.adalora import AdaLoRALinear, RankAllocator, kept_triplets, regularizer
from lora_course.checkpoint import restore_adapter, save_adapter
from lora_course.experts import ExpertsLinear, balance_loss
from lora_course.export import export_peft
from lora_course.injection import inject
from lora_course.states import adapter_state
from tests.distributed import TARGETS, injected
from tests.models import batch, config, qwen, randomize

STEPS = 6


def adalora() -> nn.Module:
    torch.manual_seed(1)
    fields = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=STEPS, target_modules=TARGETS
    )
    return randomize(inject(qwen(), fields, AdaLoRALinear))


MODELS = {
    "lora": injected,
    "experts": lambda: injected(ExpertsLinear, num_experts=3, top_k=2),
    "adalora": adalora,
}


def fit(name: str, folder: Path) -> dict[str, Any]:
    """Six steps on a global batch of four rows, the last three after a restart from what was saved."""
    losses: list[float] = []
    model = shard(MODELS[name]())
    losses += train(name, model, range(1, 4))
    save_adapter(model, folder / name)
    if several():
        dist.barrier()
    model = shard(MODELS[name]())
    restore_adapter(model, folder / name)
    losses += train(name, model, range(4, STEPS + 1))
    if name != "experts":
        export_peft(model, folder / f"{name}-peft")
    kept = kept_triplets(model) if name == "adalora" else None
    return {"losses": losses, "state": adapter_state(model), "kept": kept}


def several() -> bool:
    return dist.is_initialized()


def shard(model: nn.Module) -> nn.Module:
    if several():
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    return model


def train(name: str, model: nn.Module, steps: range) -> list[float]:
    """Plain SGD: its only state is the adapter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    allocator = RankAllocator(model) if name == "adalora" else None
    rank, world = (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)
    rows = {key: value[rank::world] for key, value in batch(4).items()}
    losses = []
    for step in steps:
        loss = model.train()(**rows, use_cache=False).loss
        extra = {"experts": balance_loss, "adalora": regularizer}.get(name)
        if extra:
            loss = loss + 0.1 * extra(model)
        loss.backward()
        optimizer.step()
        if allocator:
            allocator.step(step)
        optimizer.zero_grad()
        mean = loss.detach()
        if several():
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def refused(name: str, model: nn.Module, make: Callable[[nn.Module], Any]) -> None:
    """Sees to it that what can't act on a sharded model says so, by name, before it does anything."""
    try:
        make(model)
    except RuntimeError as error:
        assert "FSDP2" in str(error) and name in str(error), error
    else:
        raise AssertionError(f"{name} was not refused")


def check_refusals() -> None:
    from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
    from lora_course.distillation import Teachers
    from lora_course.hierarchical import NestedLoRALinear, RankSampler
    from lora_course.injection import merge
    from lora_course.sparse import GatedLoRALinear, GateSparsity
    from lora_course.states import factor_state

    state = factor_state(injected())
    plain, growing = shard(injected()), shard(injected(GrowingLoRALinear))
    nested, gated = (
        shard(injected(NestedLoRALinear, ranks=[1, 4])),
        shard(injected(GatedLoRALinear)),
    )
    schedule = GrowthSchedule(budget=32, start=2, every=3, top=2)
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    refused("RankGrower", growing, lambda model: RankGrower(model, schedule).observe())
    refused("RankSampler", nested, lambda model: RankSampler(model).begin_step(1))
    refused("GateSparsity", gated, lambda model: GateSparsity(model, 0.1).step(optimizer))
    refused("teachers", plain, lambda model: Teachers(model, {"one": state}))
    refused("spread", plain, merge)
    refused("injecting", shard(qwen()), lambda model: inject(model, config()))


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    for name in MODELS:
        result = fit(name, Path(folder))
        torch.save(result, Path(folder) / f"{name}-{os.environ['RANK']}.pt")
    check_refusals()
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
