"""The study of chapter 4.2: one adapter served at four ranks, trained in several ways, against an adapter for each rank.

    python tools/studies/hierarchical.py         about 20 minutes of one thread; goes on where it was stopped

A training gives adapters of the ranks 1, 2, 4 and 8 in one or more ways ("servings"); each of them is put into plain LoRA
layers and scored. All have scale 2 at every rank, see the same batches with the same seed, and take the same steps, but for
"short": four adapters that share these steps. The rule for learning rates: seed 0 tries three rates, in factors of two;
while the best lies at an edge of what was tried, the next one on that side is tried too. Best means the lowest mean bits a
byte on validation text over the ranks that are served, for each serving by itself. The chosen rate gets the other seeds,
and only its runs are scored on the test text. Writes lora_course/data/studies/4_2_hierarchical.json.
"""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path

import datasets
import torch
from peft import LoraConfig

from lora_course import lab
from lora_course.hierarchical import NestedLoRALinear, RankSampler, cut
from lora_course.injection import adapter_layers, inject
from lora_course.lab import study
from lora_course.lora import AdapterState, LoRALinear
from lora_course.states import factor_state, truncate, use_adapter

ROOT = Path(__file__).resolve().parents[2]
RANKS = [1, 2, 4, 8]
STEPS = 32
TRAININGS = {
    **{f"lora-{r}": {"r": r, "steps": STEPS} for r in RANKS},
    **{f"short-{r}": {"r": r, "steps": STEPS // len(RANKS)} for r in RANKS},
    "truncation": {"r": 8, "steps": STEPS, "weighting": "equal", "hold": True},
    # Rows beyond the cut left to the optimiser, whose momentum moves them.
    "not-held": {"r": 8, "steps": STEPS, "weighting": "equal", "hold": False},
    "matryoshka": {"r": 8, "steps": STEPS, "weighting": "matryoshka"},
}
SERVINGS = {
    **{f"lora-{r}": ["whole"] for r in RANKS[:-1]},
    "lora-8": ["whole", "sliced", "svd"],
    **{f"short-{r}": ["whole"] for r in RANKS},
    "truncation": ["cut"], "not-held": ["cut"], "matryoshka": ["cut", "bare"],
}  # fmt: skip
SETTINGS = {
    "model": "nano", "domain": "shakespeare", "batch": 4, "length": 128, "train_bytes": 1_000_000, "score_bytes": 10_000,
    "seeds": [0, 1, 2], "learning_rates": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128, 0.256], "first": [8e-3, 1.6e-2, 3.2e-2],
    "scaling": 2.0, "target_modules": "all-linear", "ranks": RANKS, "trainings": TRAININGS, "servings": SERVINGS,
}  # fmt: skip
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("lora.py", "hierarchical.py", "training.py", "lab/study.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    ROOT / "lora_course/data/text/shakespeare.parquet",
]


def injected(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The fresh adapter of a training."""
    arm = TRAININGS[name]
    alpha = SETTINGS["scaling"] * arm["r"]
    config = LoraConfig(r=arm["r"], lora_alpha=alpha, target_modules=SETTINGS["target_modules"])
    nested = (
        {"layer": NestedLoRALinear, "ranks": RANKS, "weighting": arm["weighting"]}
        if "weighting" in arm
        else {"layer": LoRALinear}
    )
    return inject(model, config, **nested)


@functools.cache
def rows() -> datasets.Dataset:
    """What is trained on."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(
        lab.load_text(SETTINGS["domain"], "train"), SETTINGS["train_bytes"], piece=8192
    )
    return lab.blocks(tokenizer, texts, SETTINGS["length"])


@functools.cache
def train(name: str, learning_rate: float, seed: int) -> tuple[torch.nn.Module, list[float]]:
    """One training of the study: the model and its losses."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    injected(model, name)
    arm = TRAININGS[name]
    callbacks = [RankSampler(model, seed, hold=arm["hold"])] if "hold" in arm else []
    losses = study.fit(
        model,
        rows(),
        learning_rate,
        seed,
        arm["steps"],
        SETTINGS["batch"],
        callbacks=callbacks,
        disable_tqdm=True,
    )
    return model, losses


def adapters(model: torch.nn.Module, serving: str) -> dict[int, AdapterState]:
    """What is served, by rank: plain LoRA factors."""
    whole = factor_state(model)
    r = next(iter(adapter_layers(model).values())).r
    if serving == "whole":
        return {r: whole}
    if serving == "sliced":
        slices = {"A": lambda t, b: t[:b], "B": lambda t, b: t[:, :b], "scaling": lambda t, b: t}
        return {
            b: {name: slices[name.rpartition(".")[2]](t, b).clone() for name, t in whole.items()}
            for b in RANKS
        }
    if serving == "svd":
        return {b: truncate(whole, b) for b in RANKS}
    if serving == "cut":
        return {b: cut(model, b) for b in RANKS}
    return {b: cut(model, b, weighted=False) for b in RANKS}  # "bare"


@functools.cache
def plain() -> torch.nn.Module:
    """The model that adapters are put into to be scored."""
    return inject(
        lab.load_base(SETTINGS["model"])[0],
        LoraConfig(r=1, lora_alpha=1, target_modules=SETTINGS["target_modules"]),
    )


def score(model: torch.nn.Module, split: str) -> float:
    """Bits a byte on a sample of a split."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    return lab.bits_per_byte(
        model,
        tokenizer,
        lab.load_text(SETTINGS["domain"], split),
        max_bytes=SETTINGS["score_bytes"],
    )


def result(
    name: str, serving: str, learning_rate: float, seed: int, split: str
) -> dict[str, object]:
    model, losses = train(name, learning_rate, seed)
    scores = {
        str(b): score(use_adapter(plain(), state), split)
        for b, state in adapters(model, serving).items()
    }
    found: dict[str, object] = {"bits_per_byte": scores}
    return found | {"losses": [round(loss, 4) for loss in losses]} if split == "test" else found


def main() -> None:
    results = study.Study(study.STUDIES / "4_2_hierarchical.json", SOURCES, SETTINGS)
    start = time.perf_counter()

    def run(name: str, serving: str, rate: float, seed: int, split: str) -> float:
        key = f"{name}/{serving}/{rate:g}/{seed}/{split}"
        scores = results.run(key, lambda: result(name, serving, rate, seed, split))["bits_per_byte"]
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{minutes:5.1f} min  {key:40}",
            *(f"{b}: {value:.4f}" for b, value in scores.items()),
            flush=True,
        )
        return statistics.fmean(scores.values())

    base, _ = lab.load_base(SETTINGS["model"])
    for split in ("validation", "test"):
        results.run(f"base/{split}", lambda s=split: {"bits_per_byte": score(base, s)})
    grid, seeds = SETTINGS["learning_rates"], SETTINGS["seeds"]
    for name in TRAININGS:
        for serving in SERVINGS[name]:
            found = {
                rate: run(name, serving, rate, seeds[0], "validation") for rate in SETTINGS["first"]
            }
            while (best := min(found, key=found.get)) in (min(found), max(found)):
                neighbour = grid[grid.index(best) + (1 if best == max(found) else -1)]
                found[neighbour] = run(name, serving, neighbour, seeds[0], "validation")
            for seed in seeds:
                run(name, serving, best, seed, "test")
        train.cache_clear()


if __name__ == "__main__":
    main()
