"""The study of chapter 2.1: experts for four domains and a mixture of them, against one LoRA of as many parameters.

    python tools/studies/experts.py          about 15 minutes on two idle cores; goes on where it was stopped

All methods read the same rows of four domains, each once: an expert those of its own domain, one LoRA and a mixture trained
jointly all of them, shuffled; a router over trained experts then reads a quarter of them again. Every method gets every
learning rate of the grid; the rate is chosen by the first seed's bits a byte on validation text, mean over domains, and the
chosen one's runs are scored on the test text. Writes lora_course/data/studies/2_1_experts.json.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lora_course import experts, lab, lora
from lora_course.export import export_peft
from lora_course.injection import inject, trainable_parameters
from lora_course.lab import study
from lora_course.states import concatenate, factor_state, use_adapter

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model": "nano", "domains": ["bible", "shakespeare", "milton", "python"], "steps": 16, "router_steps": 16, "batch": 8,
    "length": 128, "train_bytes": 160_000, "score_bytes": 8_000, "r": 8, "seeds": [0, 1, 2],
    "learning_rates": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], "router_rates": [3e-2, 1e-1, 3e-1, 1.0],
    "balance": 0.01,
    "usage_rows": 16, "top_k": 2, "balances": [0.0, 0.1], "cost": {"nano": [8, 128, 7], "smol": [2, 128, 5]},
}  # fmt: skip
DOMAINS, STEPS = SETTINGS["domains"], SETTINGS["steps"]
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("experts.py", "lora.py", "training.py", "lab/study.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    *(ROOT / f"lora_course/data/text/{domain}.parquet" for domain in DOMAINS),
]


def rows(domain: str) -> datasets.Dataset:
    """The rows of one domain that its expert reads once."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(lab.load_text(domain, "train"), SETTINGS["train_bytes"], piece=8192)
    return lab.blocks(tokenizer, texts, SETTINGS["length"]).select(range(STEPS * SETTINGS["batch"]))


def mixed_rows() -> datasets.Dataset:
    """The rows of all domains."""
    return datasets.concatenate_datasets([rows(domain) for domain in DOMAINS]).with_format("torch")


def config(r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")


def fit(
    model: nn.Module,
    data: datasets.Dataset,
    rate: float,
    seed: int,
    steps: int,
    balance: float = 0.0,
) -> nn.Module:
    auxiliary = functools.partial(experts.balance_loss, weight=balance) if balance else None
    study.fit(
        model,
        data,
        rate,
        seed,
        steps,
        SETTINGS["batch"],
        auxiliary_loss=auxiliary,
        disable_tqdm=True,
    )
    return model


def train_experts(rate: float, seed: int) -> list[lora.AdapterState]:
    """One LoRA a domain, each trained on its own text."""
    states = []
    for domain in DOMAINS:
        model, _ = lab.load_base(SETTINGS["model"])
        torch.manual_seed(seed)
        inject(model, config(SETTINGS["r"]))
        states.append(factor_state(fit(model, rows(domain), rate, seed, STEPS)))
    return states


def train_lora(rate: float, seed: int) -> nn.Module:
    """One LoRA with as many parameters as all experts together, on all text."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    inject(model, config(SETTINGS["r"] * len(DOMAINS)))
    return fit(model, mixed_rows(), rate, seed, STEPS * len(DOMAINS))


def train_joint(
    rate: float, seed: int, balance: float = SETTINGS["balance"], **arguments: Any
) -> nn.Module:
    """Experts and routers together, on all text."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    inject(
        model, config(SETTINGS["r"]), experts.ExpertsLinear, num_experts=len(DOMAINS), **arguments
    )
    return fit(model, mixed_rows(), rate, seed, STEPS * len(DOMAINS), balance)


