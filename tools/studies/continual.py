"""The study of chapter 3.3: four domains one after another, by four strategies, and their adapters merged in several ways.

    python tools/studies/continual.py            about 35 minutes of one thread; goes on where it was stopped

Each strategy gets each learning rate of the grid with the first seed; the rate is chosen by the mean bits a byte on
validation text of all domains after the last one. Where the best is at the grid's edge, the grid grows there. All else is
on test text, at that rate, with all seeds: the orders of the domains; the sizes of the memory, the ranks and O-LoRA without
its penalty, for which other settings are as in the first order.
"joint" trains on all domains mixed, for as many steps as the sequence has. Merged are the adapters of the isolated runs:
the first two, three and four of the order. Writes lora_course/data/studies/3_3_continual.json.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, get_peft_model

from lora_course import lab, lora
from lora_course.continual import (
    Isolated,
    Orthogonal,
    Replay,
    Sequential,
    Task,
    learn,
    metrics,
    overlap,
)
from lora_course.injection import inject
from lora_course.lab import study
from lora_course.lora import AdapterState
from lora_course.merging import Merged, average_factors, dare, relative_error, ties
from lora_course.states import concatenate, split_state, truncate, use_adapter
from lora_course.training import training_arguments

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ["bible", "shakespeare", "milton", "python"]
SETTINGS = {
    "model": "nano", "r": 8, "steps": 20, "batch": 8, "length": 64, "train_bytes": 300_000,
    "score_bytes": {"validation": 4_000, "test": 4_000}, "piece": 1_000,
    "learning_rates": [4e-3, 8e-3, 1.6e-2], "seeds": [0, 10, 20],  # task k draws its A from seed + k
    "share": 0.5, "memory": 16_384, "memories": [2_048, 131_072], "strength": 0.5, "strengths": [0.0],
    "ranks": [2, 32], "ties_density": 0.2, "dare_density": 0.5,
    "orders": [DOMAINS, DOMAINS[::-1], ["milton", "python", "bible", "shakespeare"]],
}  # fmt: skip
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("lora.py", "continual.py", "merging.py", "training.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    *(ROOT / f"lora_course/data/text/{domain}.parquet" for domain in DOMAINS),
]
STRATEGIES: dict[str, Callable[[int], Sequential]] = {
    "sequential": lambda seed: Sequential(),
    "replay": lambda seed: Replay(SETTINGS["memory"], SETTINGS["share"], seed),
    "orthogonal": lambda seed: Orthogonal(SETTINGS["strength"]),
    "isolated": lambda seed: Isolated(),
}


@cache
def task(domain: str, split: str) -> Task:
    """A domain as a task, scored in bits a byte on an excerpt of the split."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(lab.load_text(domain, "train"), SETTINGS["train_bytes"], piece=8192)
    held_out = lab.excerpt(
        lab.load_text(domain, split), SETTINGS["score_bytes"][split], SETTINGS["piece"]
    )
    rows = lab.blocks(tokenizer, texts, SETTINGS["length"])
    return Task(domain, rows, lambda model: lab.bits_per_byte(model, tokenizer, held_out))


def injected(
    seed: int, r: int = SETTINGS["r"], layer: type[lora.LoRALinear] = lora.LoRALinear
) -> torch.nn.Module:
    """nano with a fresh adapter of scale 2."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    return inject(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"), layer)


def run(
    strategy: Sequential,
    learning_rate: float,
    seed: int,
    split: str,
    order: list[str] = DOMAINS,
    r: int = SETTINGS["r"],
) -> dict[str, object]:
    """One sequence of trainings: R, the metrics, and what belongs to the strategy."""
    model, learned = injected(seed, r, strategy.layer), [task(domain, split) for domain in order]
    if split == "validation":  # of which the last row is all that counts
        learned = [dataclasses.replace(one, evaluate=lambda model: 0.0) for one in learned]
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(
            folder, "cpu", learning_rate=learning_rate, seed=seed, max_steps=SETTINGS["steps"], disable_tqdm=True,
            per_device_train_batch_size=SETTINGS["batch"], warmup_steps=0.1, lr_scheduler_type="linear", save_strategy="no",
        )  # fmt: skip
        results = learn(model, learned, strategy, args)
    if split == "validation":
        scores = []
        for index, domain in enumerate(order):
            with strategy.serving(model, index):
                scores.append(task(domain, split).evaluate(model))
        return {"scores": rounded(scores), "ACC": statistics.fmean(scores)}
    found = {
        "names": results.names,
        "matrix": rounded(results.matrix.tolist()),
        **metrics(results.matrix),
    }
    if isinstance(strategy, Orthogonal):
        found["overlap"] = overlap(model).item()
    if isinstance(strategy, Isolated):
        found["merges"] = merges(model, strategy.states, seed)
    return found


def joint(learning_rate: float, seed: int, split: str) -> dict[str, object]:
    """One training on the rows of all domains, mixed."""
    model, learned = injected(seed), [task(domain, split) for domain in DOMAINS]
    rows = datasets.concatenate_datasets([task.train for task in learned])
    study.fit(
        model,
        rows,
        learning_rate,
        seed,
        SETTINGS["steps"] * len(DOMAINS),
        SETTINGS["batch"],
        use_cpu=True,
        disable_tqdm=True,
    )
    scores = [task.evaluate(model.eval()) for task in learned]
    return {"scores": rounded(scores), "ACC": statistics.fmean(scores)}


def in_peft(states: list[AdapterState]) -> torch.nn.Module:
    """nano with the states as PEFT adapters "0", "1", …"""
    model, r = None, SETTINGS["r"]
    for i, state in enumerate(states):
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=sorted(split_state(state)))
        if model is None:
            model = get_peft_model(lab.load_base(SETTINGS["model"])[0], config, str(i))
        else:
            model.add_adapter(str(i), config)
        for module, tensors in split_state(state).items():
            layer = model.base_model.model.get_submodule(module)
            layer.lora_A[str(i)].weight.data.copy_(tensors["A"])
            layer.lora_B[str(i)].weight.data.copy_(tensors["B"])
    return model


def peft_merge(
    model: torch.nn.Module, count: int, weights: list[float], kind: str, **arguments: object
) -> AdapterState:
    """What PEFT's add_weighted_adapter makes of the first `count` adapters, as a state."""
    model.base_model.add_weighted_adapter(
        [str(i) for i in range(count)], weights, kind, kind, **arguments
    )
    merged: AdapterState = {}
    for module, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            merged |= {
                f"{module}.A": layer.lora_A[kind].weight.detach().clone(),
                f"{module}.B": layer.lora_B[kind].weight.detach().clone(),
            }
            merged[f"{module}.scaling"] = torch.tensor(layer.scaling[kind], dtype=torch.float64)
    model.base_model.delete_adapter(kind)
    return merged


