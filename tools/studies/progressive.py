"""The study of chapter 2.2: four short stages against one LoRA of one stage's rank, one of all stages' rank, and restarts alone.

    python tools/studies/progressive.py            about 15 minutes of one thread; goes on where it was stopped

All arms see the same batches in the same order, at the same scale, with the same learning-rate grid and the same linear
decay over all steps. The rate is chosen by the first seed's bits a byte on validation text. At the chosen rate all seeds are
trained, scored on the test text, and their updates' singular values kept. Writes lora_course/data/studies/2_2_progressive.json.

One LoRA is a run of one stage (tests/test_progressive.py: that is LoRA). "restarts" clears the moments and warms the learning
rate up again where the stages do, and keeps its factors. "merge" is trained at the rate of "stack" only: the two differ by
rounding. What was trained lies under build/studies/.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import datasets
import torch

from lora_course import lab, progressive
from lora_course.checkpoint import read_extra, save_adapter
from lora_course.injection import adapter_layers
from lora_course.lab import study
from lora_course.training import training_arguments

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model": "nano", "domain": "shakespeare", "steps": 48, "batch": 8, "length": 128, "train_bytes": 1_000_000,
    "score_bytes": 20_000, "seeds": [0, 1, 2], "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "scaling": 2.0, "warmup": 0.1,
    "methods": {
        "small": {"mode": "stack", "r": 4, "stages": 1}, "large": {"mode": "stack", "r": 16, "stages": 1},
        "restarts": {"mode": "restart", "r": 4, "stages": 4}, "stack": {"mode": "stack", "r": 4, "stages": 4},
        "merge": {"mode": "merge", "r": 4, "stages": 4, "rate_of": "stack"},
    },
}  # fmt: skip
METHODS = SETTINGS["methods"]
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("progressive.py", "lora.py", "training.py", "lab/corpora.py")
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    ROOT / "lora_course/data/text/shakespeare.parquet",
]


def batches(seed: int) -> datasets.Dataset:
    """The rows of all steps in the order of a seed; read from the first to the last."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(
        lab.load_text(SETTINGS["domain"], "train"), SETTINGS["train_bytes"], piece=8192
    )
    rows = lab.blocks(tokenizer, texts, SETTINGS["length"]).shuffle(seed=seed)
    return rows.select(range(SETTINGS["steps"] * SETTINGS["batch"]))


def plan(method: str, learning_rate: float) -> list[progressive.Stage]:
    """The stages of an arm: equal ones, one after the other."""
    arm = METHODS[method]
    steps = SETTINGS["steps"] // arm["stages"]
    return [
        progressive.Stage(arm["r"], "all-linear", learning_rate, steps, SETTINGS["warmup"])
    ] * arm["stages"]


