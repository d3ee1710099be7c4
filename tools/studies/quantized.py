"""The study of chapter 4.3: LoRA's factors in few bits, trained quantised or quantised afterwards, against bytes.

    python tools/studies/quantized.py        about 20 minutes on one idle core; goes on where it was stopped

The rule of chapter 0.1 for every trained arm: seed 0 tries the three middle rates of a grid in factors of two, and goes on
while the best lies at an edge of what was tried; best means the lowest bits a byte on validation text. The chosen rate gets
the other seeds, and only its runs are scored on the test text. What is quantised after training is plain LoRA's own run of
that seed. Bytes are those of the files that are written. Writes lora_course/data/studies/4_3_quantized.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig

from lora_course import lab, lora
from lora_course.checkpoint import save_adapter
from lora_course.injection import adapter_layers, inject, injection_of
from lora_course.lab import study
from lora_course.quantized import QuantizedLoRALinear, quantize_after_training, save_quantized
from lora_course.states import adapter_state, use_adapter

ROOT = Path(__file__).resolve().parents[2]
# Trained: plain LoRA of three ranks (rank 1 in fp32 and rank 2 in 16 bits take about the bytes of rank 8 in 4 bits), and rank 8
# with quantised factors. Scale 2 for all.
RANKS = {"lora": 8, "r1": 1, "r2": 2}
GRIDS = {
    "4 group": {"bits": 4}, "2 group": {"bits": 2}, "2 group clip": {"bits": 2, "clip": 0.5}, "3 group": {"bits": 3},
    "8 group": {"bits": 8}, "A2 B8": {"bits_A": 2, "bits_B": 8}, "A8 B2": {"bits_A": 8, "bits_B": 2},
    "4 tensor": {"bits": 4, "granularity": "tensor"}, "2 tensor": {"bits": 2, "granularity": "tensor"},
}  # fmt: skip
AFTER = GRIDS | {
    "8 tensor": {"bits": 8, "granularity": "tensor"}, "8 channel": {"bits": 8, "granularity": "channel"},
    "4 channel": {"bits": 4, "granularity": "channel"}, "2 channel": {"bits": 2, "granularity": "channel"},
}  # fmt: skip
R2_AFTER = {"bits": 16, "granularity": "channel"}
SETTINGS = {
    "model": "nano", "domain": "shakespeare", "steps": 40, "batch": 4, "length": 128, "r": 8, "scaling": 2,
    "train_bytes": 1_000_000, "score_bytes": {"validation": 15_000, "test": 25_000}, "seeds": [0, 1, 2],
    "target_modules": "all-linear", "group_size": 64, "ranks": RANKS, "trained": GRIDS, "after": AFTER, "r2 after": R2_AFTER,
    "learning_rates": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2], "first": [4e-3, 8e-3, 1.6e-2],
}  # fmt: skip
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("lora.py", "quantized.py", "training.py", "lab/study.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    ROOT / "lora_course/data/text/shakespeare.parquet",
]


def injected(arm: str) -> torch.nn.Module:
    """The base with the fresh adapter of an arm."""
    model, _ = lab.load_base(SETTINGS["model"])
    r = RANKS.get(arm, SETTINGS["r"])
    config = LoraConfig(
        r=r, lora_alpha=SETTINGS["scaling"] * r, target_modules=SETTINGS["target_modules"]
    )
    return (
        inject(model, config)
        if arm in RANKS
        else inject(model, config, layer=QuantizedLoRALinear, **GRIDS[arm])
    )


def train(arm: str, learning_rate: float, seed: int) -> tuple[torch.nn.Module, list[float]]:
    """One training of the study: the model and its losses."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(
        lab.load_text(SETTINGS["domain"], "train"), SETTINGS["train_bytes"], piece=8192
    )
    rows = lab.blocks(tokenizer, texts, SETTINGS["length"])
    torch.manual_seed(seed)
    model = injected(arm)
    losses = study.fit(
        model, rows, learning_rate, seed, SETTINGS["steps"], SETTINGS["batch"], disable_tqdm=True
    )
    return model, losses