def merges(
    model: torch.nn.Module, states: list[AdapterState], seed: int
) -> dict[str, dict[str, object]]:
    """Bits a byte on each merged domain, by method and number of adapters. "error": how far the update is from the mean
    of the updates, relative to it. All but "mean" and "sum" have rank r. PEFT's work on the factors."""
    r, found = SETTINGS["r"], {}
    theirs = in_peft(states)
    for count in range(2, len(states) + 1):
        part, mean, one = states[:count], [1 / count] * count, [1.0] * count
        exact = concatenate(part, mean)
        torch.manual_seed(seed)  # PEFT's DARE draws from the global generator
        methods: dict[str, AdapterState | Merged] = {
            "mean": exact,
            "sum": concatenate(part),
            "mean, cut to r": truncate(exact, r),
            "sum, cut to r": truncate(concatenate(part), r),
            "TIES": ties(part, r, SETTINGS["ties_density"]),
            "DARE": dare(part, r, SETTINGS["dare_density"], mean, seed),
            "mean of the factors": average_factors(part),
            "PEFT linear": peft_merge(theirs, count, mean, "linear"),
            "PEFT ties": peft_merge(theirs, count, one, "ties", density=SETTINGS["ties_density"]),
            "PEFT dare_linear": peft_merge(
                theirs, count, mean, "dare_linear", density=SETTINGS["dare_density"]
            ),
        }
        for method, merged in methods.items():
            state = merged.state if isinstance(merged, Merged) else merged
            use_adapter(model, state)
            scores = [task(domain, "test").evaluate(model) for domain in DOMAINS[:count]]
            found[f"{method}/{count}"] = {
                "scores": rounded(scores),
                "ACC": statistics.fmean(scores),
                "error": relative_error(state, exact),
            }
            if isinstance(merged, Merged):
                found[f"{method}/{count}"]["truncation_error"] = merged.truncation_error
    return found


def rounded(values: list) -> list:
    """Numbers in lists, to five places."""
    return [rounded(value) if isinstance(value, list) else round(value, 5) for value in values]


def main() -> None:
    warnings.filterwarnings("ignore", module="peft")
    results = study.Study(study.STUDIES / "3_3_continual.json", SOURCES, SETTINGS)
    start = time.perf_counter()

    def record(key: str, function: Callable[[], dict[str, object]]) -> dict[str, object]:
        result = results.run(key, function)
        print(
            f"{(time.perf_counter() - start) / 60:5.1f} min  {key:40} {result['ACC']:.4f} bits a byte",
            flush=True,
        )
        return result

    first, best = SETTINGS["seeds"][0], {}
    for name in [*STRATEGIES, "joint"]:
        rates, scores = list(SETTINGS["learning_rates"]), {}
        while not scores or best[name] in (rates[0], rates[-1]):
            if scores:
                rates = sorted(
                    [*rates, best[name] / 2 if best[name] == rates[0] else best[name] * 2]
                )
            for rate in rates:
                one = (
                    (lambda: joint(rate, first, "validation"))
                    if name == "joint"
                    else (lambda: run(STRATEGIES[name](first), rate, first, "validation"))
                )
                scores[rate] = record(f"{name}/{rate:g}/{first}/validation", one)["ACC"]
            best[name] = min(scores, key=scores.__getitem__)
    results.run("rates", lambda: best)

    def test(key: str, make: Callable[[int], Sequential], name: str, **other: object) -> None:
        for seed in SETTINGS["seeds"]:
            record(
                f"{name}/{key}/{seed}", lambda: run(make(seed), best[name], seed, "test", **other)
            )

    for name, make in STRATEGIES.items():
        test("order 0", make, name)
    for seed in SETTINGS["seeds"]:
        record(f"joint/{seed}", lambda: joint(best["joint"], seed, "test"))
    for size in SETTINGS["memories"]:
        test(f"memory {size}", lambda seed: Replay(size, SETTINGS["share"], seed), "replay")
    for r in SETTINGS["ranks"]:
        test(f"rank {r}", lambda seed: Sequential(), "sequential", r=r)
    for strength in SETTINGS["strengths"]:
        test(f"strength {strength:g}", lambda seed: Orthogonal(strength), "orthogonal")
    for number, order in enumerate(SETTINGS["orders"][1:], 1):
        for name, make in STRATEGIES.items():
            if name != "isolated":  # an isolated adapter knows nothing of the others
                test(f"order {number}", make, name, order=order)


if __name__ == "__main__":
    main()