def train(
    method: str, learning_rate: float, seed: int, folder: Path
) -> tuple[torch.nn.Module, list[float]]:
    """One training of the study, or what is left of it if `folder` holds a part: the adapted model and its losses."""
    model, _ = lab.load_base(SETTINGS["model"])
    stages, rows = plan(method, learning_rate), batches(seed)
    share = len(rows) // len(stages)
    parts = [rows.select(range(k * share, (k + 1) * share)) for k in range(len(stages))]
    settings = {
        "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": SETTINGS["batch"],
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    if METHODS[method]["mode"] == "restart":
        return restart(model, stages, parts, seed, folder, settings)
    results = progressive.train_stages(
        model,
        stages,
        parts,
        folder,
        METHODS[method]["mode"],
        scaling=SETTINGS["scaling"],
        seed=seed,
        **settings,
    )
    return model, [entry["loss"] for result in results for entry in result["history"]]


def restart(
    model: torch.nn.Module,
    stages: list[progressive.Stage],
    parts: list[datasets.Dataset],
    seed: int,
    folder: Path,
    settings: dict,
) -> tuple[torch.nn.Module, list[float]]:
    """One LoRA through the learning rates and fresh optimisers of all stages."""
    if (folder / "stage-0" / "adapter.json").is_file():
        return progressive.load_stage(model, folder), read_extra(folder / "stage-0")["losses"]
    progressive.inject_stages(model, stages, SETTINGS["scaling"])
    progressive.begin_stage(model, stages[0], seed)
    losses = []
    for k, stage in enumerate(stages):
        args = training_arguments(
            folder,
            learning_rate=stage.learning_rate,
            max_steps=stage.steps,
            seed=seed + 1000 * k,
            **settings,
        )
        trainer = progressive.StageTrainer(model, args, stages, k, "run", train_dataset=parts[k])
        trainer.train()
        losses += [entry["loss"] for entry in trainer.history]
    save_adapter(model, folder / "stage-0", {"losses": losses})
    return model, losses


def score(model: torch.nn.Module, split: str) -> float:
    """Bits a byte on a sample of a split."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    return lab.bits_per_byte(
        model,
        tokenizer,
        lab.load_text(SETTINGS["domain"], split),
        max_bytes=SETTINGS["score_bytes"],
    )


def spectra(method: str, folder: Path) -> list[dict[str, object]]:
    """After each stage, over the adapted layers: ranks of the accumulated update (singular values above a millionth of the
    largest), the mean effective rank, the mean size ‖ΔW‖ / ‖W₀‖, and the mean singular values as shares of the largest."""
    found = []
    for stage in range(1 if METHODS[method]["mode"] == "restart" else METHODS[method]["stages"]):
        model = progressive.load_stage(lab.load_base(SETTINGS["model"])[0], folder, stage)
        values = progressive.singular_values(model)
        layers = adapter_layers(model)
        ranks = [int((s > 1e-6 * s[0]).sum()) for s in values.values()]
        found.append({
            "ranks": [min(ranks), max(ranks)],
            "effective_rank": round(statistics.fmean(progressive.effective_rank(s) for s in values.values()), 4),
            "size": round(statistics.fmean((s.norm() / layers[n].base_layer.weight.norm()).item() for n, s in values.items()), 5),
            "singular_values": [round(x, 5) for x in torch.stack([s / s[0] for s in values.values()]).mean(0).tolist()],
        })  # fmt: skip
    return found


def main() -> None:
    results = study.Study(study.STUDIES / "2_2_progressive.json", SOURCES, SETTINGS)
    searched = [method for method, arm in METHODS.items() if "rate_of" not in arm]
    start, done = time.perf_counter(), 0

    trained = ROOT / "build" / "studies" / f"2_2_progressive-{study.source_hash(SOURCES[1:])[:8]}"

    def run(method: str, learning_rate: float, seed: int, split: str) -> dict[str, object]:
        folder = trained / f"{method}-{learning_rate:g}-{seed}"
        model, losses = train(method, learning_rate, seed, folder)
        result: dict[str, object] = {"bits_per_byte": score(model, split)}
        if split == "test":
            result |= {
                "losses": [round(loss, 4) for loss in losses],
                "spectra": spectra(method, folder),
            }
        return result

    def report(key: str, result: dict[str, object]) -> None:
        nonlocal done
        done += 1
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{done:3}  {minutes:5.1f} min  {key:32} {result['bits_per_byte']:.4f} bits a byte",
            flush=True,
        )

    base, _ = lab.load_base(SETTINGS["model"])
    for split in ("validation", "test"):
        results.run(f"base/{split}", lambda s=split: {"bits_per_byte": score(base, s)})
    scores: dict[str, dict[float, float]] = {}
    for method in searched:
        for rate in SETTINGS["learning_rates"]:
            key = f"{method}/{rate:g}/{SETTINGS['seeds'][0]}/validation"
            result = results.run(key, lambda: run(method, rate, SETTINGS["seeds"][0], "validation"))
            scores.setdefault(method, {})[rate] = result["bits_per_byte"]
            report(key, result)
    for method, arm in METHODS.items():
        by_rate = scores[arm.get("rate_of", method)]
        best = min(by_rate, key=by_rate.get)
        for seed in SETTINGS["seeds"]:
            key = f"{method}/{best:g}/{seed}/test"
            report(key, results.run(key, lambda: run(method, best, seed, "test")))


if __name__ == "__main__":
    main()
