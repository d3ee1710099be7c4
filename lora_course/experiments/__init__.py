"""The recorded studies: one file each, named after its chapter's system, and what they are all made of.

    lora-course study list                    what there is: runs, dates, whether the record was verified
    lora-course study run 1_2_adalora         computes what the record lacks; stopped, the same command goes on
    lora-course study verify 1_2_adalora      runs its witness again, compares, and notes it in the record

A study is written like this, in `lora_course/experiments/ranks.py`, with its name in `NAMES` and `TITLES` below:

    SETTINGS = NANO | {
        "steps": 60, "batch": 8, "score_bytes": {"validation": 20_000, "test": 40_000}, "search_seeds": [0, 1],
        "first": [4e-3, 8e-3, 1.6e-2], "ranks": {"r8": 8, "r64": 64},
    }

    def trained(arm: str, rate: float, seed: int) -> Trained:
        model = adapted(SETTINGS, seed, config_of(SETTINGS["ranks"][arm]))
        return train_as(SETTINGS, Arm(model), rate, seed)

    def score(found: Trained, split: str) -> dict[str, Any]:
        return values_of(SETTINGS, found, split)

    def body(runs: Runs) -> None:
        arms = runs.arms(list(SETTINGS["ranks"]))
        runs.expect(1)
        runs("base/test", base_score, SETTINGS, "test")
        compete_all(runs, SETTINGS, arms, trained, score)

    WITNESS = Witness(("r8/0.008/0/test",), {"bits_per_byte": 5e-3, "parameters": 0})
    STUDY = Study("0_2_ranks", SETTINGS, body, WITNESS)

`NANO` is what most settings share: nano, one text, 128 tokens, five seeds. `compete_all` searches each arm's rate with the
search seeds, from the settings' `first`, and tests the chosen one with all seeds; an arm that scores in a way of its own calls
`compete`, and a control that takes another arm's rate `at_rate`.
`train_as` trains on the domain of the settings, for their steps and at their batch size. A task of other rows calls `train` with
its own dataset of `input_ids` and `labels`; one that is scored otherwise differs in `score`, whose dictionary may hold anything
that JSON can; `compete(…, value=lambda run: -run["accuracy"])` chooses the rate by a number that is to be
high. Whatever is no training is a run too: `runs("cost/nano", measure)`. `adapted`, `rows_of` and `bits_of` take the base from
`settings["model"]`: "nano" or "smol". More seeds are more runs and nothing else: `lora-course study run NAME --seeds 3 4`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_course.experiments import listing

if TYPE_CHECKING:
    from lora_course.experiments.arms import (
        NANO,
        Arm,
        Trained,
        adapted,
        base_of,
        base_runs,
        base_score,
        bits_by_domain,
        bits_of,
        config_of,
        file_bytes,
        rows_of,
        tokenizer_of,
        train,
        train_as,
        values_of,
    )
    from lora_course.experiments.rates import (
        Kept,
        at_rate,
        choose,
        compete,
        compete_all,
        run_key,
        search,
    )
    from lora_course.experiments.record import Record
    from lora_course.experiments.study import ROUNDING, Runs, Study, Witness

# Imported when they are first used, as torch takes seconds: to list the studies needs their records alone.
_HOME_OF = {
    **dict.fromkeys(
        ("Kept", "at_rate", "choose", "compete", "compete_all", "run_key", "search"), "rates"
    ),
    **dict.fromkeys(("Record",), "record"),
    **dict.fromkeys(("ROUNDING", "Runs", "Study", "Witness"), "study"),
}
NAMES = {
    "0_1_lora": "lora",
    "0_1_project": "projects.other_zero",
    "1_1_formats": "formats",
    "1_1_qlora": "qlora",
    "1_1_project": "projects.codebook",
    "1_2_adalora": "adalora",
    "1_2_project": "projects.parameters_kept",
    "2_1_experts": "experts",
    "2_1_project": "projects.fifth_domain",
    "2_2_progressive": "progressive",
    "2_2_project": "projects.stages",
    "3_1_adaptive": "adaptive",
    "3_1_controls": "adaptive_controls",
    "3_1_project": "projects.chance",
    "3_2_distillation": "distillation",
    "3_2_larger": "distillation_larger",
    "3_2_merge": "distillation_merge",
    "3_2_project": "projects.without_labels",
    "3_3_continual": "continual",
    "3_3_project": "projects.ties_scale",
    "4_1_sparse": "sparse",
    "4_1_project": "projects.gates_that_choose",
    "4_2_hierarchical": "hierarchical",
    "4_2_project": "projects.last_block",
    "4_3_base": "quantized_base",
    "4_3_quantized": "quantized",
    "4_3_served": "quantized_served",
    "4_3_project": "projects.bits_by_component",
    "4_4_fused": "fused",
    "4_4_project": "projects.whole_mlp",
    "5_1_comparison": "comparison",
    "5_1_costs": "neighbours_costs",
    "5_1_longer": "longer",
    "5_1_neighbours": "neighbours",
    "smol_past": "smol_past",
    "smol_several": "smol_several",
    "tasks_nano": "tasks_nano",
}
"""The file in this folder that holds a study, by the name of its record."""

TITLES = {
    "0_1_lora": "LoRA by target, rank and scale, and full fine-tuning",
    "0_1_project": "The project of 0.1: A = 0 and a random B, against the usual start",
    "1_1_formats": "Which weights' rounding costs SmolLM2 its perplexity",
    "1_1_qlora": "QLoRA against LoRA, and the ways to merge it",
    "1_1_project": "The project of 1.1: a codebook fitted to SmolLM2's weights, against NF4",
    "1_2_adalora": "AdaLoRA against LoRA of the same budget; what chooses the triplets",
    "1_2_project": "The project of 1.2: triplets charged what they cost, against AdaLoRA",
    "2_1_experts": "Experts of four domains and their mixture against one LoRA",
    "2_1_project": "The project of 2.1: three experts mixed, on a text that is none of theirs",
    "2_2_progressive": "Four short stages against one LoRA, and restarts alone",
    "2_2_project": "The project of 2.2: rates in full in each stage, and stages that are not alike",
    "3_1_adaptive": "Ranks that grow, against uniform, final and pruned ones",
    "3_1_controls": "A rank that stays small, and growth at random places",
    "3_1_project": "The project of 3.1: growth by score and by lot under a cap on the ranks",
    "3_2_distillation": "Four teachers into one student, and other ways to make one of four",
    "3_2_larger": "A larger teacher, raw and fine-tuned, and a smaller student",
    "3_2_merge": "Merged teachers at smaller weights, and a short distillation",
    "3_2_project": "The project of 3.2: a student of teachers alone, on their text and on text they never read",
    "3_3_continual": "Four domains one after another, and their adapters merged",
    "3_3_project": "The project of 3.3: TIES and the mean of updates, each at a scale of its own",
    "4_1_sparse": "Gates, masked factors and a mask on ΔW against LoRA",
    "4_1_project": "The project of 4.1: gates that start alike, and the ranks that they leave",
    "4_2_hierarchical": "One adapter at four ranks against one for each",
    "4_2_project": "The project of 4.2: truncation that trains the last block of rows alone",
    "4_3_base": "An adapter trained on the base as it is, put on the base in 4 bits",
    "4_3_quantized": "Factors in few bits, trained so or quantised afterwards",
    "4_3_served": "LoRA where the model is served in int4: merged, beside, trained on it, trained with the rounding",
    "4_3_project": "The project of 4.3: more bits for an adapter's first components",
    "4_4_fused": "What fusing, merging and batching save in memory and time",
    "4_4_project": "The project of 4.4: a block's whole MLP as one function",
    "5_1_comparison": "Eleven methods side by side on two domains",
    "5_1_costs": "What a step of PEFT's neighbours of LoRA costs beside LoRA's: bytes and time",
    "5_1_longer": "Methods that take time, after 100 and 320 steps",
    "5_1_neighbours": "PEFT's neighbours of LoRA under the comparison's rule, and LoRA turned down",
    "smol_past": "SmolLM2-135M learns the past of English verbs: each chapter's method against LoRA",
    "smol_several": "SmolLM2-135M on two tasks: experts, merging, distillation, continual learning",
    "tasks_nano": "nano learns to pronounce, and to form plurals and pasts: LoRA beside rules and tables",
}
"""What a study is about, in one line, by the name of its record."""

UNDER_WAY: tuple[str, ...] = ()
"""Studies whose records are still to be completed: what is there is whole, and a chapter that reads one says what is missing."""


def get(name: str) -> Study:
    """A study by the name of its record ("1_2_adalora") or of its file ("adalora"). Raises ValueError for an unknown one."""
    by_file = {file: study for study, file in NAMES.items()}
    full = name if name in NAMES else by_file.get(name)
    if full is None:
        raise ValueError(f"study {name!r} is unknown; there are {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{NAMES[full]}").STUDY


def summary(name: str, path: Path | None = None) -> str:
    """One line: a study, the runs of its record (by default the course's own), and when they were made and verified."""
    return listing.summary(name, TITLES[name], path)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_HOME_OF.get(name, 'arms')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "NAMES",
    "NANO",
    "ROUNDING",
    "TITLES",
    "UNDER_WAY",
    "Arm",
    "Kept",
    "Record",
    "Runs",
    "Study",
    "Trained",
    "Witness",
    "adapted",
    "at_rate",
    "base_of",
    "base_runs",
    "base_score",
    "bits_by_domain",
    "bits_of",
    "choose",
    "compete",
    "compete_all",
    "config_of",
    "file_bytes",
    "get",
    "rows_of",
    "run_key",
    "search",
    "summary",
    "tokenizer_of",
    "train",
    "train_as",
    "values_of",
]
