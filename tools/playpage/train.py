"""Trains the adapters, the router and the tasks' adapters, and writes them."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import datasets
import torch
from torch import nn

from lora_course import lab
from lora_course.arguments import training_arguments
from lora_course.hierarchical import NestedLoRALinear, RankSampler
from lora_course.injection import inject
from lora_course.lab.tasks import load_task, task_rows
from lora_course.lora import AdapterState, LoRALinear
from lora_course.states import adapter_state, concatenate, factor_state, truncate
from lora_course.training import AdapterTrainer
from tools.playpage.adapters import config, first, mixture, read_adapter, with_state, write
from tools.playpage.record import CUT, DOMAINS, SETTINGS, Record
from tools.playpage.score import score_domain, score_task


@functools.cache
def rows(domain: str) -> datasets.Dataset:
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(lab.load_text(domain, "train"), SETTINGS["train_bytes"], piece=8192)
    return lab.blocks(tokenizer, texts, SETTINGS["length"])


def fit(
    model: nn.Module,
    data: datasets.Dataset,
    rate: float,
    steps: int,
    batch: int,
    callbacks: tuple = (),
) -> list[float]:
    """AdamW, 10% of warm-up, then linearly to zero; returns the loss at each step, in nats a token."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder, seed=SETTINGS["seed"], learning_rate=rate, max_steps=steps, warmup_steps=0.1,
            per_device_train_batch_size=batch, save_strategy="no", lr_scheduler_type="linear",
        )  # fmt: skip
        trainer = AdapterTrainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
        trainer.train()
    return [entry["loss"] for entry in trainer.history]


def train_adapter(domain: str, rate: float, nested: bool) -> tuple[AdapterState, list[float]]:
    """Plain factors of one training: of a nested adapter with its scale and weights inside."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(SETTINGS["seed"])
    special = (
        {"layer": NestedLoRALinear, "ranks": SETTINGS["nested_ranks"]}
        if nested
        else {"layer": LoRALinear}
    )
    inject(model, config(SETTINGS["r"], SETTINGS["lora_alpha"]), **special)
    callbacks = (RankSampler(model, SETTINGS["seed"]),) if nested else ()
    losses = fit(model, rows(domain), rate, SETTINGS["steps"], SETTINGS["batch"], callbacks)
    return concatenate([factor_state(model)]), losses  # the scaling goes into B


def train_router() -> tuple[AdapterState, list[float]]:
    """The routers over the four adapters as they were written; the adapters stay frozen."""
    model = mixture()
    seed, steps, batch = (SETTINGS[key] for key in ("seed", "router_steps", "batch"))
    # As many rows of each text: the shortest one must not be forgotten.
    parts = [
        rows(d).shuffle(seed=seed).select(range(steps * batch // len(DOMAINS))) for d in DOMAINS
    ]
    data = datasets.concatenate_datasets(parts).shuffle(seed=seed).with_format("torch")
    losses = fit(model, data, SETTINGS["router_rate"], steps, batch)
    state = {k: t for k, t in adapter_state(model).items() if k.endswith(".router")}
    return state, losses


def train_task(name: str) -> tuple[AdapterState, list[float]]:
    """Plain factors of an adapter that answers a task's questions."""
    model, tokenizer = lab.load_base(SETTINGS["model"])
    torch.manual_seed(SETTINGS["seed"])
    inject(model, config(SETTINGS["r"], SETTINGS["lora_alpha"]))
    data = task_rows(tokenizer, name, load_task(name, "train"), SETTINGS["task_length"])
    losses = fit(model, data, SETTINGS["task_rate"], SETTINGS["task_steps"], SETTINGS["task_batch"])
    return concatenate([factor_state(model)]), losses


def train_all(record: Record) -> None:
    def trial(name: str, domain: str, nested: bool) -> None:
        """Every rate, the best by validation written."""

        def run() -> dict[str, Any]:
            tried, best = {}, None
            for rate in SETTINGS["nested_rates" if nested else "rates"]:
                state, losses = train_adapter(domain, rate, nested)
                ranks = SETTINGS["nested_ranks"] if nested else [SETTINGS["r"]]
                found = [
                    score_domain(
                        with_state(first(state, r)), domain, "validation", "validation_bytes"
                    )
                    for r in ranks
                ]
                tried[f"{rate:g}"] = round(sum(found) / len(found), 4)
                if best is None or tried[f"{rate:g}"] < best[0]:
                    best = (tried[f"{rate:g}"], rate, state, losses)
            _, rate, state, losses = best
            write(name, state if nested else truncate(state, SETTINGS["r"]))
            if domain == CUT and not nested:
                write(f"{name}-as-trained", state)
            return {
                "domain": domain, "rate": rate, "validation": tried,
                "loss": [round(sum(part) / 10, 4) for part in (losses[:10], losses[-10:])],
            }  # fmt: skip

        record.run(f"train/{name}", run)

    for domain in [CUT, *(d for d in DOMAINS if d != CUT)]:
        trial(domain, domain, nested=False)
    trial("nested", CUT, nested=True)

    def router() -> dict[str, Any]:
        state, losses = train_router()
        write("router", state)
        return {"loss": [round(sum(part) / 10, 4) for part in (losses[:10], losses[-10:])]}

    record.run("train/router", router)


def train_tasks(record: Record) -> None:
    """Adapters that answer, each scored beside nano without one."""

    def run(name: str) -> dict[str, Any]:
        state, losses = train_task(name)
        write(name, truncate(state, SETTINGS["r"]))
        return {"loss": [round(sum(part) / 10, 4) for part in (losses[:10], losses[-10:])]}

    for name in SETTINGS["tasks"]:
        record.run(f"train/{name}", lambda n=name: run(n))
        record.run(f"task/{name}", lambda n=name: score_task(with_state(read_adapter(n)), n))
        record.run(f"task/{name}/base", lambda n=name: score_task(lab.load_base("nano")[0], n))
