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
from lora_course.experiments import Kept, Runs, Study, Witness, base_of, domains, tokenizer_of
from lora_course.experiments.arms import Arm, adapted, bits_by_domain, config_of, rows_of, train
from lora_course.experiments.experts_cost import cost
from lora_course.experiments.rates import choose, compete_all
from lora_course.injection import trainable_parameters
from lora_course.lora import AdapterState
from lora_course.states import concatenate

SETTINGS: dict[str, Any] = {
    "model": "nano", "domains": ["bible", "shakespeare", "milton", "python"], "steps": 16, "router_steps": 16, "batch": 8,
    "length": 128, "train_bytes": 160_000, "score_bytes": 8_000, "r": 8, "seeds": [0, 1, 2, 3, 4], "search_seeds": [0],
    "learning_rates": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], "router_rates": [3e-2, 1e-1, 3e-1, 1.0],
    "balance": 0.01, "arm_steps": {"experts": 64, "lora": 64, "joint": 64, "top_k": 64},
    "usage_rows": 16, "top_k": 2, "balances": [0.0, 0.1], "cost": {"nano": [8, 128, 7], "smol": [2, 128, 5]},
}  # fmt: skip
DOMAINS, STEPS, R = SETTINGS["domains"], SETTINGS["steps"], SETTINGS["r"]

score = functools.partial(bits_by_domain, SETTINGS)


def rows(domain: str) -> datasets.Dataset:
    """The rows of one domain that its expert reads once."""
    return rows_of(SETTINGS, domain).select(range(STEPS * SETTINGS["batch"]))


def mixed_rows() -> datasets.Dataset:
    """The rows of all domains."""
    return domains.mixed_rows(SETTINGS, DOMAINS, STEPS * len(DOMAINS), rows)


def train_experts(rate: float, seed: int) -> dict[str, AdapterState]:
    """One LoRA a domain, each trained on its own text."""
    return domains.one_each(SETTINGS, DOMAINS, R, rate, seed, STEPS, rows)


def train_router(states: Mapping[str, AdapterState], rate: float, seed: int) -> nn.Module:
    """Frozen experts, and routers trained on all text."""
    each, steps = list(states.values()), SETTINGS["router_steps"]
    return domains.routed(SETTINGS, each, mixed_rows(), rate, seed, steps)


def train_whole(
    method: str, rate: float, seed: int, balance: float = SETTINGS["balance"], **layer: Any
) -> nn.Module:
    """One model on all text: experts and routers together ("joint"), or one LoRA with as many parameters as all experts."""
    if method == "joint":
        how = {"layer": experts.ExpertsLinear, "num_experts": len(DOMAINS)} | layer
        arm = Arm(adapted(SETTINGS, seed, config_of(R), **how))
        if balance:
            arm.auxiliary_loss = functools.partial(experts.balance_loss, weight=balance)
    else:
        arm = Arm(adapted(SETTINGS, seed, config_of(R * len(DOMAINS))))
    return train(arm, mixed_rows(), rate, seed, STEPS * len(DOMAINS), SETTINGS["batch"]).model


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
    return result(domains.own_bits(SETTINGS, train_experts(rate, seed), split))


def separate(trained: Mapping[str, AdapterState], rate: float, seed: int) -> dict[str, Any]:
    """The mixture of trained experts, each of them alone, and their average."""
    mixture, states = train_router(trained, rate, seed), list(trained.values())
    average = concatenate(states, [1 / len(states)] * len(states))
    each, counted = [score(state, "test") for state in states], trainable_parameters(mixture)
    more = {"each": each, "average": score(average, "test"), "usage": usage(mixture)}
    return result(score(mixture, "test"), **more, router_parameters=counted)


def whole(method: str, rate: float, seed: int) -> tuple[str, float, nn.Module]:
    return method, rate, train_whole(method, rate, seed)


def score_whole(found: tuple[str, float, nn.Module], split: str) -> dict[str, Any]:
    method, rate, model = found
    values = result(score(model, split))
    if split == "test":
        values |= {"parameters": trainable_parameters(model), "rate": rate}
        values |= {"usage": usage(model)} if method == "joint" else {}
    return values


def top_k(rate: float, seed: int, balance: float) -> dict[str, Any]:
    model = train_whole("joint", rate, seed, balance, top_k=SETTINGS["top_k"])
    return result(score(model, "test"), usage=usage(model))


def body(runs: Runs) -> None:
    rates, router_rates = SETTINGS["learning_rates"], SETTINGS["router_rates"]
    seeds = SETTINGS["search_seeds"]
    runs.expect(2 + len(rates) + len(router_rates) + 2 + 3 * len(runs.seeds))
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
    best = compete_all(runs, SETTINGS, ("lora", "joint"), whole, score_whole, value=mean)
    for name in SETTINGS["cost"]:
        runs(f"cost/{name}", cost, SETTINGS, name)
    for balance, seed in itertools.product(SETTINGS["balances"], runs.seeds):
        runs(f"top_k/{balance:g}/{seed}/test", top_k, best["joint"], seed, balance)


TOLERANCES = {"bits_per_byte": 0.005, "parameters": 0}
WITNESS = Witness(("joint/0.008/0/test",), TOLERANCES, chapter="2_1_experts")
STUDY = Study("2_1_experts", SETTINGS, body, WITNESS)
