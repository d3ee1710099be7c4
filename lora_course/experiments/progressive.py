"""The study of chapter 2.2: four short stages against one LoRA of one stage's rank, one of all stages' rank, and restarts alone.

All arms see the same batches in the same order, at the same scale, with the same learning-rate grid and the same linear decay
over all steps. One LoRA is a run of one stage. "restarts" clears the moments and warms the learning rate up again where the
stages do, and keeps its factors. "merge" is trained at the rate of "stack" only: the two differ by rounding. Of the runs on
test text the singular values of the updates are kept.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn

from lora_course import progressive
from lora_course.arguments import training_arguments
from lora_course.checkpoint import save_adapter
from lora_course.experiments import Runs, Study, Witness
from lora_course.experiments.arms import NANO, base_of, base_runs, bits_of, rows_of
from lora_course.experiments.rates import at_rate, compete_all
from lora_course.injection import adapter_layers
from lora_course.progressive import Stage, load_stage

METHODS: dict[str, dict[str, Any]] = {
    "small": {"mode": "stack", "r": 4, "stages": 1}, "large": {"mode": "stack", "r": 16, "stages": 1},
    "restarts": {"mode": "restart", "r": 4, "stages": 4}, "stack": {"mode": "stack", "r": 4, "stages": 4},
    "merge": {"mode": "merge", "r": 4, "stages": 4, "rate_of": "stack"},
}  # fmt: skip
SETTINGS = NANO | {
    "steps": 48, "batch": 8, "score_bytes": 20_000, "search_seeds": [0], "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "scaling": 2.0,
    "warmup": 0.1, "methods": METHODS,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": SETTINGS["batch"],
    "train_sampling_strategy": "sequential",
}  # fmt: skip


def parts_of(seed: int, count: int) -> list[datasets.Dataset]:
    """The rows of all steps in the order of a seed, read from the first to the last, in so many parts."""
    size = SETTINGS["steps"] * SETTINGS["batch"] // count
    rows = rows_of(SETTINGS).shuffle(seed=seed)
    return [rows.select(range(k * size, (k + 1) * size)) for k in range(count)]


def trained(method: str, rate: float, seed: int) -> dict[str, Any]:
    """One training: the adapted model, its losses, and the spectra of its stages."""
    how, model = METHODS[method], base_of(SETTINGS)
    count, restarts = how["stages"], how["mode"] == "restart"
    steps, parts = SETTINGS["steps"] // count, parts_of(seed, count)
    stages = [Stage(how["r"], "all-linear", rate, steps, SETTINGS["warmup"])] * count
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        if restarts:
            history = restart(model, stages, parts, seed, folder)
        else:
            plan: dict[str, Any] = {"scaling": SETTINGS["scaling"], "seed": seed} | TRAINING
            done = progressive.train_stages(model, stages, parts, folder, how["mode"], **plan)
            history = [entry for result in done for entry in result["history"]]
        kept = range(1 if restarts else count)
        spectra = [spectrum(load_stage(base_of(SETTINGS), folder, k)) for k in kept]
    losses = [round(entry["loss"], 4) for entry in history]
    return {"model": model, "losses": losses, "spectra": spectra}


def restart(
    model: nn.Module, stages: list[Stage], parts: list[datasets.Dataset], seed: int, folder: Path
) -> list[dict[str, float]]:
    """One LoRA through the learning rates and fresh optimisers of all stages; what it keeps is read as one stage."""
    progressive.inject_stages(model, stages, SETTINGS["scaling"])
    progressive.begin_stage(model, stages[0], seed)
    history = []
    for k, stage in enumerate(stages):
        plan: dict[str, Any] = {"learning_rate": stage.learning_rate, "max_steps": stage.steps}
        args = training_arguments(folder, **plan | TRAINING, seed=seed + 1000 * k)
        trainer = progressive.StageTrainer(model, args, stages, k, "run", train_dataset=parts[k])
        trainer.train()
        history += trainer.history
    save_adapter(model, folder / "stage-0")
    return history


def spectrum(model: nn.Module) -> dict[str, Any]:
    """Over the adapted layers: ranks of the accumulated update (singular values above a millionth of the largest), the mean
    effective rank, the mean size ‖ΔW‖ / ‖W₀‖, and the mean singular values as shares of the largest."""
    values, layers = progressive.singular_values(model), adapter_layers(model)
    ranks = [int((s > 1e-6 * s[0]).sum()) for s in values.values()]
    effective = [progressive.effective_rank(s) for s in values.values()]
    sizes = [(s.norm() / layers[n].base_layer.weight.norm()).item() for n, s in values.items()]
    shares = torch.stack([s / s[0] for s in values.values()]).mean(0).tolist()
    return {
        "ranks": [min(ranks), max(ranks)],
        "effective_rank": round(statistics.fmean(effective), 4),
        "size": round(statistics.fmean(sizes), 5),
        "singular_values": [round(x, 5) for x in shares],
    }


def score(found: dict[str, Any], split: str) -> dict[str, Any]:
    values = {"bits_per_byte": bits_of(SETTINGS, found["model"], split)}
    if split == "test":
        values |= {"losses": found["losses"], "spectra": found["spectra"]}
    return values


def body(runs: Runs) -> None:
    searching = [method for method, how in METHODS.items() if "rate_of" not in how]
    runs.expect(2 + len(runs.seeds))
    base_runs(runs, SETTINGS)
    best = compete_all(runs, SETTINGS, searching, trained, score)
    rate = best[METHODS["merge"]["rate_of"]]
    at_rate(runs, "merge", rate, lambda *how: score(trained("merge", *how), "test"))


WITNESS = Witness(("stack/0.016/0/test",), {"bits_per_byte": 0.005}, chapter="2_2_progressive")
STUDY = Study("2_2_progressive", SETTINGS, body, WITNESS)