def train_router(states: list[lora.AdapterState], rate: float, seed: int) -> nn.Module:
    """Frozen experts, and routers trained on all text."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    experts.mix_experts(model, states)
    return fit(model, mixed_rows(), rate, seed, SETTINGS["router_steps"])


def score(model: nn.Module, split: str, domains: list[str] = DOMAINS) -> dict[str, float]:
    """Bits a byte on a sample of a split, by domain."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    size = SETTINGS["score_bytes"]
    return {
        d: lab.bits_per_byte(model, tokenizer, lab.load_text(d, split), max_bytes=size)
        for d in domains
    }


def score_state(
    state: lora.AdapterState, split: str, domains: list[str] = DOMAINS
) -> dict[str, float]:
    """`score` of the base with a plain adapter."""
    model, _ = lab.load_base(SETTINGS["model"])
    inject(model, config(SETTINGS["r"]))
    return score(use_adapter(model, state), split, domains)


@torch.no_grad()
def usage(model: nn.Module) -> dict[str, Any]:
    """On test text: the mean gates, `[domain][block][expert]`, and the balance loss over all domains together."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    rows, length = SETTINGS["usage_rows"], SETTINGS["length"]
    texts = [lab.excerpt(lab.load_text(domain, "test"), 10_000) for domain in DOMAINS]
    data = [lab.blocks(tokenizer, text, length)[:rows]["input_ids"] for text in texts]
    with lab.evaluating(model):
        model(input_ids=torch.cat(data), use_cache=False)
    gates = [
        block.view(len(DOMAINS), rows, length, -1).mean((1, 2))
        for block in experts.latest_gates(model).values()
    ]
    return {"gates": torch.stack(gates, 1).tolist(), "balance": experts.balance_loss(model).item()}


def cost(name: str) -> dict[str, Any]:
    """Training steps of four models taken in turn: seconds over those of one expert, by round, and operations of a step."""
    batch, length, rounds = SETTINGS["cost"][name]
    if name == "nano":
        base, _ = lab.load_base("nano")
    else:  # random weights of SmolLM2-135M's shapes
        base = LlamaForCausalLM(LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            vocab_size=49152, tie_word_embeddings=True,
        ))  # fmt: skip
    ids = torch.randint(4000, (batch, length))
    with tempfile.TemporaryDirectory() as folder:
        adapter = export_peft(inject(copy.deepcopy(base), config(8)), folder)
        base.config.use_cache = False  # X-LoRA needs it off, and its adapters named by number
        adapters = {str(i): str(adapter) for i in range(8)}
        settings = XLoraConfig(
            hidden_size=base.config.hidden_size, task_type="CAUSAL_LM", adapters=adapters
        )
        theirs = get_peft_model(copy.deepcopy(base), settings)
    ours = {
        n: inject(copy.deepcopy(base), config(8), experts.ExpertsLinear, num_experts=n)
        for n in (1, 8)
    }
    frozen = experts.freeze_experts(copy.deepcopy(ours[8]))
    arms = {"one": ours[1], "eight": ours[8], "eight, frozen": frozen, "X-LoRA, frozen": theirs}
    trained = {
        arm: [p for p in model.parameters() if p.requires_grad] for arm, model in arms.items()
    }
    optimizers = {
        arm: torch.optim.AdamW(parameters, lr=1e-4) for arm, parameters in trained.items()
    }

    def step(arm: str) -> float:
        begin = time.perf_counter()
        arms[arm].train()(input_ids=ids, labels=ids).loss.backward()
        optimizers[arm].step()
        optimizers[arm].zero_grad()
        return time.perf_counter() - begin

    operations = {}
    for arm in arms:
        with FlopCounterMode(display=False) as counter:
            step(arm)
        operations[arm] = counter.get_total_flops()
    seconds = [{arm: step(arm) for arm in arms} for _ in range(rounds)]
    return {
        "operations": operations,
        "ratios": {arm: [round(s[arm] / s["one"], 4) for s in seconds] for arm in arms},
    }


def main() -> None:
    results = study.Study(study.STUDIES / "2_1_experts.json", SOURCES, SETTINGS)
    start = time.perf_counter()
    first = SETTINGS["seeds"][0]

    def run(key: str, function: Any) -> dict[str, Any]:
        result = results.run(key, function)
        print(
            f"{(time.perf_counter() - start) / 60:5.1f} min  {key}  {result.get('mean', '')}",
            flush=True,
        )
        return result

    def scored(by_domain: dict[str, float], **more: Any) -> dict[str, Any]:
        return {"mean": statistics.fmean(by_domain.values()), "bits_per_byte": by_domain} | more

    def oracle(states: list[lora.AdapterState], split: str) -> dict[str, float]:
        return {
            d: score_state(state, split, [d])[d] for state, d in zip(states, DOMAINS, strict=True)
        }

    def best(method: str, rates: list[float]) -> float:
        return min(
            rates,
            key=lambda rate: results.record["runs"][f"{method}/{rate:g}/{first}/validation"][
                "mean"
            ],
        )

    rates, router_rates = SETTINGS["learning_rates"], SETTINGS["router_rates"]
    for split in ("validation", "test"):
        run(f"base/{split}", lambda s=split: scored(score(lab.load_base(SETTINGS["model"])[0], s)))
    for rate in rates:
        key = f"experts/{rate:g}/{first}/validation"
        run(key, lambda r=rate: scored(oracle(train_experts(r, first), "validation")))
    expert_rate = best("experts", rates)
    cached: dict[int, list[lora.AdapterState]] = {}

    def trained(seed: int) -> list[lora.AdapterState]:
        if seed not in cached:
            cached[seed] = train_experts(expert_rate, seed)
        return cached[seed]

    for rate in router_rates:
        key = f"router/{rate:g}/{first}/validation"
        run(key, lambda r=rate: scored(score(train_router(trained(first), r, first), "validation")))
    router_rate = best("router", router_rates)

    def separate(seed: int) -> dict[str, Any]:
        states = trained(seed)
        mixture = train_router(states, router_rate, seed)
        each = [score_state(state, "test") for state in states]
        average = concatenate(states, [1 / len(states)] * len(states))
        return scored(
            score(mixture, "test"), each=each, average=score_state(average, "test"), usage=usage(mixture),
            router_parameters=trainable_parameters(mixture),
        )  # fmt: skip

    for seed in SETTINGS["seeds"]:
        run(f"separate/{seed}/test", lambda s=seed: separate(s))
    for method, train in (("lora", train_lora), ("joint", train_joint)):
        for rate in rates:
            key = f"{method}/{rate:g}/{first}/validation"
            run(key, lambda t=train, r=rate: scored(score(t(r, first), "validation")))
        rate = best(method, rates)
        for seed in SETTINGS["seeds"]:

            def final(
                t: Any = train, r: float = rate, s: int = seed, m: str = method
            ) -> dict[str, Any]:
                model = t(r, s)
                more = {"usage": usage(model)} if m == "joint" else {}
                return scored(
                    score(model, "test"),
                    parameters=trainable_parameters(model),
                    rate=r,
                    **more,
                )

            run(f"{method}/{rate:g}/{seed}/test", final)
    for name in SETTINGS["cost"]:
        run(f"cost/{name}", lambda n=name: cost(n))
    joint_rate = best("joint", rates)
    for seed in SETTINGS["seeds"]:
        for balance in SETTINGS["balances"]:

            def collapse(b: float = balance, s: int = seed) -> dict[str, Any]:
                model = train_joint(joint_rate, s, b, top_k=SETTINGS["top_k"])
                return scored(score(model, "test"), usage=usage(model))

            run(f"top_k/{balance:g}/{seed}/test", collapse)
    print(
        "finite:",
        all(math.isfinite(run.get("mean", 0.0)) for run in results.record["runs"].values()),
    )


if __name__ == "__main__":
    main()
