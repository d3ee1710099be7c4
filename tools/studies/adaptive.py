"""The study of chapter 3.1: ranks that grow during training against uniform ones, against the grown ones from the start, and
against pruning from above, all with the same number of parameters in the end; which layers grow on which text; and what four
ways to grow do to the loss at that step.

    python tools/studies/adaptive.py           about 25 minutes of one thread; goes on where it was stopped

All arms see the same batches at the same scale, with the same learning-rate grid. The grown arm goes first: the other three
get, seed by seed, as many parameters as it ended with. The rate is chosen by the mean bits a byte on validation text, and only
the chosen one's runs are scored on the test text. Writes lora_course/data/studies/3_1_adaptive.json.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_course import lab, lora
from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower, rank_history
from lora_course.injection import adapter_layers, inject
from lora_course.lab import study

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model": "nano", "domain": "shakespeare", "domains": ["shakespeare", "bible", "milton", "python"], "steps": 60, "batch": 8,
    "length": 128, "train_bytes": 1_000_000, "score_bytes": {"validation": 20_000, "test": 40_000}, "seeds": [0, 1, 2],
    "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "scaling": 2.0, "r": 2, "high_r": 16,
    "growth": {"budget": 224, "start": 12, "every": 3, "top": 7, "add": 2, "max_r": 16},  # on average 8 a layer, after step 45
    "moment": {"learning_rate": 8e-3, "before": 15, "after": 12, "add": 6},
}  # fmt: skip
ARMS = ["grown", "uniform", "final", "pruned"]
WAYS = ["none", "preserved", "scale not held", "both zero", "moments thrown away"]
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("adaptive.py", "lora.py", "training.py", "lab/study.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    *(ROOT / f"lora_course/data/text/{domain}.parquet" for domain in SETTINGS["domains"]),
]


class Pruner(TrainerCallback):
    """Growth in the mirror: the same score, part by part, and at the same steps the lowest parts of all layers go for good.

    A part is a row of `A` with its column of `B`, which is set to zero and held there. What is too much for `parameters` goes
    in equal shares.
    """

    def __init__(self, model: nn.Module, steps: list[int], parameters: int, beta: float) -> None:
        self.layers, self.beta = adapter_layers(model), beta
        self.kept = {
            name: torch.ones(layer.r, dtype=torch.bool) for name, layer in self.layers.items()
        }
        self.mean = {name: torch.zeros(layer.r) for name, layer in self.layers.items()}
        self.deviation = {name: torch.zeros(layer.r) for name, layer in self.layers.items()}
        most = self.parameters
        self.targets = {
            step: most + (parameters - most) * (i + 1) / len(steps) for i, step in enumerate(steps)
        }

    @property
    def parameters(self) -> int:
        return sum(int(self.kept[name].sum()) * cost(layer) for name, layer in self.layers.items())

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, layer in self.layers.items():
            part = (layer.B * layer.B.grad).sum(0).abs() / math.sqrt(
                layer.in_features * layer.out_features
            )
            self.mean[name].lerp_(part, 1 - self.beta)
            self.deviation[name].lerp_((part - self.mean[name]).abs(), 1 - self.beta)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.targets:
            scores = {n: self.mean[n] * self.deviation[n] for n in self.layers}
            parts = [
                (score.item(), n, i)
                for n in self.layers
                for i, score in enumerate(scores[n])
                if self.kept[n][i]
            ]
            excess = self.parameters - self.targets[state.global_step]
            for _, name, i in sorted(parts):
                if excess <= 0:
                    break
                self.kept[name][i] = False
                excess -= cost(self.layers[name])
        for (
            name,
            layer,
        ) in self.layers.items():  # at every step: Adam goes on moving what has moments
            layer.B[:, ~self.kept[name]] = 0


def cost(layer: lora.LoRALinear) -> int:
    """Parameters of one rank."""
    return layer.in_features + layer.out_features


def uniform_ranks(costs: dict[str, int], parameters: int) -> dict[str, int]:
    """As equal ranks as there are for so many parameters: one value, and one more for some layers, spread over the model."""
    r, left = divmod(parameters, sum(costs.values()))
    ranks = dict.fromkeys(costs, r)
    names = list(costs)
    for name in (
        names[i * 11 % len(names)] for i in range(len(names))
    ):  # 11 and nano's 28 layers have no common divisor
        if costs[name] <= left:
            ranks[name], left = r + 1, left - costs[name]
    return ranks


def rows(domain: str) -> datasets.Dataset:
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(lab.load_text(domain, "train"), SETTINGS["train_bytes"], piece=8192)
    return lab.blocks(tokenizer, texts, SETTINGS["length"])


def adapted(layer: type[lora.LoRALinear], ranks: int | dict[str, int], seed: int) -> nn.Module:
    """nano with an adapter of the study's scale; ranks: one for all layers, or by layer."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    by_layer = ranks if isinstance(ranks, dict) else {}
    common = min(by_layer.values()) if by_layer else ranks
    config = LoraConfig(
        r=common, lora_alpha=SETTINGS["scaling"] * common, target_modules="all-linear", rank_pattern=by_layer,
        alpha_pattern={name: SETTINGS["scaling"] * r for name, r in by_layer.items()},
    )  # fmt: skip
    return inject(model, config, layer)


