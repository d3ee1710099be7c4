"""The recorded studies: one file each, named after its chapter's system, and what they are all made of.

    lora-course study list                    what there is: runs, dates, whether the record was verified
    lora-course study run 1_2_adalora         computes what the record lacks; stopped, the same command goes on
    lora-course study verify 1_2_adalora      runs its witness again, compares, and notes it in the record

A study is written like this, in `lora_course/experiments/ranks.py`, with its name in `NAMES` below:

    SETTINGS = {
        "model": "nano", "domain": "shakespeare", "steps": 60, "batch": 8, "length": 128, "train_bytes": 1_000_000,
        "score_bytes": {"validation": 20_000, "test": 40_000}, "seeds": [0, 1, 2, 3, 4], "search_seeds": [0, 1],
        "first": [4e-3, 8e-3, 1.6e-2], "ranks": {"r8": 8, "r64": 64},
    }

    def make(arm: str, seed: int) -> Arm:
        return Arm(adapted(SETTINGS, seed, config_of(SETTINGS["ranks"][arm])))

    def trained(arm: str, rate: float, seed: int) -> Trained:
        return train(make(arm, seed), rows_of(SETTINGS), rate, seed, SETTINGS["steps"], SETTINGS["batch"])

    def score(found: Trained, split: str) -> dict[str, Any]:
        result = {"bits_per_byte": bits_of(SETTINGS, found.model, split), "parameters": found.arm.parameters(found.model)}
        return result | {"losses": found.curve} if split == "test" else result

    def body(runs: Runs) -> None:
        arms = runs.arms(list(SETTINGS["ranks"]))
        runs.expect(1 + len(arms) * (3 * 2 + len(runs.seeds)))
        runs("base/test", base_score, SETTINGS, "test")
        for arm in arms:
            compete(runs, arm, Kept(trained, arm), score, SETTINGS["first"], SETTINGS["search_seeds"], agree=2)

    WITNESS = Witness(("r8/0.008/0/test",), {"bits_per_byte": 5e-3, "parameters": 0}, ROUNDING)
    STUDY = Study("0_2_ranks", "LoRA of two ranks", SETTINGS, body, WITNESS)

A task that is scored otherwise differs in `rows` (any dataset of `input_ids` and `labels`) and in `score`, whose dictionary
may hold anything that JSON can; `compete(…, value=lambda run: -run["accuracy"])` chooses the rate by a number that is to be
high. Whatever is no training is a run too: `runs("cost/nano", measure)`. `adapted`, `rows_of` and `bits_of` take the base from
`settings["model"]`: "nano" or "smol". More seeds are more runs and nothing else: `lora-course study run NAME --seeds 3 4`.
"""

from __future__ import annotations

import importlib

from lora_course.experiments.arms import (
    Arm,
    Kept,
    Trained,
    adapted,
    base_of,
    base_score,
    bits_of,
    compete,
    config_of,
    rows_of,
    run_key,
    search,
    tokenizer_of,
    train,
)
from lora_course.experiments.record import Record
from lora_course.experiments.study import ROUNDING, Runs, Study, Witness

NAMES = {
    "0_1_lora": "lora",
    "1_1_formats": "formats",
    "1_1_qlora": "qlora",
    "1_2_adalora": "adalora",
    "2_1_experts": "experts",
    "2_2_progressive": "progressive",
    "3_1_adaptive": "adaptive",
    "3_1_controls": "adaptive_controls",
    "3_2_distillation": "distillation",
    "3_2_merge": "distillation_merge",
    "3_3_continual": "continual",
    "4_1_sparse": "sparse",
    "4_2_hierarchical": "hierarchical",
    "4_3_quantized": "quantized",
    "4_4_fused": "fused",
    "5_1_comparison": "comparison",
    "5_1_longer": "longer",
    "5_1_neighbours": "neighbours",
    "smol_past": "smol_past",
    "smol_several": "smol_several",
    "tasks_nano": "tasks_nano",
}
"""The file in this folder that holds a study, by the name of its record."""

UNDER_WAY = ("5_1_longer", "5_1_neighbours", "smol_past", "smol_several", "tasks_nano")
"""Studies whose records are still to be completed: what is there is whole, and a chapter that reads one says what is missing."""


def get(name: str) -> Study:
    """A study by the name of its record ("1_2_adalora") or of its file ("adalora"). Raises ValueError for an unknown one."""
    by_file = {file: study for study, file in NAMES.items()}
    full = name if name in NAMES else by_file.get(name)
    if full is None:
        raise ValueError(f"study {name!r} is unknown; there are {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{NAMES[full]}").STUDY


__all__ = [
    "NAMES",
    "ROUNDING",
    "UNDER_WAY",
    "Arm",
    "Kept",
    "Record",
    "Runs",
    "Study",
    "Trained",
    "Witness",
    "adapted",
    "base_of",
    "base_score",
    "bits_of",
    "compete",
    "config_of",
    "get",
    "rows_of",
    "run_key",
    "search",
    "tokenizer_of",
    "train",
]
