"""The study of chapter 0.1: LoRA by target, by rank and by scale, against full fine-tuning, with one rule for every learning rate.

    python tools/studies/lora.py             about 30 minutes of one thread; goes on where it was stopped

The rule: seed 0 tries the three middle rates of a grid in factors of two; while the best lies at an edge of what was tried,
the next rate on that side is tried too. Best means the lowest bits a byte on validation text. The chosen rate gets the
other seeds, and only its runs are scored on the test texts. Writes lora_course/data/studies/0_1_lora.json.
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path

import torch
from peft import LoraConfig

from lora_course import lab
from lora_course.injection import adapter_layers, inject, trainable_parameters
from lora_course.lab import study

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# A block of nano has 8 · 4,672 parameters with LoRA of rank 8 on all linear layers; 21 · 1,792 on attention only (0.7% more)
# and 13 · 2,880 on the MLP only (0.2% more). "scale" is s: 2 by α = 2r, or by a rule that gives 2 at r = 8.
ARMS = {
    "lora": {"target_modules": "all-linear", "r": 8, "scale": "alpha = 2r"},
    "full": {"target_modules": None, "r": None, "scale": None},
    "mlp": {"target_modules": MLP, "r": 13, "scale": "alpha = 2r"},
    "attention": {"target_modules": ATTENTION, "r": 21, "scale": "alpha = 2r"},
    "r64": {"target_modules": "all-linear", "r": 64, "scale": "alpha = 2r"},
    "r64-rslora": {"target_modules": "all-linear", "r": 64, "scale": "rslora"},
    "r64-alpha16": {"target_modules": "all-linear", "r": 64, "scale": "alpha = 16"},
    "r16": {"target_modules": "all-linear", "r": 16, "scale": "alpha = 2r"},
    "r16-rslora": {"target_modules": "all-linear", "r": 16, "scale": "rslora"},
    "r2": {"target_modules": "all-linear", "r": 2, "scale": "alpha = 2r"},
}
SETTINGS = {
    "model": "nano", "domain": "shakespeare", "own_domain": "glosses", "steps": 60, "batch": 8, "length": 128,
    "train_bytes": 1_000_000, "score_bytes": {"domain": 40_000, "own_domain": 20_000}, "seeds": [0, 1, 2],
    "arms": ARMS, "learning_rates": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2], "first": [4e-3, 8e-3, 1.6e-2],
}  # fmt: skip
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("lora.py", "training.py", "lab/study.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    *(
        ROOT / f"lora_course/data/text/{SETTINGS[name]}.parquet"
        for name in ("domain", "own_domain")
    ),
]


def config_of(arm: str) -> LoraConfig:
    """The adapter of an arm; of "full" one of rank 1, which stays zero."""
    r, scale = ARMS[arm]["r"], ARMS[arm]["scale"]
    if arm == "full":
        return LoraConfig(r=1, lora_alpha=1, target_modules="all-linear")
    alpha = {"alpha = 2r": 2 * r, "alpha = 16": 16, "rslora": 2 * math.sqrt(8)}[scale]
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=scale == "rslora",
        target_modules=ARMS[arm]["target_modules"],
    )


@functools.cache
def train(arm: str, learning_rate: float, seed: int) -> tuple[torch.nn.Module, list[float]]:
    """One training of the study: the model and its losses."""
    model, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(
        lab.load_text(SETTINGS["domain"], "train"), SETTINGS["train_bytes"], piece=8192
    )
    rows = lab.blocks(tokenizer, texts, SETTINGS["length"])
    torch.manual_seed(seed)
    inject(model, config_of(arm))
    if (
        arm == "full"
    ):  # every weight trains, and the adapter stays the zero that it is: the same trainer and batches
        adapter = {
            parameter
            for layer in adapter_layers(model).values()
            for parameter in (layer.A, layer.B)
        }
        for parameter in model.parameters():
            parameter.requires_grad_(parameter not in adapter)
    return model, study.fit(
        model, rows, learning_rate, seed, SETTINGS["steps"], SETTINGS["batch"], disable_tqdm=True
    )


def score(model: torch.nn.Module, split: str) -> dict[str, float]:
    """Bits a byte on a sample of a split: of the text that was learned, and of the base's own domain."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    result = {}
    for name, domain in (("bits_per_byte", "domain"), ("own_domain", "own_domain")):
        texts = lab.load_text(SETTINGS[domain], split)
        result[name] = lab.bits_per_byte(
            model, tokenizer, texts, max_bytes=SETTINGS["score_bytes"][domain]
        )
    return result


def main() -> None:
    results = study.Study(study.STUDIES / "0_1_lora.json", SOURCES, SETTINGS)
    start = time.perf_counter()

    def run(arm: str, learning_rate: float, seed: int, split: str) -> float:
        def compute() -> dict[str, object]:
            model, losses = train(arm, learning_rate, seed)
            kept = {"losses": [round(loss, 4) for loss in losses]} if split == "test" else {}
            return score(model, split) | {"parameters": trainable_parameters(model)} | kept

        key = f"{arm}/{learning_rate:g}/{seed}/{split}"
        result = results.run(key, compute)
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{minutes:5.1f} min  {key:34} {result['bits_per_byte']:.4f}, own domain {result['own_domain']:.4f}",
            flush=True,
        )
        return result["bits_per_byte"]

    for split in ("validation", "test"):
        results.run(f"base/{split}", lambda s=split: score(lab.load_base(SETTINGS["model"])[0], s))
    grid, seeds = SETTINGS["learning_rates"], SETTINGS["seeds"]
    for arm in ARMS:
        found = {rate: run(arm, rate, seeds[0], "validation") for rate in SETTINGS["first"]}
        while (best := min(found, key=found.get)) in (min(found), max(found)):
            neighbour = grid[grid.index(best) + (1 if best == max(found) else -1)]
            found[neighbour] = run(arm, neighbour, seeds[0], "validation")
        for seed in seeds:
            run(arm, best, seed, "validation")
            run(arm, best, seed, "test")
        train.cache_clear()


if __name__ == "__main__":
    main()
