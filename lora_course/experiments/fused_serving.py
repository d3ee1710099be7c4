"""Of the study of chapter 4.4: processor seconds of forward passes and of generation, merged, unmerged and of many adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from lora_course.experiments.arms import base_of, in_peft
from lora_course.experiments.fused_costs import config, injected, tokens
from lora_course.experiments.timing import race
from lora_course.injection import merge, unload
from lora_course.lora import AdapterState
from lora_course.serving import load_adapters, row_adapters
from lora_course.states import factor_state, use_adapter

SETTINGS: dict[str, Any] = {
    "model": "nano", "latency_ranks": [4, 16, 64, 256], "tokens": [1, 4, 16, 64, 256], "latency_rounds": 31,
    "served": {"rows": 32, "r": 8, "adapters": [1, 2, 4, 8, 16, 32], "rounds": 21},
    "generate": {"rows": 16, "adapters": 4, "r": 8, "prompt": 16, "new": 24, "rounds": 7},
}  # fmt: skip


@torch.no_grad()
def latency(count: int) -> dict[str, list[float]]:
    """One forward pass of `count` rows of one token: the base, merged adapters, unmerged ones of several ranks."""
    ids = tokens(count, 1)
    models = {"base": base_of(SETTINGS)}
    models["merged"] = unload(merge(injected("plain", 16)))
    models |= {f"r = {r}": injected("plain", r) for r in SETTINGS["latency_ranks"]}
    arms = {}
    for name, model in models.items():
        arms[name] = functools.partial(model.eval(), input_ids=ids, use_cache=False)
    return race(arms, SETTINGS["latency_rounds"])


def fleet(count: int, r: int) -> tuple[dict[str, AdapterState], Any, Any, Any]:
    """States of so many adapters; all of them on one base, ours and PEFT's; and a model that takes one at a time."""
    states = {f"adapter {i}": factor_state(injected("plain", r, seed=i)) for i in range(count)}
    ours = load_adapters(base_of(SETTINGS), states).eval()
    one = injected("plain", r).eval()
    return states, ours, one, in_peft(SETTINGS, states, config(r)).eval()


@torch.no_grad()
def served(count: int) -> dict[str, list[float]]:
    """One forward pass of rows of one token that use `count` adapters: as one batch (with the copying), by groups, and in PEFT."""
    s = SETTINGS["served"]
    states, ours, one, theirs = fleet(count, s["r"])
    base = base_of(SETTINGS)
    ids, names = tokens(s["rows"], 1), [f"adapter {i % count}" for i in range(s["rows"])]

    def by_groups() -> None:
        for name, state in states.items():
            use_adapter(one, state)
            one(input_ids=ids[[i for i, n in enumerate(names) if n == name]], use_cache=False)

    def batched() -> None:
        with row_adapters(ours, names):
            ours(input_ids=ids, use_cache=False)

    arms = {
        "base": lambda: base(input_ids=ids, use_cache=False),
        "batched": batched,
        "by groups": by_groups,
        "peft": lambda: theirs(input_ids=ids, adapter_names=names, use_cache=False),
    }
    return race(arms, s["rounds"])


@torch.no_grad()
def generated() -> dict[str, list[float]]:
    """Cached, greedy generation of rows that use several adapters; and that all wrote the same."""
    s = SETTINGS["generate"]
    states, ours, one, theirs = fleet(s["adapters"], s["r"])
    base = base_of(SETTINGS)
    ids = tokens(s["rows"], s["prompt"])
    names = [f"adapter {i % s['adapters']}" for i in range(s["rows"])]
    how = {"max_new_tokens": s["new"], "min_new_tokens": s["new"]}
    how |= {"do_sample": False, "pad_token_id": 0}

    def batched() -> torch.Tensor:
        with row_adapters(ours, names):
            return ours.generate(ids, **how)

    def by_groups() -> torch.Tensor:
        written = torch.empty(len(ids), s["prompt"] + s["new"], dtype=ids.dtype)
        for name, state in states.items():
            own = [i for i, n in enumerate(names) if n == name]
            use_adapter(one, state)
            written[own] = one.generate(ids[own], **how)
        return written

    def peft() -> torch.Tensor:
        return theirs.generate(input_ids=ids, adapter_names=names, **how)

    same = [float((batched() == other()).all(1).float().mean()) for other in (by_groups, peft)]
    arms: dict[str, Callable[[], Any]] = {"base": lambda: base.generate(ids, **how)}
    arms |= {"batched": batched, "by groups": by_groups, "peft": peft}
    return race(arms, s["rounds"]) | {"rows written alike": same}
