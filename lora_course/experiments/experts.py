"""The study of chapter 2.1: experts for four domains and a mixture of them, against one LoRA of as many parameters.

All methods read the same rows of four domains, each once: an expert those of its own domain, one LoRA and a mixture trained
jointly all of them, shuffled; a router over trained experts then reads a quarter of them again. The rate is chosen by the bits
a byte on validation text, mean over domains.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Mapping
from typing import Any

import datasets
import torch
from torch import nn

from lora_course import experts, lab
from lora_course.experiments import Runs, Study, Witness
from lora_course.experiments.arms import (
    Arm,
    adapted,
    base_of,
    bits_by_domain,
    config_of,
    rows_of,
    tokenizer_of,
    train,
)
from lora_course.experiments.experts_cost import cost
from lora_course.experiments.rates import Kept, choose, compete
from lora_course.injection import trainable_parameters
from lora_course.lora import AdapterState
from lora_course.states import concatenate, factor_state

SETTINGS: dict[str, Any] = {
    "model": "nano", "domains": ["bible", "shakespeare", "milton", "python"], "steps": 16, "router_steps": 16, "batch": 8,
    "length": 128, "train_bytes": 160_000, "score_bytes": 8_000, "r": 8, "seeds": [0, 1, 2, 3, 4], "search_seeds": [0],
    "learning_rates": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], "router_rates": [3e-2, 1e-1, 3e-1, 1.0],
    "balance": 0.01, "arm_steps": {"experts": 64, "lora": 64, "joint": 64, "top_k": 64},
    "usage_rows": 16, "top_k": 2, "balances": [0.0, 0.1], "cost": {"nano": [8, 128, 7], "smol": [2, 128, 5]},
}  # fmt: skip
DOMAINS, STEPS, R = SETTINGS["domains"], SETTINGS["steps"], SETTINGS["r"]


def rows(domain: str) -> datasets.Dataset:
    """The rows of one domain that its expert reads once."""
    return rows_of(SETTINGS, domain).select(range(STEPS * SETTINGS["batch"]))


def mixed_rows() -> datasets.Dataset:
    """The rows of all domains."""
    return datasets.concatenate_datasets([rows(domain) for domain in DOMAINS]).with_format("torch")


def fit(
    model: nn.Module, rows: datasets.Dataset, rate: float, seed: int, steps: int, balance: float = 0
) -> nn.Module:
    auxiliary = functools.partial(experts.balance_loss, weight=balance) if balance else None
    arm = Arm(model, auxiliary_loss=auxiliary)
    return train(arm, rows, rate, seed, steps, SETTINGS["batch"]).model


def train_experts(rate: float, seed: int) -> list[AdapterState]:
    """One LoRA a domain, each trained on its own text."""
    states = []
    for domain in DOMAINS:
        model = adapted(SETTINGS, seed, config_of(R))
        states.append(factor_state(fit(model, rows(domain), rate, seed, STEPS)))
    return states


def train_lora(rate: float, seed: int) -> nn.Module:
    """One LoRA with as many parameters as all experts together, on all text."""
    model = adapted(SETTINGS, seed, config_of(R * len(DOMAINS)))
    return fit(model, mixed_rows(), rate, seed, STEPS * len(DOMAINS))


def train_joint(
    rate: float, seed: int, balance: float = SETTINGS["balance"], **arguments: Any
) -> nn.Module:
    """Experts and routers together, on all text."""
    layer = {"layer": experts.ExpertsLinear, "num_experts": len(DOMAINS)}
    model = adapted(SETTINGS, seed, config_of(R), **layer, **arguments)
    return fit(model, mixed_rows(), rate, seed, STEPS * len(DOMAINS), balance)


def train_router(states: list[AdapterState], rate: float, seed: int) -> nn.Module:
    """Frozen experts, and routers trained on all text."""
    model = base_of(SETTINGS)
    torch.manual_seed(seed)
    experts.mix_experts(model, states)
    return fit(model, mixed_rows(), rate, seed, SETTINGS["router_steps"])


score = functools.partial(bits_by_domain, SETTINGS)


def mean(run: Mapping[str, Any]) -> float:
    return run["mean"]


def result(by_domain: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"mean": statistics.fmean(by_domain.values()), "bits_per_byte": by_domain} | more


@torch.no_grad()
def usage(model: nn.Module) -> dict[str, Any]:
    """On test text: the mean gates, `[domain][block][expert]`, and the balance loss over all domains together."""
    count, length, tokenizer = SETTINGS["usage_rows"], SETTINGS["length"], tokenizer_of("nano")
    texts = [lab.excerpt(lab.load_text(domain, "test"), 10_000) for domain in DOMAINS]
    data = [lab.blocks(tokenizer, text, length)[:count]["input_ids"] for text in texts]
    with lab.evaluating(model):
        model(input_ids=torch.cat(data), use_cache=False)
    shape = (len(DOMAINS), count, length, -1)
    gates = [block.view(shape).mean((1, 2)) for block in experts.latest_gates(model).values()]
    return {"gates": torch.stack(gates, 1).tolist(), "balance": experts.balance_loss(model).item()}


def own_experts(rate: float, seed: int, split: str) -> dict[str, Any]:
    """Each domain with its own expert."""
    states = zip(DOMAINS, train_experts(rate, seed), strict=True)
    return result({domain: score(state, split, [domain])[domain] for domain, state in states})


def separate(states: list[AdapterState], router_rate: float, seed: int) -> dict[str, Any]:
    """The mixture of trained experts, each of them alone, and their average."""
    mixture = train_router(states, router_rate, seed)
    average = concatenate(states, [1 / len(states)] * len(states))
    each, counted = [score(state, "test") for state in states], trainable_parameters(mixture)
    more = {"each": each, "average": score(average, "test"), "usage": usage(mixture)}
    return result(score(mixture, "test"), **more, router_parameters=counted)


def whole(method: str, found: tuple[nn.Module, float], split: str) -> dict[str, Any]:
    """One model for all domains and its rate: a large LoRA, or experts and routers trained together."""
    model, rate = found
    values = result(score(model, split))
    if split == "test":
        values |= {"parameters": trainable_parameters(model), "rate": rate}
        values |= {"usage": usage(model)} if method == "joint" else {}
    return values


def top_k(rate: float, seed: int, balance: float) -> dict[str, Any]:
    model = train_joint(rate, seed, balance, top_k=SETTINGS["top_k"])
    return result(score(model, "test"), usage=usage(model))


def body(runs: Runs) -> None:
    rates, router_rates = SETTINGS["learning_rates"], SETTINGS["router_rates"]
    seeds = SETTINGS["search_seeds"]
    runs.expect(2 + 3 * len(rates) + len(router_rates) + 2 + 5 * len(runs.seeds))
    for split in ("validation", "test"):
        runs(f"base/{split}", lambda s: result(score(base_of(SETTINGS), s)), split)

    expert_rate = choose(runs, "experts", own_experts, rates, seeds, mean)
    trained = Kept(train_experts)

    def routed(rate: float, seed: int, split: str) -> dict[str, Any]:
        return result(score(train_router(trained(expert_rate, seed), rate, seed), split))

    router_rate = choose(runs, "router", routed, router_rates, seeds, mean)
    for seed in runs.seeds:
        key = f"separate/{seed}/test"
        runs(key, lambda s: separate(trained(expert_rate, s), router_rate, s), seed)
    best = {}
    for method, make in (("lora", train_lora), ("joint", train_joint)):
        scored, kept = functools.partial(whole, method), Kept(lambda r, s, m=make: (m(r, s), r))
        best[method] = compete(runs, method, kept, scored, rates, seeds, value=mean)
    for name in SETTINGS["cost"]:
        runs(f"cost/{name}", cost, SETTINGS, name)
    for balance, seed in itertools.product(SETTINGS["balances"], runs.seeds):
        runs(f"top_k/{balance:g}/{seed}/test", top_k, best["joint"], seed, balance)


TOLERANCES = {"bits_per_byte": 0.005, "parameters": 0}
WITNESS = Witness(("joint/0.008/0/test",), TOLERANCES, chapter="2_1_experts")
STUDY = Study("2_1_experts", SETTINGS, body, WITNESS)
