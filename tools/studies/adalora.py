"""The study of chapter 1.2: AdaLoRA against plain LoRA of the same final budget, with the same learning-rate search.

    python tools/studies/adalora.py          about 25 minutes on one idle core; goes on where it was stopped

Every method gets every learning rate of the grid with every seed; the rate is chosen by the mean bits a byte on validation
text, and only the chosen one's runs are scored on the test text. Controls choose the triplets in another way than by
importance in the whole model; they take AdaLoRA's rate. Writes lora_course/data/studies/1_2_adalora.json.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor

from lora_course import lab, lora
from lora_course.adalora import AdaLoRALinear, RankAllocator, prune, ranks, regularizer
from lora_course.injection import inject, injection_of, trainable_parameters
from lora_course.lab import study
from lora_course.states import adapter_state, use_adapter

ROOT = Path(__file__).resolve().parents[2]
# 112 triplets in nano's 28 linear layers at the end, and scale 2, for all.
METHODS = {
    "lora": {"r": 4, "lora_alpha": 8},
    "adalora": {"orth_reg_weight": 0.5},
    "free": {"orth_reg_weight": 0.0},
}
CONTROLS = ("magnitude", "per layer", "random")
SETTINGS = {
    "model": "nano", "domain": "shakespeare", "steps": 60, "batch": 4, "length": 128,
    "train_bytes": 1_000_000, "score_bytes": {"validation": 20_000, "test": 40_000}, "seeds": [0, 1, 2],
    "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2], "methods": METHODS, "controls": list(CONTROLS),
    "target_modules": "all-linear",
    "adalora": {"init_r": 6, "target_r": 4, "lora_alpha": 12, "tinit": 6, "tfinal": 20, "deltaT": 2, "total_step": 60},
}  # fmt: skip
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("lora.py", "adalora.py", "training.py", "lab/study.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    ROOT / "lora_course/data/text/shakespeare.parquet",
]


class Recorder(RankAllocator):
    """An allocator that remembers what it chose, and that may choose by something else than importance."""

    def __init__(self, model: torch.nn.Module, choice: str, seed: int) -> None:
        super().__init__(model)
        self.history: dict[int, dict[str, int]] = {}
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values() if choice != "importance" else ():
            layer.scores = {"magnitude": magnitude, "per layer": per_layer, "random": drawn}[
                choice
            ](layer, generator)

    def step(self, t: int) -> dict[str, int] | None:
        chosen = super().step(t)
        if chosen:
            self.history[t] = chosen
        return chosen


def magnitude(layer: AdaLoRALinear, _: torch.Generator):
    """The size of λ alone, as in a truncated SVD."""
    return lambda: layer.E.abs().flatten()


def per_layer(layer: AdaLoRALinear, _: torch.Generator):
    """Scores under which each layer keeps as many triplets as the others: the place of each within its layer."""
    return lambda: 1.0 + AdaLoRALinear.scores(layer).argsort().argsort()


def drawn(layer: AdaLoRALinear, generator: torch.Generator):
    """Scores drawn once."""
    fixed: Tensor = 0.1 + torch.rand(layer.r, generator=generator)
    return lambda: fixed


def injected(method: str) -> torch.nn.Module:
    """The base with the fresh adapter of a method."""
    model, _ = lab.load_base(SETTINGS["model"])
    if method == "lora":
        return inject(
            model, LoraConfig(**METHODS[method], target_modules=SETTINGS["target_modules"])
        )
    config = AdaLoraConfig(
        **SETTINGS["adalora"], **METHODS[method], target_modules=SETTINGS["target_modules"]
    )
    return inject(model, config, layer=AdaLoRALinear)


def train(
    method: str, learning_rate: float, seed: int, choice: str = "importance"
) -> tuple[torch.nn.Module, dict[str, object]]:
    """One training of the study: the adapted model, pruned, and what was seen on the way."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(
        lab.load_text(SETTINGS["domain"], "train"), SETTINGS["train_bytes"], piece=8192
    )
    rows = lab.blocks(tokenizer, texts, SETTINGS["length"])
    torch.manual_seed(seed)
    model = injected(method)
    common = (model, rows, learning_rate, seed, SETTINGS["steps"], SETTINGS["batch"])
    if method == "lora":
        return model, {"losses": study.fit(*common, disable_tqdm=True)}
    allocator = Recorder(model, choice, seed)
    losses = study.fit(
        *common, callbacks=[allocator], auxiliary_loss=regularizer, disable_tqdm=True
    )
    injection_of(model).config.orth_reg_weight = 1.0
    seen = {
        "losses": losses,
        "orthogonality": regularizer(model).item(),
        "history": allocator.history,
    }
    return prune(model), seen


