"""The project of chapter 3.2: what a student learns from its teachers alone, on their text and on text that none of them has read.

Teachers, students, rows a step, steps, scoring and seeds 0 to 2 are those of the chapter's study, and so is the rate of its
student distilled by domain, which was searched at α = 0.5: an advantage of that arm. Text holds its own labels, the next
tokens; at α = 1 they are not used. "fresh" rows come from the training text that the study's rows leave out.

    fresh labels    as many fresh rows, without teachers
    fresh           teachers alone on the same fresh rows, each row's own teacher
    alpha 1         teachers alone, on the study's rows
    alpha 0         both parts of the loss as coded, with the teachers' share 0: seed 0 alone, a check of the code
    alpha 0.25, alpha 0.75    shares between, with each row's own teacher, on the study's rows

Expected, before the first run. "alpha 0" comes out as the record's "data alone", to rounding. "alpha 1" is within noise of the
record's 0.5. "fresh" is within noise of "alpha 1", since a teacher says what it learnt about any text of its domain, and it is
lower than "fresh labels", since a distribution over all tokens says more than one token; it is lower than the record's merged
teachers, too, or distillation without the teachers' text would not be worth its steps.

The shares 0.25 and 0.75 were added later, when the others had been seen. Expected of them, before they ran: each lies within
noise of 0.5, and 0.75 below 1.

Left out: more fresh rows; fresh rows of which nobody knows the domain.
"""

from __future__ import annotations

from typing import Any

import datasets
import torch

from lora_course import lab
from lora_course.distillation import DistillationConfig
from lora_course.experiments import ROUNDING, Runs, Study, Witness, rows_of, run_key, tokenizer_of
from lora_course.experiments import distillation as chapter
from lora_course.experiments import distillation_models as models

ARMS = ["fresh labels", "fresh", "alpha 1"]
SHARES = {"alpha 0.25": 0.25, "alpha 0.75": 0.75}
"""The teachers' share of the loss, of the arms that came later."""
SETTINGS: dict[str, Any] = models.SETTINGS | {"seeds": [0, 1, 2], "learning_rate": 1.6e-2}


def fresh_rows(domain: str) -> datasets.Dataset:
    """Rows of a domain's training text without what `rows_of` takes of it."""
    texts, size = lab.load_text(domain, "train"), SETTINGS["train_bytes"]
    taken = lab.excerpt(texts, size, piece=8192)  # as `rows_of` does
    begun = [next((head for head in taken if text.startswith(head)), "") for text in texts]
    rest = [text[len(head) :] for text, head in zip(texts, begun, strict=True)]
    left = lab.excerpt([text for text in rest if text], size, piece=8192)
    return lab.blocks(tokenizer_of(SETTINGS["model"]), left, SETTINGS["length"])


def counted() -> dict[str, Any]:
    """Rows of each domain that teachers read from, fresh ones, and how many are both."""

    def of(rows: datasets.Dataset) -> set[tuple[int, ...]]:
        return {tuple(row) for row in rows["input_ids"][:].tolist()}

    pairs = {d: (of(rows_of(SETTINGS, d)), of(fresh_rows(d))) for d in models.DOMAINS}
    return {
        "teachers": {d: len(read) for d, (read, _) in pairs.items()},
        "fresh": {d: len(new) for d, (_, new) in pairs.items()},
        "both": {d: len(read & new) for d, (read, new) in pairs.items()},
    }


def student(arm: str, rate: float, seed: int) -> dict[str, Any]:
    rows = models.mixed_rows(of=models.rows if arm == "alpha 1" else fresh_rows)
    if arm == "fresh labels":
        return chapter.trained_result(models.on_data(rate, seed, rows), "test")
    states, config = models.teacher_states(seed), DistillationConfig(alpha=1.0)
    own = torch.eye(len(states))
    return chapter.trained_result(
        models.distil(states, own, config, rate, seed, models.STEPS, rows), "test"
    )


def shared(alpha: float, rate: float, seed: int) -> dict[str, Any]:
    """Text and teachers together, on the study's rows."""
    found = models.distilled("by domain", rate, seed, alpha=alpha)
    return chapter.trained_result(found, "test")


def body(runs: Runs) -> None:
    rate = SETTINGS["learning_rate"]
    runs.expect(2 + (len(ARMS) + len(SHARES)) * len(runs.seeds))
    runs("rows", counted)
    for seed in runs.seeds:
        for arm in ARMS:
            runs(run_key(arm, rate, seed, "test"), student, arm, rate, seed)
    runs(run_key("alpha 0", rate, 0, "test"), shared, 0.0, rate, 0)
    for seed in runs.seeds:
        for arm, alpha in SHARES.items():
            runs(run_key(arm, rate, seed, "test"), shared, alpha, rate, seed)


WITNESS = Witness(
    ("fresh labels/0.016/0/test",),
    {"bits_per_byte": 0.005},
    ROUNDING + "; the one arm that needs no teachers, whose trainings take most of a minute",
)
STUDY = Study("3_2_project", SETTINGS, body, WITNESS)
