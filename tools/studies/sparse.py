"""The study of chapter 4.1: gates, masked factors and a mask on ΔW against plain LoRA of as many trained parameters.

    python tools/studies/sparse.py          about 15 minutes on one idle core; goes on where it was stopped

One method of each family gets every learning rate of the grid with the first seed, and rates beyond the grid while the best
lies at its edge. The rate with the fewest bits a byte on validation text is the family's: all its methods are then trained at
it with every seed, and scored on the test text. Writes lora_course/data/studies/4_1_sparse.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from lora_course import lab, lora
from lora_course.checkpoint import save_adapter
from lora_course.injection import adapter_layers, inject, trainable_parameters
from lora_course.lab import study
from lora_course.sparse import (
    GatedLoRALinear,
    GateSparsity,
    SparseDeltaLinear,
    SparseLoRALinear,
    prune,
    ranks,
)

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "lora": lora.LoRALinear,
    "gates": GatedLoRALinear,
    "factors": SparseLoRALinear,
    "delta": SparseDeltaLinear,
}
# The scale s = α/r is 2 for all. "factors/4" trains as many numbers as "lora/4", and so do the others.
METHODS = {
    "lora/4": {"r": 4},
    "lora/8": {"r": 8},
    "lora/2": {"r": 2},
    "factors/4": {"r": 8, "sparsity": 0.5},
    "factors/2": {"r": 8, "sparsity": 0.75},
    "delta/4": {"r": 4},
    "delta/2": {"r": 2},
    "delta/magnitude": {"r": 4, "mask": "magnitude"},
    "gates/2": {"r": 8, "penalty": 2.0},
    "gates/1": {"r": 8, "penalty": 1.0},
    "gates/4": {"r": 8, "penalty": 4.0},
}
SEARCHED = ["lora/4", "factors/4", "delta/4", "gates/2"]
SETTINGS = {
    "model": "nano", "domain": "shakespeare", "steps": 40, "batch": 4, "length": 128,
    "train_bytes": 1_000_000, "score_bytes": {"validation": 15_000, "test": 30_000}, "seeds": [0, 1, 2],
    "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "scaling": 2, "methods": METHODS, "searched": SEARCHED,
    "target_modules": "all-linear",
}  # fmt: skip
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("lora.py", "sparse.py", "training.py", "lab/study.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    ROOT / "lora_course/data/text/shakespeare.parquet",
]


def injected(method: str) -> nn.Module:
    """The base with the fresh adapter of a method; its masks and gates come from torch's generator."""
    fields = METHODS[method]
    arguments = {key: fields[key] for key in ("sparsity", "mask") if key in fields}
    config = LoraConfig(
        r=fields["r"],
        lora_alpha=SETTINGS["scaling"] * fields["r"],
        target_modules=SETTINGS["target_modules"],
    )
    model, _ = lab.load_base(SETTINGS["model"])
    return inject(model, config, layer=LAYERS[method.split("/")[0]], **arguments)


class Recorder(GateSparsity):
    """Remembers how many gates are open after each step."""

    def __init__(self, model: nn.Module, penalty: float) -> None:
        super().__init__(model, penalty)
        self.opened: list[int] = []

    def step(self, optimizer: torch.optim.Optimizer, t: int = 1) -> int:
        self.opened.append(super().step(optimizer, t))
        return self.opened[-1]


def train(method: str, learning_rate: float, seed: int) -> tuple[nn.Module, dict[str, object]]:
    """One training of the study: the adapted model, pruned, and what was seen on the way."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(
        lab.load_text(SETTINGS["domain"], "train"), SETTINGS["train_bytes"], piece=8192
    )
    rows = lab.blocks(tokenizer, texts, SETTINGS["length"])
    torch.manual_seed(seed)
    model = injected(method)
    common = (model, rows, learning_rate, seed, SETTINGS["steps"], SETTINGS["batch"])
    if not method.startswith("gates"):
        return model, {"losses": study.fit(*common, disable_tqdm=True)}
    recorder = Recorder(model, METHODS[method]["penalty"])
    layers = adapter_layers(model).values()
    start = [layer.gate.detach().clone() for layer in layers]
    losses = study.fit(*common, callbacks=[recorder], disable_tqdm=True)
    gates = {
        "start": [[round(g, 4) for g in gate.tolist()] for gate in start],
        "end": [[round(g, 4) for g in layer.gate.tolist()] for layer in layers],
    }
    return prune(model), {
        "losses": losses,
        "ranks": ranks(model),
        "opened": recorder.opened,
        "gates": gates,
    }


def score(model: nn.Module, split: str) -> float:
    """Bits a byte on a sample of a split."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    return lab.bits_per_byte(
        model,
        tokenizer,
        lab.load_text(SETTINGS["domain"], split),
        max_bytes=SETTINGS["score_bytes"][split],
    )


def size(model: nn.Module) -> int:
    """Bytes of the saved adapter's tensors."""
    with tempfile.TemporaryDirectory() as folder:
        return (save_adapter(model, folder) / "adapter.safetensors").stat().st_size


def result(method: str, learning_rate: float, seed: int, split: str) -> dict[str, object]:
    """One training and its score."""
    model, seen = train(method, learning_rate, seed)
    seen["losses"] = [round(loss, 4) for loss in seen["losses"]]
    return {
        "bits_per_byte": score(model, split),
        "parameters": trainable_parameters(model),
        "bytes": size(model),
        **(seen if split == "test" else {}),
    }


def main() -> None:
    results = study.Study(study.STUDIES / "4_1_sparse.json", SOURCES, SETTINGS)
    seeds, start, done = SETTINGS["seeds"], time.perf_counter(), 0

    def run(method: str, rate: float, seed: int, split: str) -> float:
        nonlocal done
        key = f"{method}/{rate:g}/{seed}/{split}"
        value = results.run(key, lambda: result(method, rate, seed, split))["bits_per_byte"]
        done += 1
        print(
            f"{done:3}  {(time.perf_counter() - start) / 60:5.1f} min  {key:36} {value:.4f} bits a byte",
            flush=True,
        )
        return value

    base, _ = lab.load_base(SETTINGS["model"])
    for split in ("validation", "test"):
        results.run(f"base/{split}", lambda s=split: {"bits_per_byte": score(base, s)})
    best = {}
    for method in SEARCHED:
        scores = {
            rate: run(method, rate, seeds[0], "validation") for rate in SETTINGS["learning_rates"]
        }
        while (rate := min(scores, key=scores.get)) in (min(scores), max(scores)):
            beyond = rate / 2 if rate == min(scores) else rate * 2
            scores[beyond] = run(method, beyond, seeds[0], "validation")
        best[method.split("/")[0]] = rate
    for seed in seeds:  # so that a study that is stopped early has every method
        for method in METHODS:
            run(method, best[method.split("/")[0]], seed, "test")


if __name__ == "__main__":
    main()