def score(model: torch.nn.Module, split: str) -> float:
    """Bits a byte on a sample of a split."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    return lab.bits_per_byte(
        model,
        tokenizer,
        lab.load_text(SETTINGS["domain"], split),
        max_bytes=SETTINGS["score_bytes"][split],
    )


ADAPTERS: dict[tuple[str, float, int, str], tuple[lora.AdapterState, dict[str, object]]] = {}
"""What was trained in this process: a rate that is chosen needs no second training to be scored on the test text."""


def result(
    method: str, learning_rate: float, seed: int, split: str, choice: str = "importance"
) -> dict[str, object]:
    key = (method, learning_rate, seed, choice)
    if key in ADAPTERS:
        state, seen = ADAPTERS[key]
        model = use_adapter(injected(method), state)
    else:
        model, seen = train(*key)
        ADAPTERS[key] = adapter_state(model), seen
    found = {"bits_per_byte": score(model, split), "parameters": trainable_parameters(model)}
    if method != "lora":
        found["orthogonality"] = seen["orthogonality"]
    if split == "test":
        found["losses"] = [round(loss, 4) for loss in seen["losses"]]
        if method != "lora":
            found |= {
                "ranks": ranks(model),
                "history": {str(t): list(kept.values()) for t, kept in seen["history"].items()},
            }
    return found


def main() -> None:
    results = study.Study(study.STUDIES / "1_2_adalora.json", SOURCES, SETTINGS)
    seeds, start, done = SETTINGS["seeds"], time.perf_counter(), 0
    keys = [(m, lr, seed) for m in METHODS for lr in SETTINGS["learning_rates"] for seed in seeds]
    total = len(keys) + (len(METHODS) + len(CONTROLS)) * len(seeds)

    def run(key: str, *arguments: object) -> float:
        nonlocal done
        value = results.run(key, lambda: result(*arguments))["bits_per_byte"]
        done += 1
        print(
            f"{done:3}/{total}  {(time.perf_counter() - start) / 60:5.1f} min  {key:36} {value:.4f} bits a byte",
            flush=True,
        )
        return value

    base, _ = lab.load_base(SETTINGS["model"])
    for split in ("validation", "test"):
        results.run(f"base/{split}", lambda s=split: {"bits_per_byte": score(base, s)})
    scores: dict[str, dict[float, list[float]]] = {method: {} for method in METHODS}
    for method, rate, seed in keys:
        scores[method].setdefault(rate, []).append(
            run(f"{method}/{rate:g}/{seed}/validation", method, rate, seed, "validation")
        )
    best = {
        method: min(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]))
        for method, by_rate in scores.items()
    }
    for method, rate in best.items():
        for seed in seeds:
            run(f"{method}/{rate:g}/{seed}/test", method, rate, seed, "test")
    for choice in CONTROLS:
        for seed in seeds:
            run(
                f"{choice}/{best['adalora']:g}/{seed}/test",
                "adalora",
                best["adalora"],
                seed,
                "test",
                choice,
            )


if __name__ == "__main__":
    main()
