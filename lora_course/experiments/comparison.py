"""The comparison of chapter 5.1: methods that train one adapter on one task, side by side, under one rule.

    lora-course study run 5_1_comparison                                   all methods, two domains
    lora-course study run 5_1_comparison --arms lora dora/python --out mine.json

Same base, same text in the same order, same number of steps, same schedule, same search for the learning rate, as many
parameters in the end as plain LoRA of rank 8 (or as near as a method allows), same effective scale s = 2. One seed searches:
it is enough to tell rates apart, as all of them see the same rows from the same start. (Plain LoRA also runs at twice its
rate, as `twice`: what a rate that is too high costs. Nothing is chosen by it.) An arm is "method/domain".
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pandas
import torch
from torch import nn

from lora_course import lab
from lora_course.arguments import compute_dtype
from lora_course.experiments import Runs, Study, Trained, Witness
from lora_course.experiments import methods as own
from lora_course.experiments import peft_methods as peft
from lora_course.experiments import train as train_arm
from lora_course.experiments.arms import base_of, file_bytes, rows_of, tokenizer_of
from lora_course.experiments.methods import Method, Settings
from lora_course.experiments.rates import Kept, at_rate, compete
from lora_course.lab import study
from lora_course.lab.evidence import differences, interval, verdict

DOMAINS = ("shakespeare", "python")
SETTINGS: dict[str, Any] = {
    "model": "nano", "own_domain": "glosses", "steps": 32, "batch": 4, "length": 128, "train_bytes": 1_000_000,
    "score_bytes": {"validation": 10_000, "test": 20_000, "own_domain": 10_000}, "seeds": [0, 1, 2, 3, 4], "search_seeds": [0],
    "learning_rates": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128, 0.256], "first": [4e-3, 8e-3, 1.6e-2],
    "r": 8, "scaling": 2.0,
}  # fmt: skip
CLOSING = functools.partial(own.gates, penalty=2.5)  # under which about 8 were left in a trial
NESTED = functools.partial(own.nested, ranks=(1, 2, 4, 8))
METHODS: dict[str, Method] = {
    "lora": Method("LoRA", own.lora, "0_1_lora", "the reference"),
    "rslora": Method("rsLoRA (PEFT)", functools.partial(peft.from_loras_start, use_rslora=True), "0_1_lora", "the same α, so s = α/√r is √r times LoRA's: at LoRA's own s it would be LoRA"),
    "dora": Method("DoRA (PEFT)", functools.partial(peft.from_loras_start, use_dora=True), "0_1_lora", "a magnitude for each output on top of rank 8"),
    "qlora": Method("QLoRA", own.qlora, "1_1_qlora", "the base in NF4 with double quantisation"),
    "adalora": Method("AdaLoRA", own.adalora, "1_2_adalora", "from rank 12 down to 8 on average"),
    "progressive": Method("progressive", own.in_stages, "2_2_progressive", "two stages of rank 4 and half the steps"),
    "adaptive": Method("adaptive", own.adaptive, "3_1_adaptive", "from rank 2 up to 8 on average"),
    "gates": Method("gates", CLOSING, "4_1_sparse", "from rank 12 down to what the penalty leaves"),
    "delta": Method("ΔW mask", own.delta, "4_1_sparse", "as many single weights as LoRA has numbers, at random places"),
    "nested": Method("nested", NESTED, "4_2_hierarchical", "trained for the ranks 1, 2, 4 and 8 at once, served at 8"),
    "quantized": Method("4-bit factors", functools.partial(own.quantized, bits=4), "4_3_quantized", "factors trained and stored in 4 bits"),
}  # fmt: skip


def ordered_rows(domain: str, seed: int, settings: Settings = SETTINGS) -> datasets.Dataset:
    """The training rows in the order of a seed, as many as the steps need."""
    rows = rows_of(settings, domain).shuffle(seed=seed)
    return rows.select(range(settings["steps"] * settings["batch"]))


def train(method: str, domain: str, rate: float, seed: int) -> tuple[Trained, int]:
    """One training of a method of this comparison, and the bytes that one more step would allocate at its peak."""
    return train_measured(SETTINGS, METHODS[method], domain, rate, seed)


def train_measured(
    settings: Settings, method: Method, domain: str, rate: float, seed: int
) -> tuple[Trained, int]:
    arm, rows, peak = method.make(settings, seed), ordered_rows(domain, seed, settings), []
    plan = (rate, seed, settings["steps"], settings["batch"])
    first = rows[: settings["batch"]]["input_ids"]
    measure = lambda: peak.append(step_bytes(arm.model, arm.auxiliary_loss, first))  # noqa: E731
    how: dict[str, Any] = {"before_finish": measure, "train_sampling_strategy": "sequential"}
    return train_arm(arm, rows, *plan, **how), peak[0]


def step_bytes(model: nn.Module, auxiliary_loss: Any, ids: torch.Tensor) -> int:
    """Peak of what one optimiser step on one batch allocates, in bytes. At rate zero: the weights stay as they are."""
    dtype = compute_dtype("cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if auxiliary_loss:
            loss = loss + auxiliary_loss(model)
        loss.backward()
        optimizer.step()

    model.train()
    model.zero_grad(set_to_none=True)
    peak = lab.peak_memory(step)[1]
    model.zero_grad(set_to_none=True)
    return peak


def bits_per_byte(model: nn.Module, domain: str, split: str) -> float:
    """On the sample of a split that every method is scored on."""
    size = SETTINGS["score_bytes"]["own_domain" if domain == SETTINGS["own_domain"] else split]
    texts, tokenizer = lab.load_text(domain, split), tokenizer_of(SETTINGS["model"])
    return lab.bits_per_byte(model, tokenizer, texts, max_bytes=size)


def score(domain: str, trained: tuple[Trained, int], split: str) -> dict[str, Any]:
    """What is recorded of a training. Forgetting and the costs come with the test split only."""
    found, peak = trained
    arm, model = found.arm, found.model
    values = {"bits_per_byte": bits_per_byte(model, domain, split), "seconds": found.seconds}
    if split == "validation":
        return values
    return values | {
        "own_domain": bits_per_byte(model, SETTINGS["own_domain"], split),
        "parameters": arm.parameters(model), "file_bytes": file_bytes(arm), "model_bytes": lab.tensor_bytes(model), "step_bytes": peak,
        "last_loss": round(statistics.fmean(found.losses[-10:]), 4),
    }  # fmt: skip


def body(runs: Runs) -> None:
    arms = runs.arms([f"{method}/{domain}" for domain in DOMAINS for method in METHODS])
    first, asked, seeds = SETTINGS["first"], SETTINGS["search_seeds"], runs.seeds
    runs.expect(3 + len(arms) * (len(first) * len(asked) + len(seeds)) + len(seeds) * len(DOMAINS))
    for domain in (*DOMAINS, SETTINGS["own_domain"]):
        base = lambda d: {"bits_per_byte": bits_per_byte(base_of(SETTINGS), d, "test")}  # noqa: E731
        runs(f"base/{domain}/test", base, domain)
    for arm in arms:
        method, domain = arm.split("/")
        scored = functools.partial(score, domain)
        best = compete(runs, arm, Kept(train, method, domain), scored, first, asked)
        if method == "lora":
            again = lambda *how: scored(train("lora", domain, *how), "test")  # noqa: E731
            at_rate(runs, arm, 2 * best, again, "twice")


# ------------------------------------------------------------------------------------------------ reading the record


def series(
    record: Mapping[str, Any], method: str, domain: str, quantity: str = "bits_per_byte"
) -> list[float]:
    """A quantity of the runs on test text, one value a seed, in the order of the seeds.

    quantity: a field of the runs, or "forgetting": bits a byte lost on the base's own domain, against the untouched base.
    """
    if quantity != "forgetting":
        return study.series(record, f"{method}/{domain}", quantity)
    base = record["runs"][f"base/{record['settings']['own_domain']}/test"]["bits_per_byte"]
    return [value - base for value in series(record, method, domain, "own_domain")]


def paired(
    record: Mapping[str, Any], method: str, domain: str, quantity: str = "bits_per_byte", reference: str = "lora"
) -> list[float]:  # fmt: skip
    """`method` less `reference`, seed by seed: what the seeds share (text, order, start) drops out."""
    return differences(*(series(record, name, domain, quantity) for name in (method, reference)))


def methods_in(record: Mapping[str, Any], domain: str) -> list[str]:
    """The methods with runs on test text for every seed, in the order of `METHODS`."""
    complete = len(record["settings"]["seeds"])
    tested = [key.split("/")[0] for key in record["runs"] if f"/{domain}/" in key and key.endswith("/test")]  # fmt: skip
    return [method for method in METHODS if tested.count(method) >= complete]


def table(
    record: Mapping[str, Any], domain: str, methods: Sequence[str] | None = None
) -> pandas.DataFrame:
    """A row a method: mean and 95% interval of quality and forgetting in bits a byte, then what it costs."""
    rows, there = {}, methods_in(record, domain)
    for method in there if methods is None else [name for name in there if name in methods]:
        costs = ("parameters", "file_bytes", "model_bytes", "step_bytes", "seconds")
        cost = {name: statistics.median(series(record, method, domain, name)) for name in costs}
        less = ""
        if method != "lora" and "lora" in there:
            values = paired(record, method, domain)
            less = f"{interval(values)[0]:+.3f} {verdict(values)}"
        rows[METHODS[method].title] = {
            "bits a byte": plus_minus(series(record, method, domain)), "minus LoRA's": less,
            "forgetting": plus_minus(series(record, method, domain, "forgetting")),
            "learning rate": f"{study.chosen_rate(record, f'{method}/{domain}'):g}",
            "parameters": f"{cost['parameters']:,.0f}", "file, kB": f"{cost['file_bytes'] / 1000:.0f}",
            "model, MB": f"{cost['model_bytes'] / 1e6:.1f}", "step, MB": f"{cost['step_bytes'] / 1e6:.0f}",
            "CPU seconds": f"{cost['seconds']:.1f}",
        }  # fmt: skip
    return pandas.DataFrame.from_dict(rows, orient="index")


def plus_minus(values: Sequence[float]) -> str:
    mean, _, high = interval(values)
    return f"{mean:.3f} ± {high - mean:.3f}"


TOLERANCES = {"bits_per_byte": 0.005, "own_domain": 0.02, "parameters": 0, "file_bytes": 0}
WITNESS = Witness(("lora/python/0.008/0/test",), TOLERANCES, chapter="5_1_comparison")
STUDY = Study("5_1_comparison", SETTINGS, body, WITNESS)
