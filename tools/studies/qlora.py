"""The study of chapter 1.1: LoRA on an unquantised base, QLoRA, and QLoRA on attention only, with the same learning-rate search.

    python tools/studies/qlora.py            about 20 minutes on two idle cores; goes on where it was stopped

Every method gets every learning rate of the grid with every seed; the rate is chosen by the mean bits a byte on validation
text, and only the chosen one's runs are scored on the test text. Writes lora_course/data/studies/1_1_qlora.json.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig

from lora_course import lab, qlora
from lora_course.injection import inject, merge, trainable_parameters, unload
from lora_course.lab import study

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# 21 · 1,792 against 8 · 4,672 parameters a block of nano: 0.7% more for attention only. α = 2r throughout.
METHODS = {
    "lora": {"quantize": False, "target_modules": "all-linear", "r": 8},
    "qlora": {"quantize": True, "target_modules": "all-linear", "r": 8},
    "attention": {"quantize": True, "target_modules": ATTENTION, "r": 21},
}
SETTINGS = {
    "model": "nano", "domain": "shakespeare", "steps": 60, "batch": 8, "length": 128, "train_bytes": 1_000_000,
    "score_bytes": 40_000, "seeds": [0, 1, 2], "learning_rates": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "methods": METHODS,
}  # fmt: skip
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("lora.py", "qlora.py", "training.py", "lab/study.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    ROOT / "lora_course/data/text/shakespeare.parquet",
]


def train(method: str, learning_rate: float, seed: int) -> tuple[torch.nn.Module, list[float]]:
    """One training of the study: the adapted model and its losses."""
    arm = METHODS[method]
    model, tokenizer = lab.load_base(SETTINGS["model"])
    if arm["quantize"]:
        qlora.quantize_model(model)
    texts = lab.excerpt(
        lab.load_text(SETTINGS["domain"], "train"), SETTINGS["train_bytes"], piece=8192
    )
    rows = lab.blocks(tokenizer, texts, SETTINGS["length"])
    torch.manual_seed(seed)
    config = LoraConfig(r=arm["r"], lora_alpha=2 * arm["r"], target_modules=arm["target_modules"])
    inject(model, config)
    return model, study.fit(
        model, rows, learning_rate, seed, SETTINGS["steps"], SETTINGS["batch"], disable_tqdm=True
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


def merged_scores(model: torch.nn.Module) -> dict[str, float]:
    """Bits a byte on the test text after each of the three ways to merge the adapter of a 4-bit model."""
    original, _ = lab.load_base(SETTINGS["model"])
    return {
        "dequantized": score(unload(merge(qlora.dequantize_model(copy.deepcopy(model)))), "test"),
        "requantized": score(qlora.merge_requantized(copy.deepcopy(model)), "test"),
        "original": score(qlora.merge_into(original, model), "test"),
    }


def main() -> None:
    results = study.Study(study.STUDIES / "1_1_qlora.json", SOURCES, SETTINGS)
    keys = [
        (m, lr, seed)
        for m in METHODS
        for lr in SETTINGS["learning_rates"]
        for seed in SETTINGS["seeds"]
    ]
    start, done = time.perf_counter(), 0

    def run(method: str, learning_rate: float, seed: int, split: str) -> dict[str, object]:
        model, losses = train(method, learning_rate, seed)
        result = {
            "bits_per_byte": score(model, split),
            "parameters": trainable_parameters(model),
        }
        if split == "test":
            result["losses"] = [round(loss, 4) for loss in losses]
        if split == "test" and method == "qlora":
            result["merged"] = merged_scores(model)
        return result

    def report(key: str, result: dict[str, object]) -> None:
        nonlocal done
        done += 1
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{done:3}/{len(keys) + 9}  {minutes:5.1f} min  {key:32} {result['bits_per_byte']:.4f} bits a byte",
            flush=True,
        )

    for base in (False, True):
        model, _ = lab.load_base(SETTINGS["model"])
        if base:
            qlora.quantize_model(model)
        for split in ("validation", "test"):
            results.run(
                f"base/{'nf4' if base else 'fp32'}/{split}",
                lambda m=model, s=split: {"bits_per_byte": score(m, s)},
            )
    scores: dict[str, dict[float, list[float]]] = {method: {} for method in METHODS}
    for method, learning_rate, seed in keys:
        key = f"{method}/{learning_rate:g}/{seed}/validation"
        result = results.run(key, lambda: run(method, learning_rate, seed, "validation"))
        scores[method].setdefault(learning_rate, []).append(result["bits_per_byte"])
        report(key, result)
    for method, by_rate in scores.items():
        best = min(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]))
        for seed in SETTINGS["seeds"]:
            key = f"{method}/{best:g}/{seed}/test"
            report(key, results.run(key, lambda: run(method, best, seed, "test")))


if __name__ == "__main__":
    main()
