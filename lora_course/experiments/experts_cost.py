"""Of the study of chapter 2.1: what training steps of experts cost beside one LoRA and PEFT's X-LoRA."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import XLoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lora_course import experts, lab
from lora_course.experiments import config_of
from lora_course.experiments.timing import race
from lora_course.export import export_peft
from lora_course.injection import inject

SMOL_SHAPES: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def arms_of(name: str) -> dict[str, nn.Module]:
    """The four models; "smol" has random weights of SmolLM2-135M's shapes, as times don't depend on what they are."""
    base = lab.load_base("nano")[0] if name == "nano" else LlamaForCausalLM(LlamaConfig(**SMOL_SHAPES))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        adapter = export_peft(inject(copy.deepcopy(base), config_of(8)), folder)
        base.config.use_cache = False  # X-LoRA needs it off, and its adapters named by number
        adapters = {str(i): str(adapter) for i in range(8)}
        width, task = base.config.hidden_size, "CAUSAL_LM"
        settings = XLoraConfig(hidden_size=width, task_type=task, adapters=adapters)
        theirs = get_peft_model(copy.deepcopy(base), settings)
    ours = {}
    for count in (1, 8):
        layer: dict[str, Any] = {"layer": experts.ExpertsLinear, "num_experts": count}
        ours[count] = inject(copy.deepcopy(base), config_of(8), **layer)
    frozen = experts.freeze_experts(copy.deepcopy(ours[8]))
    return {"one": ours[1], "eight": ours[8], "eight, frozen": frozen, "X-LoRA, frozen": theirs}


def cost(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Training steps of four models taken in turn: seconds over those of one expert, by round, and operations of a step."""
    batch, length, rounds = settings["cost"][name]
    arms, ids = arms_of(name), torch.randint(4000, (batch, length))
    optimizers = {}
    for arm, model in arms.items():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers[arm] = torch.optim.AdamW(trained, lr=1e-4)

    def step(arm: str) -> None:
        arms[arm].train()(input_ids=ids, labels=ids).loss.backward()
        optimizers[arm].step()
        optimizers[arm].zero_grad()

    operations = {}
    for arm in arms:
        with FlopCounterMode(display=False) as counter:
            step(arm)
        operations[arm] = counter.get_total_flops()
    seconds = race({arm: partial(step, arm) for arm in arms}, rounds, time.perf_counter)
    ratios = {
        arm: [round(s / one, 4) for s, one in zip(seconds[arm], seconds["one"])] for arm in arms
    }
    return {"operations": operations, "ratios": ratios}
