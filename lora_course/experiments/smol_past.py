"""The claims that chapters turn on, on a chat model of 135M parameters: one adapter learns the past of English verbs.

Every method has the size of LoRA of rank 8 on all linear layers, its scale, the same rows in the same order, and its own search
for the rate on validation words, by bits an answer token. Those that choose ranks ("adalora", "gates", "adaptive") end near that sum
of ranks, so their parameters depend on the places ("adaptive" ends with fewer); "dora" has its magnitudes on top; "lora-2" is
smaller. The chosen rate gets every seed, and its models write the past of test verbs, greedily. "lora" is also cut by SVD and rounded after training: what "nested" and "factors" are held against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from lora_course.experiments import Kept, Runs, Study, Trained, Witness, compete, methods
from lora_course.experiments.arms import Arm, adapted, base_of, config_of, train
from lora_course.experiments.beginning import first_losses
from lora_course.experiments.methods import Settings
from lora_course.experiments.peft_methods import from_loras_start
from lora_course.experiments.task_scores import (
    answer_bits,
    own_text_bits,
    task_rows_of,
    task_score,
)
from lora_course.hierarchical import cut
from lora_course.qlora import quantize_model
from lora_course.quantized import quantize_after_training
from lora_course.states import factor_state, truncate, use_adapter

SETTINGS: dict[str, Any] = {
    "model": "smol", "task": "past", "steps": 40, "batch": 12, "length": 32, "r": 8, "scaling": 2.0,
    "words": {"validation": 160, "test": 400}, "new_tokens": 12, "own_text": "glosses", "own_bytes": 6_000,
    "seeds": [0, 1, 2], "search_seeds": [0], "first": [1e-3, 2e-3, 4e-3], "first_of": {"adalora": [2e-3, 4e-3, 8e-3]},
    "gate_threshold": 0.43, "cuts": [1, 2, 4, 8], "bits": [4, 2],
}  # fmt: skip
METHODS: dict[str, Callable[[Settings, int], Arm]] = {
    "lora": methods.lora,
    "qlora": methods.qlora,
    "adalora": methods.adalora,
    "lora-2": functools.partial(methods.lora, r=2),
    "nested": functools.partial(methods.nested, ranks=SETTINGS["cuts"]),
    "factors-2bit": functools.partial(methods.quantized, bits=2),
    "gates": methods.gates,
    "adaptive": methods.adaptive,
    "progressive": methods.in_stages,
    "delta": methods.delta,
    "dora": functools.partial(from_loras_start, use_dora=True),
}


def trained(arm: str, rate: float, seed: int) -> Trained:
    rows = task_rows_of(SETTINGS, SETTINGS["task"], seed)
    return train(
        METHODS[arm](SETTINGS, seed), rows, rate, seed, SETTINGS["steps"], SETTINGS["batch"],
        train_sampling_strategy="sequential",
    )  # fmt: skip


def score(arm: str, found: Trained, split: str) -> dict[str, Any]:
    """What a record keeps of a training: of the chosen rate's all, of the searched ones' the bits."""
    bits = functools.partial(answer_bits, SETTINGS, SETTINGS["task"])
    if split == "validation":
        return {"bits_per_token": bits(found.model, split)}
    result = task_score(SETTINGS, SETTINGS["task"], found.model)
    result |= {"own_text": own_text_bits(SETTINGS, found.model), "seconds": found.seconds}
    result |= {"parameters": found.arm.parameters(found.model), "losses": found.curve}
    result |= found.seen
    if arm == "lora":
        whole = factor_state(found.model)
        states = {b: truncate(whole, b) for b in SETTINGS["cuts"]}
        result["cut"] = {b: bits(use_adapter(plain(), state), split) for b, state in states.items()}
        result["rounded"] = {}
        for width in SETTINGS["bits"]:
            rounded = quantize_after_training(use_adapter(plain(), whole), bits=width)
            result["rounded"][width] = bits(rounded, split)
            plain.cache_clear()
    if arm == "nested":
        states = {b: cut(found.model, b) for b in SETTINGS["cuts"]}
        result["cut"] = {b: bits(use_adapter(plain(), state), split) for b, state in states.items()}
    return result


@functools.cache
def plain() -> torch.nn.Module:
    """The base with plain LoRA, to put a state into."""
    return adapted(SETTINGS, 0, config_of(1))


def base_score(quantize: bool) -> dict[str, Any]:
    """The untouched base, or the base in NF4."""
    model = base_of(SETTINGS)
    if quantize:
        quantize_model(model)
    result = task_score(SETTINGS, SETTINGS["task"], model)
    return result | {"own_text": own_text_bits(SETTINGS, model)}


def body(runs: Runs) -> None:
    arms = runs.arms(list(METHODS))
    runs.expect(2 + len(arms) * (len(SETTINGS["first"]) + len(runs.seeds)))
    for name, quantize in (("base", False), ("base-nf4", True)):
        runs(f"{name}/test", functools.partial(base_score, quantize))
    for arm in arms:
        compete(
            runs, arm, Kept(functools.partial(trained, arm)), functools.partial(score, arm),
            SETTINGS["first_of"].get(arm, SETTINGS["first"]), SETTINGS["search_seeds"],
            value=lambda run: run["bits_per_token"],
        )  # fmt: skip


def beginning() -> dict[str, Any]:
    rows = task_rows_of(SETTINGS, SETTINGS["task"], 0)
    arm = METHODS["lora"](SETTINGS, 0)
    return {"losses": first_losses(arm, rows, 2e-3, 0, SETTINGS["steps"], SETTINGS["batch"])}


WITNESS = Witness(
    ("lora/0.002/0/test",),
    {"losses": 0.1},
    "Without instructions for bf16 the losses came out up to 0.06 apart; over these steps they fall by more than one",
    part=beginning,
)
STUDY = Study(
    "smol_past",
    SETTINGS,
    body,
    WITNESS,
)