def score(model: torch.nn.Module, split: str) -> float:
    """Bits a byte on a sample of a split."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    return lab.bits_per_byte(
        model,
        tokenizer,
        lab.load_text(SETTINGS["domain"], split),
        max_bytes=SETTINGS["score_bytes"][split],
    )


def file_bytes(model: torch.nn.Module) -> int:
    """What the adapter takes on disk: the safetensors file, its header included."""
    with tempfile.TemporaryDirectory() as folder:
        if injection_of(model).layer is QuantizedLoRALinear:
            return save_quantized(model, folder).stat().st_size
        return (save_adapter(model, folder) / "adapter.safetensors").stat().st_size


def error(model: torch.nn.Module, plain: lora.AdapterState) -> float:
    """‖ΔW − ΔW of `plain`‖ / ‖ΔW of `plain`‖ over all layers together."""
    reference = use_adapter(injected("lora"), plain)
    layers = adapter_layers(reference)
    pairs = [
        (layer.delta_weight(), layers[name].delta_weight())
        for name, layer in adapter_layers(model).items()
    ]
    return (
        (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))
        .sqrt()
        .item()
    )


TRAINED: dict[tuple[str, float, int], tuple[lora.AdapterState, list[float]]] = {}
"""What was trained in this process: a rate that is chosen needs no second training to be scored on the test text."""


def trained(arm: str, learning_rate: float, seed: int) -> tuple[torch.nn.Module, list[float]]:
    key = (arm, learning_rate, seed)
    if key not in TRAINED:
        model, losses = train(*key)
        TRAINED[key] = adapter_state(model), losses
    state, losses = TRAINED[key]
    return use_adapter(injected(arm), state), losses


def result(arm: str, learning_rate: float, seed: int, split: str) -> dict[str, object]:
    model, losses = trained(arm, learning_rate, seed)
    found = {"bits_per_byte": score(model, split)}
    return (
        found | {"bytes": file_bytes(model), "losses": [round(loss, 4) for loss in losses]}
        if split == "test"
        else found
    )


@torch.no_grad()
def after(arm: str, learning_rate: float, seed: int, grid: dict[str, object]) -> dict[str, object]:
    """Plain LoRA of an arm, quantised when it was done; error: of ΔW against before, where the rank is the study's."""
    model, _ = trained(arm, learning_rate, seed)
    plain = adapter_state(model)
    quantize_after_training(model, group_size=SETTINGS["group_size"], **grid)
    found = {"bits_per_byte": score(model, "test"), "bytes": file_bytes(model)}
    return found | {"error": error(model, plain)} if arm == "lora" else found


def main() -> None:
    results = study.Study(study.STUDIES / "4_3_quantized.json", SOURCES, SETTINGS)
    grid, seeds, start = SETTINGS["learning_rates"], SETTINGS["seeds"], time.perf_counter()

    def run(key: str, function, *arguments: object) -> float:
        value = results.run(key, lambda: function(*arguments))["bits_per_byte"]
        print(
            f"{(time.perf_counter() - start) / 60:5.1f} min  {key:36} {value:.4f} bits a byte",
            flush=True,
        )
        return value

    for split in ("validation", "test"):
        run(
            f"base/{split}",
            lambda s=split: {"bits_per_byte": score(lab.load_base(SETTINGS["model"])[0], s)},
        )
    best = {}
    for arm in (*RANKS, *GRIDS):
        found = {
            rate: run(
                f"{arm}/{rate:g}/{seeds[0]}/validation", result, arm, rate, seeds[0], "validation"
            )
            for rate in SETTINGS["first"]
        }
        while (chosen := min(found, key=found.get)) in (min(found), max(found)):
            rate = grid[grid.index(chosen) + (1 if chosen == max(found) else -1)]
            found[rate] = run(
                f"{arm}/{rate:g}/{seeds[0]}/validation", result, arm, rate, seeds[0], "validation"
            )
        best[arm] = chosen
        for seed in seeds:
            run(f"{arm}/{chosen:g}/{seed}/test", result, arm, chosen, seed, "test")
        if arm == "lora":
            for name, made in AFTER.items():
                for seed in seeds:
                    run(f"after {name}/{chosen:g}/{seed}/test", after, arm, chosen, seed, made)
        if arm == "r2":
            for seed in seeds:
                run(f"r2 after/{chosen:g}/{seed}/test", after, arm, chosen, seed, R2_AFTER)
        TRAINED.clear()


if __name__ == "__main__":
    main()
