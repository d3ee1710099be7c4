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


def ways(
    count: int, r: int, ids: torch.Tensor, call: Callable[..., Any]
) -> dict[str, Callable[[], Any]]:
    """So many adapters on rows that use them in turn: the base alone; as one batch, with the copying; by groups of rows, whose
    outputs come in a list; and in PEFT. call: (model, ids, **fields that PEFT wants) → what is written."""
    states = {f"adapter {i}": factor_state(injected("plain", r, seed=i)) for i in range(count)}
    base, ours = base_of(SETTINGS), load_adapters(base_of(SETTINGS), states).eval()
    one, theirs = injected("plain", r).eval(), in_peft(SETTINGS, states, config(r)).eval()
    names = [f"adapter {i % count}" for i in range(len(ids))]

    def batched() -> Any:
        with row_adapters(ours, names):
            return call(ours, ids)

    def by_groups() -> list[Any]:
        return [
            call(use_adapter(one, states[name]), ids[i::count]) for i, name in enumerate(states)
        ]

    return {
        "base": lambda: call(base, ids),
        "batched": batched,
        "by groups": by_groups,
        "peft": lambda: call(theirs, ids, adapter_names=names),
    }


@torch.no_grad()
def served(count: int) -> dict[str, list[float]]:
    """One forward pass of rows of one token that use `count` adapters."""
    s = SETTINGS["served"]
    call = lambda model, ids, **how: model(input_ids=ids, use_cache=False, **how)  # noqa: E731
    return race(ways(count, s["r"], tokens(s["rows"], 1), call), s["rounds"])


@torch.no_grad()
def generated() -> dict[str, list[float]]:
    """Cached, greedy generation of rows that use several adapters; and that all wrote the same."""
    s = SETTINGS["generate"]
    how = {"max_new_tokens": s["new"], "min_new_tokens": s["new"]}
    how |= {"do_sample": False, "pad_token_id": 0}

    def call(model: Any, ids: torch.Tensor, **fields: Any) -> torch.Tensor:
        return model.generate(input_ids=ids, **fields, **how)

    arms = ways(s["adapters"], s["r"], tokens(s["rows"], s["prompt"]), call)
    written, groups = arms["batched"](), torch.stack(arms["by groups"](), 1).flatten(0, 1)
    same = [(written == other).all(1).float().mean().item() for other in (groups, arms["peft"]())]
    return race(arms, s["rounds"]) | {"rows written alike": same}
