"""Exports of every variant, read by the rules of PEFT and of the servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from torch import nn

from lora_course.adalora import AdaLoRALinear, prune_triplets
from lora_course.adaptive import GrowingLoRALinear
from lora_course.export import export_peft
from lora_course.hierarchical import NestedLoRALinear
from lora_course.injection import adapter_layers, inject
from lora_course.progressive import Stage, begin_stage, inject_stages
from lora_course.sparse import GatedLoRALinear, prune_gates
from tests.models import batch, config, qwen, randomize
from tests.servers import SERVERS


def adalora() -> nn.Module:
    """Ranks that differ, one of them 0: what allocation leaves."""
    given = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], total_step=20, tinit=1, tfinal=1
    )  # fmt: skip
    model = randomize(inject(qwen(), given, AdaLoRALinear))
    for kept, layer in zip((0, 3, 1, 4), adapter_layers(model).values(), strict=True):
        layer.mask[kept:] = False
        nn.init.normal_(layer.E)
        with torch.no_grad():
            layer.E[kept:] = 0
    return prune_triplets(model)


def grown() -> nn.Module:
    torch.manual_seed(0)
    model = inject(qwen(), config(r=2, target_modules=["q_proj", "up_proj"]), GrowingLoRALinear)
    next(iter(adapter_layers(model).values())).grow(3, step=1)
    return randomize(model)


def gated() -> nn.Module:
    model = randomize(inject(qwen(), config(r=4, target_modules=["v_proj"]), GatedLoRALinear))
    for index, layer in enumerate(adapter_layers(model).values()):
        with torch.no_grad():
            layer.gate[: index + 1] = 0
    return prune_gates(model)


def nested() -> nn.Module:
    fields = {"r": 4, "target_modules": ["o_proj"]}
    return randomize(inject(qwen(), config(**fields), NestedLoRALinear, ranks=(1, 2, 4)))


def stages() -> nn.Module:
    """Three stages on targets that differ: summed ranks differ from module to module."""
    plan = [
        Stage(r, targets, 1e-3, 4) for r, targets in ((2, ["q_proj"]), (3, ["q_proj", "k_proj"]))
    ]
    model = inject_stages(qwen(), plan)
    for index, stage in enumerate(plan):
        begin_stage(model, stage, seed=index)
        for layer in adapter_layers(model).values():
            nn.init.normal_(layer.B, std=0.3) if layer.r else None
    return model


def mixed() -> nn.Module:
    fields = {
        "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0], "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"down_proj": 7}, "use_rslora": True,
    }  # fmt: skip
    return randomize(inject(qwen(), config(**fields)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "adalora": adalora, "grown": grown, "gated": gated, "nested": nested, "stages": stages, "mixed": mixed,
}  # fmt: skip


def error(folder: Path, model: nn.Module, server: str) -> float:
    """How far the served updates are from ours, relative to the largest of ours; 0 where a module has none."""
    served = SERVERS[server](folder, qwen())
    layers = adapter_layers(model)
    ours = {name: layer.delta_weight() for name, layer in layers.items()}
    assert all(name in served or not delta.any() for name, delta in ours.items())
    assert all(not update.any() for name, update in served.items() if name not in ours)
    size = max(delta.abs().max() for delta in ours.values())
    return max(float((served[n] - d).abs().max() / size) for n, d in ours.items() if n in served)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("variant", MODELS)
def test_a_uniform_export_is_read_right_by_every_server(
    tmp_path: Path, variant: str, server: str
) -> None:
    torch.manual_seed(0)
    model = MODELS[variant]()
    export_peft(model, tmp_path, uniform=True)
    assert error(tmp_path, model, server) < 1e-6
    assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"], int)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("variant", MODELS)
def test_peft_reads_both_forms(tmp_path: Path, variant: str, uniform: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[variant]().eval()
    export_peft(model, tmp_path, uniform=uniform)
    theirs = PeftModel.from_pretrained(qwen(), tmp_path).eval()
    torch.testing.assert_close(
        theirs(**batch()).logits, model(**batch()).logits, atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("server", ["vllm", "llama.cpp"])
def test_the_default_form_is_for_peft_and_wrong_where_ranks_or_scales_differ(
    tmp_path: Path, server: str
) -> None:
    torch.manual_seed(0)
    model = mixed()
    export_peft(model, tmp_path)
    assert error(tmp_path, model, server) > 0.1