def costs() -> dict[str, int]:
    return {
        name: cost(layer) for name, layer in adapter_layers(adapted(lora.LoRALinear, 1, 0)).items()
    }


def train(
    arm: str,
    learning_rate: float,
    seed: int,
    like: dict[str, int] | None = None,
    domain: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """One training: the model and what is recorded. like: the ranks that the grown arm of this seed ended with."""
    schedule = GrowthSchedule(**SETTINGS["growth"], seed=seed)
    callbacks: list[TrainerCallback] = []
    total = sum(like[name] * c for name, c in costs().items()) if like else 0
    if arm == "grown":
        model = adapted(GrowingLoRALinear, SETTINGS["r"], seed)
        callbacks = [RankGrower(model, schedule)]
    elif arm == "pruned":
        model = adapted(lora.LoRALinear, SETTINGS["high_r"], seed)
        steps = schedule.steps(SETTINGS["r"] * len(adapter_layers(model)))
        callbacks = [Pruner(model, steps, total, schedule.beta)]
    else:
        model = adapted(
            lora.LoRALinear, like if arm == "final" else uniform_ranks(costs(), total), seed
        )
    data, start = rows(domain or SETTINGS["domain"]), time.process_time()
    losses = study.fit(
        model,
        data,
        learning_rate,
        seed,
        SETTINGS["steps"],
        SETTINGS["batch"],
        callbacks=callbacks,
        disable_tqdm=True,
    )
    seconds = time.process_time() - start
    layers = adapter_layers(model)
    ranks = {name: layer.r for name, layer in layers.items()}
    if arm == "pruned":
        ranks = {name: int(kept.sum()) for name, kept in callbacks[0].kept.items()}
    parameters = sum(ranks[name] * cost(layer) for name, layer in layers.items())
    result: dict[str, Any] = {
        "ranks": ranks,
        "parameters": parameters,
        "seconds": round(seconds, 2),
    }
    if arm == "grown":
        history = rank_history(model)
        result["history"] = {name: [entry["ranks"][name] for entry in history] for name in ranks}
        result["steps"] = [entry["step"] for entry in history]
    return model, result | {"losses": [round(loss, 4) for loss in losses]}


def score(model: nn.Module, split: str) -> float:
    """Bits a byte on a sample of a split."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.load_text(SETTINGS["domain"], split)
    return lab.bits_per_byte(model, tokenizer, texts, max_bytes=SETTINGS["score_bytes"][split])


def moment(seed: int) -> dict[str, Any]:
    """The loss around a growth of every layer, in each of `WAYS`: on the training batches, which are the same, and on one
    batch kept aside, just before and just after. AdamW at a constant rate."""
    plan = SETTINGS["moment"]
    count = plan["before"] + plan["after"] + 1
    data = (
        rows(SETTINGS["domain"])
        .shuffle(seed=seed)[: count * SETTINGS["batch"]]["input_ids"]
        .split(SETTINGS["batch"])
    )

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=plan["learning_rate"],
            weight_decay=0,
        )

    def steps(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: list[Tensor],
        grower: RankGrower,
    ) -> list[float]:
        losses = []
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            grower.observe()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(loss.item(), 4))
        return losses

    @torch.no_grad()
    def aside(model: nn.Module) -> float:
        return model(input_ids=data[-1], labels=data[-1]).loss.item()

    model = adapted(GrowingLoRALinear, SETTINGS["r"], seed).train()
    layers = adapter_layers(model)
    budget = (SETTINGS["r"] + plan["add"]) * len(layers)
    schedule = GrowthSchedule(
        budget, start=plan["before"], every=1, top=len(layers), add=plan["add"], seed=seed
    )
    optimizer = optimizer_of(model)
    first = steps(model, optimizer, data[: plan["before"]], RankGrower(model, schedule))
    found: dict[str, Any] = {"before": first}
    for way in WAYS:
        twin = copy.deepcopy(model)
        twin_optimizer = optimizer_of(twin)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        grower, losses = RankGrower(twin, schedule), {"before": aside(twin)}
        if way != "none":
            grower.grow(twin_optimizer, plan["before"])
        for layer in grower.layers.values():
            if way == "scale not held":
                layer.scaling *= SETTINGS["r"] / layer.r
            if way == "both zero":
                nn.init.zeros_(layer.A1)
        if way == "moments thrown away":
            twin_optimizer.state.clear()
        losses["after"] = aside(twin)
        # without growth there is budget left to observe for; nothing else depends on it
        losses["then"] = steps(twin, twin_optimizer, data[plan["before"] : -1], grower)
        losses["end"] = aside(twin)
        new = [
            layer.B1.abs().max().item() for layer in grower.layers.values() if len(layer.pairs) > 1
        ]
        found[way] = losses | {"largest_new_weight": max(new, default=0.0)}
    return found


def main() -> None:
    results = study.Study(study.STUDIES / "3_1_adaptive.json", SOURCES, SETTINGS)
    runs = len(ARMS) * len(SETTINGS["seeds"]) * (len(SETTINGS["learning_rates"]) + 1)
    start, done = time.perf_counter(), 0

    trained: dict[tuple[str, float, int], tuple[nn.Module, dict[str, Any]]] = {}

    def run(
        arm: str, learning_rate: float, seed: int, split: str, like: dict[str, int] | None
    ) -> dict[str, Any]:
        key = (arm, learning_rate, seed)
        if key not in trained:  # of the chosen rate it is, for the second split
            trained[key] = train(arm, learning_rate, seed, like)
        model, result = trained[key]
        if split == "validation":
            result = {key: result[key] for key in ("parameters", "seconds")}
        return {"bits_per_byte": score(model, split)} | result

    def kept(
        arm: str, learning_rate: float, seed: int, split: str, like: dict[str, int] | None
    ) -> dict[str, Any]:
        nonlocal done
        key = f"{arm}/{learning_rate:g}/{seed}/{split}"
        result = results.run(key, lambda: run(arm, learning_rate, seed, split, like))
        done += 1
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{done:3}/{runs}  {minutes:5.1f} min  {key:32} {result['bits_per_byte']:.4f} bits a byte",
            flush=True,
        )
        return result

    for seed in SETTINGS["seeds"]:
        results.run(f"moment/{seed}", lambda s=seed: moment(s))
    base, _ = lab.load_base(SETTINGS["model"])
    for split in ("validation", "test"):
        results.run(f"base/{split}", lambda s=split: {"bits_per_byte": score(base, s)})
    grown: dict[int, dict[str, int]] = {}
    rate = 0.0
    for arm in ARMS:
        trained.clear()
        scores = {
            lr: statistics.fmean(
                kept(arm, lr, s, "validation", grown.get(s))["bits_per_byte"]
                for s in SETTINGS["seeds"]
            )
            for lr in SETTINGS["learning_rates"]
        }
        best = min(scores, key=scores.__getitem__)
        tested = {
            seed: kept(arm, best, seed, "test", grown.get(seed)) for seed in SETTINGS["seeds"]
        }
        if arm == "grown":
            grown, rate = {seed: result["ranks"] for seed, result in tested.items()}, best
    for domain in SETTINGS["domains"]:
        for seed in SETTINGS["seeds"]:
            if domain != SETTINGS["domain"]:
                results.run(
                    f"{domain}/{rate:g}/{seed}/ranks",
                    lambda d=domain, s=seed: train("grown", rate, s, domain=d)[1],
                )


if __name__ == "__main__":
    main()
