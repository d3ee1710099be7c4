"""Tasks in a study: the training rows of a seed, and what an adapter's answers are worth."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import datasets
import torch
from torch import nn

from lora_course import lab
from lora_course.experiments.arms import tokenizer_of
from lora_course.lab import tasks
from lora_course.training import compute_dtype

SAMPLE = 12  # answers that a record keeps as they were written


def task_rows_of(settings: Mapping[str, Any], name: str, seed: int) -> datasets.Dataset:
    """The rows of all steps in the order of a seed, of `settings["length"]` tokens at most; to be read in this order."""
    rows = _rows(settings["model"], name, settings["length"]).shuffle(seed=seed)
    wanted = settings["steps"] * settings["batch"]
    return rows.select([i % len(rows) for i in range(wanted)])


@functools.cache
def _rows(model: str, name: str, length: int) -> datasets.Dataset:
    return tasks.task_rows(tokenizer_of(model), name, tasks.load_task(name, "train"), length)


def as_trained() -> AbstractContextManager:
    """Matrix products as in training: on a CPU in `compute_dtype`, which is bf16 where that is fast."""
    dtype = compute_dtype("cpu")
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def answer_bits(settings: Mapping[str, Any], name: str, model: nn.Module, split: str) -> float:
    """Bits an answer token on the first `settings["words"][split]` words of a split."""
    tokenizer = tokenizer_of(settings["model"])
    examples = tasks.load_task(name, split)
    examples = examples.select(range(min(len(examples), settings["words"][split])))
    with as_trained():
        return tasks.bits_per_answer_token(
            model, tokenizer, tasks.task_rows(tokenizer, name, examples)
        )


def task_score(settings: Mapping[str, Any], name: str, model: nn.Module) -> dict[str, Any]:
    """On test words: `exact`, `error_rate` and `right` as `lab.tasks.grade` has them, `bits_per_token`, and a sample of what
    was written. Of verbs also the share of irregular ones that is right."""
    tokenizer = tokenizer_of(settings["model"])
    examples = tasks.load_task(name, "test")
    examples = examples.select(range(min(len(examples), settings["words"]["test"])))
    with as_trained():
        answers = tasks.write_answers(
            model, tokenizer, name, examples["question"], max_new_tokens=settings["new_tokens"]
        )
    found = tasks.grade(name, answers, examples)
    if "regular" in examples.column_names:
        irregular = [
            int(right) for right, regular in zip(found["right"], examples["regular"]) if not regular
        ]
        found["irregular"] = sum(irregular) / len(irregular)
    found["bits_per_token"] = answer_bits(settings, name, model, "test")
    sample = zip(examples["question"][:SAMPLE], answers)
    return found | {"sample": [f"{question}: {answer}" for question, answer in sample]}


def own_text_bits(settings: Mapping[str, Any], model: nn.Module) -> float:
    """Bits a byte on English text that no task has: what is forgotten is the difference to the base."""
    texts = lab.load_text(settings["own_text"], "test")
    with as_trained():
        return lab.bits_per_byte(
            model, tokenizer_of(settings["model"]), texts, max_bytes=settings["own_bytes"]
        )
