"""The study of chapter 3.3: four domains one after another, by four strategies, and their adapters merged in several ways.

The rate is chosen by the mean bits a byte on validation text of all domains after the last one. All else is on test text, at
that rate: the orders of the domains; the sizes of the memory, the ranks and O-LoRA without its penalty, for which other
settings are as in the first order. "joint" trains on all domains mixed, for as many steps as the sequence has. Merged are the
adapters of the isolated runs: the first two, three and four of the order. Task k draws its A from seed + k.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch

from lora_course import continual, lab
from lora_course.arguments import training_arguments
from lora_course.continual import Isolated, Orthogonal, Replay, Sequential, Task
from lora_course.experiments import ROUNDING, Arm, Runs, Study, Witness
from lora_course.experiments.arms import adapted, config_of, recipe, rows_of, tokenizer_of, train
from lora_course.experiments.continual_merges import merged_states
from lora_course.experiments.rates import choose
from lora_course.lora import AdapterState
from lora_course.merging import Merged
from lora_course.states import concatenate, relative_error, use_adapter

DOMAINS = ["bible", "shakespeare", "milton", "python"]
SETTINGS: dict[str, Any] = {
    "model": "nano", "r": 8, "steps": 20, "batch": 8, "length": 64, "train_bytes": 300_000,
    "score_bytes": {"validation": 4_000, "test": 4_000}, "piece": 1_000,
    "learning_rates": [4e-3, 8e-3, 1.6e-2], "seeds": [0, 10, 20, 30, 40], "search_seeds": [0],
    "share": 0.5, "memory": 16_384, "memories": [2_048, 131_072], "strength": 0.5, "strengths": [0.0],
    "arm_steps": dict.fromkeys(["sequential", "replay", "orthogonal", "isolated", "joint"], 4 * 20),  # of four domains
    "ranks": [2, 32], "ties_density": 0.2, "dare_density": 0.5,
    "orders": [DOMAINS, DOMAINS[::-1], ["milton", "python", "bible", "shakespeare"]],
}  # fmt: skip


def orthogonal(strength: float, seed: int) -> Orthogonal:
    return Orthogonal(strength)


STRATEGIES: dict[str, Callable[[int], Sequential]] = {
    "sequential": lambda seed: Sequential(),
    "replay": lambda seed: Replay(SETTINGS["memory"], SETTINGS["share"], seed),
    "orthogonal": functools.partial(orthogonal, SETTINGS["strength"]),
    "isolated": lambda seed: Isolated(),
}


@functools.cache
def task(domain: str, split: str) -> Task:
    """A domain as a task, scored in bits a byte on an excerpt of the split."""
    size, piece = SETTINGS["score_bytes"][split], SETTINGS["piece"]
    held_out = lab.excerpt(lab.load_text(domain, split), size, piece)
    tokenizer = tokenizer_of(SETTINGS["model"])
    evaluate = lambda model: lab.bits_per_byte(model, tokenizer, held_out)  # noqa: E731
    return Task(domain, rows_of(SETTINGS, domain), evaluate)


def score_of(model: torch.nn.Module, domain: str, split: str) -> float:
    evaluate: Any = task(domain, split).evaluate  # a function: `Task` takes rows as well
    return evaluate(model)


def sequence(
    strategy: Sequential, rate: float, seed: int, split: str, order: list[str] = DOMAINS, r: int = SETTINGS["r"]
) -> dict[str, Any]:  # fmt: skip
    """One sequence of trainings: R, the metrics, and what belongs to the strategy."""
    model = adapted(SETTINGS, seed, config_of(r), layer=strategy.layer)
    tasks = [task(domain, split) for domain in order]
    if split == "validation":  # of which the last row is all that counts
        tasks = [dataclasses.replace(one, evaluate=lambda model: 0.0) for one in tasks]
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(folder, "cpu", **recipe(SETTINGS, rate, seed))
        results = continual.learn(model, tasks, strategy, args)
    if split == "validation":
        scores = []
        for index, domain in enumerate(order):
            with strategy.serving(model, index):
                scores.append(score_of(model, domain, split))
        return result(scores)
    found: dict[str, Any] = {"names": results.names, "matrix": rounded(results.matrix.tolist())}
    found |= continual.metrics(results.matrix)
    if isinstance(strategy, Orthogonal):
        found["overlap"] = continual.overlap(model).item()
    if isinstance(strategy, Isolated):
        found["merges"] = merges(model, strategy.states, seed)
    return found


def learned(name: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """A strategy, or one training on all domains."""
    if name == "joint":
        return joint(rate, seed, split)
    return sequence(STRATEGIES[name](seed), rate, seed, split)


def joint(rate: float, seed: int, split: str) -> dict[str, Any]:
    """One training on the rows of all domains, mixed."""
    model = adapted(SETTINGS, seed, config_of(SETTINGS["r"]))
    rows = datasets.concatenate_datasets([task(domain, split).train for domain in DOMAINS])
    steps = SETTINGS["steps"] * len(DOMAINS)
    train(Arm(model), rows, rate, seed, steps, SETTINGS["batch"], use_cpu=True)
    return result([score_of(model.eval(), domain, split) for domain in DOMAINS])


def result(scores: list[float]) -> dict[str, Any]:
    return {"scores": rounded(scores), "ACC": statistics.fmean(scores)}


def merges(model: torch.nn.Module, states: list[AdapterState], seed: int) -> dict[str, Any]:
    """Bits a byte on each merged domain, by method and number of adapters. "error": how far the update is from the mean of
    the updates, relative to it."""
    found = {}
    for count in range(2, len(states) + 1):
        part = states[:count]
        exact = concatenate(part, [1 / count] * count)
        for method, merged in merged_states(SETTINGS, part, seed).items():
            state = merged.state if isinstance(merged, Merged) else merged
            use_adapter(model, state)
            scores = [score_of(model, domain, "test") for domain in DOMAINS[:count]]
            values = result(scores) | {"error": relative_error(state, exact)}
            if isinstance(merged, Merged):
                values["truncation_error"] = merged.truncation_error
            found[f"{method}/{count}"] = values
    return found


def rounded(values: list) -> list:
    """Numbers in lists, to five places."""
    return [rounded(value) if isinstance(value, list) else round(value, 5) for value in values]


def body(runs: Runs) -> None:
    rates, asked, seeds = SETTINGS["learning_rates"], SETTINGS["search_seeds"], runs.seeds
    tried = (len(STRATEGIES) + 1) * len(rates) * len(asked) + 1
    others = len(SETTINGS["memories"]) + len(SETTINGS["ranks"]) + len(SETTINGS["strengths"])
    orders = (len(SETTINGS["orders"]) - 1) * (len(STRATEGIES) - 1)
    runs.expect(tried + (len(STRATEGIES) + 1 + others + orders) * len(seeds))
    best = {}
    for name in [*STRATEGIES, "joint"]:
        compute = functools.partial(learned, name)
        best[name] = choose(runs, name, compute, rates, asked, value=lambda run: run["ACC"])
    runs("rates", lambda: best)

    def test(key: str, make: Callable[[int], Sequential], name: str, **other: Any) -> None:
        for seed in seeds:
            compute = lambda s: sequence(make(s), best[name], s, "test", **other)  # noqa: E731
            runs(f"{name}/{key}/{seed}", compute, seed)

    for name, make in STRATEGIES.items():
        test("order 0", make, name)
    for seed in seeds:
        runs(f"joint/{seed}", joint, best["joint"], seed, "test")
    for size in SETTINGS["memories"]:
        test(f"memory {size}", functools.partial(Replay, size, SETTINGS["share"]), "replay")
    for r in SETTINGS["ranks"]:
        test(f"rank {r}", STRATEGIES["sequential"], "sequential", r=r)
    for strength in SETTINGS["strengths"]:
        test(f"strength {strength:g}", functools.partial(orthogonal, strength), "orthogonal")
    for number, order in enumerate(SETTINGS["orders"][1:], 1):
        for name, make in STRATEGIES.items():
            if name != "isolated":  # an isolated adapter knows nothing of the others
                test(f"order {number}", make, name, order=order)


REASON = ROUNDING + " in the mean; single scores on 4,000 bytes move more"
TOLERANCES = {"matrix": 0.02, "ACC": 0.005}
WITNESS = Witness(("orthogonal/order 0/0",), TOLERANCES, REASON, chapter="3_3_continual")
STUDY = Study("3_3_continual", SETTINGS, body, WITNESS)
