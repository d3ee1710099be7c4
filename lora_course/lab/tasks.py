"""Tasks with right answers: words in, a word out, scored by what the model writes.

A task's data is a table of words with their families; no family is in two splits (see `data/tasks/README.md`). A model
without a chat template gets `past: walk ->` and writes ` walked`, where a task goes by letters `pronunciation: c a t ->`; a
chat model gets an instruction as system message and the word as user message. Only the answer and the token that ends it are trained and scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_course.lab.corpora import SPLITS
from lora_course.lab.models import as_asked, document_start, embedding_of, evaluating

QUESTION = "<question>"  # stands for it while a chat template is filled in
DATA = Path(__file__).resolve().parents[1] / "data" / "tasks"


@dataclass(frozen=True)
class Task:
    """A question about words.

    table: the Parquet file. question: the columns that are shown. answer: the column that is trained.
    others: the column of other right answers, or None. instruction: a chat model's system message.
    unit: what errors are counted in: letters, or phonemes, which spaces separate.
    apart: whether the letters of the question are set apart (c a t): a small model does not know how its tokens are spelled.
    meaning: what a score says, in a sentence.
    """

    table: str
    question: tuple[str, ...]
    answer: str
    others: str | None
    instruction: str
    unit: str
    meaning: str
    apart: bool = False


TASKS = {
    "past": Task(
        "verbs", ("word",), "past", "other_pasts",
        "Give the past tense of the English verb.", "letter",
        "Of 100 verbs of families that were not trained on, this many get a past tense that a dictionary has; "
        "a rule of three lines gets most of them, so only what is above it is more than adding -ed.",
    ),
    "plural": Task(
        "nouns", ("word", "gender"), "plural", "other_plurals",
        "Give the plural of the German noun.", "letter",
        "Of 100 German nouns that are no compounds of trained ones, this many get a plural that Wiktionary has.",
    ),
    "genitive": Task(
        "nouns", ("word", "gender"), "genitive", "other_genitives",
        "Give the genitive singular of the German noun.", "letter",
        "Of 100 German nouns that are no compounds of trained ones, this many get a genitive that Wiktionary has.",
    ),
    "gender": Task(
        "nouns", ("word",), "gender", None,
        "Give the gender of the German noun: m, f or n.", "letter",
        "Of 100 German nouns that are no compounds of trained ones, this many get their gender; always naming the "
        "commonest gets about 40.",
    ),
    "pronunciation": Task(
        "pronunciation", ("word",), "phonemes", "other_phonemes",
        "Give the phonemes of the English word.", "phoneme",
        "Of 100 English words of families that were not trained on, this many are pronounced right from the first "
        "to the last phoneme; the error rate says how many of 100 phonemes are wrong, missing or too many.",
        apart=True,
    ),
    "spelling": Task(
        "pronunciation", ("phonemes",), "word", "homophones",
        "Give the spelling of the English word with these phonemes.", "letter",
        "Of 100 English words of families that were not trained on, this many are spelled right from their sound.",
    ),
}  # fmt: skip


def task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; there are {', '.join(TASKS)}")
    return TASKS[name]


def load_task(name: str, split: str) -> datasets.Dataset:
    """One split of a task, in the file's order, which is random: the first n rows are a sample.

    Returns a dataset with `question`, `answer` (what is trained), `accepted` (all right answers) and the table's own
    columns. Raises ValueError for an unknown task or split, listing what there is.
    """
    chosen = task(name)
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist; there are {', '.join(SPLITS)}")
    path = DATA / f"{chosen.table}.parquet"
    rows = pyarrow.parquet.read_table(path, filters=[("split", "=", split)]).to_pylist()
    for row in rows:
        first, *rest = (row[column] for column in chosen.question)
        row["question"] = first + "".join(f" ({value})" for value in rest)
        row["accepted"] = [row[chosen.answer], *(row[chosen.others] if chosen.others else [])]
        row["answer"] = row[chosen.answer]
    return datasets.Dataset.from_list(rows)


# Rows for training ----------------------------------------------------------------------------------------------------


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, name: str, questions: Sequence[str]
) -> list[list[int]]:
    """Tokens before each answer: the tokenizer's chat template with the task's instruction, or `name: question ->`."""
    asked = [" ".join(question) for question in questions] if task(name).apart else questions
    texts = [f"{name}: {question} ->" for question in asked]
    start = [document_start(tokenizer)]
    if tokenizer.chat_template:
        messages = [
            {"role": "system", "content": task(name).instruction},
            {"role": "user", "content": QUESTION},
        ]
        form = str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )
        texts, start = [form.replace(QUESTION, question) for question in questions], []
    return [start + ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def answer_ids(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """Tokens of each answer and the one that ends it."""
    texts = [answer if tokenizer.chat_template else f" {answer}" for answer in answers]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def task_rows(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    examples: datasets.Dataset,
    length: int | None = None,
) -> datasets.Dataset:
    """Examples as training rows of one length: `input_ids`, `attention_mask` and `labels` [rows, length], which are −100
    at prompt and padding, so that the loss is that of the answers. Padding stands at the end.

    length: leave out examples of more tokens; by default that of the longest. Raises ValueError where none is left.
    """
    prompts = prompt_ids(tokenizer, name, examples["question"][:])
    pairs = list(zip(prompts, answer_ids(tokenizer, examples["answer"][:])))
    sizes = [len(prompt) + len(answer) for prompt, answer in pairs]
    kept = [pair for pair, size in zip(pairs, sizes) if length is None or size <= length]
    if not kept:
        raise ValueError(f"length={length}: all rows are longer; the shortest has {min(sizes)}")
    longest = length or max(sizes)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in kept:
        used = len(prompt) + len(answer)
        padding = longest - used
        rows["input_ids"].append([*prompt, *answer, *[tokenizer.eos_token_id] * padding])
        rows["attention_mask"].append([1] * used + [0] * padding)
        rows["labels"].append([-100] * len(prompt) + answer + [-100] * padding)
    return datasets.Dataset.from_dict(rows).with_format("torch")


# What the model writes ------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    questions: Sequence[str],
    batch: int = 64,
    max_new_tokens: int = 40,
) -> list[str]:
    """The model's answers, greedily, up to the end token or `max_new_tokens`. Prompts of a batch are padded on the left."""
    prompts = prompt_ids(tokenizer, name, list(questions))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    end, device = tokenizer.eos_token_id, embedding_of(model).device
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end, use_cache=True
    )  # fmt: skip
    answers = [""] * len(prompts)
    with evaluating(model), as_asked(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            width = max(len(prompts[i]) for i in chosen)
            padding = [width - len(prompts[i]) for i in chosen]
            ids = [[end] * pad + prompts[i] for i, pad in zip(chosen, padding)]
            mask = [[0] * pad + [1] * (width - pad) for pad in padding]
            written = model.generate(  # type: ignore[operator]  # a method of transformers' models
                torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
            )[:, width:]
            for i, text in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True)):
                answers[i] = text.strip()
    return answers


@torch.no_grad()
def bits_per_answer_token(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, batch: int = 64
) -> float:
    """−Σ log₂ p(token | all before it) / tokens over the answers of `task_rows`, their end tokens included."""
    nats, tokens = 0.0, 0
    device = embedding_of(model).device
    with evaluating(model):
        for part in rows.iter(batch):
            labels = part["labels"][:, 1:].to(device)
            logits = model(
                input_ids=part["input_ids"].to(device),
                attention_mask=part["attention_mask"].to(device),
                use_cache=False,
            ).logits[:, :-1]
            scored = labels != -100
            nats += F.cross_entropy(logits[scored].float(), labels[scored], reduction="sum").item()
            tokens += int(scored.sum())
    return nats / math.log(2) / tokens


# Scores ---------------------------------------------------------------------------------------------------------------


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """The smallest number of units to replace, delete or insert that makes `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def grade(name: str, answers: Sequence[str], examples: datasets.Dataset) -> dict[str, Any]:
    """Scores of answers against all that is accepted.

    Returns `exact` (share of answers that are right), `error_rate` (Σ edit distances to the nearest right answer / Σ units
    in these) and `right` (a 1 or 0 for each example, as a string, so that two models can be compared word by word).
    Raises ValueError where there is not one answer for each example.
    """
    if len(answers) != len(examples):
        raise ValueError(f"{len(answers)} answers for {len(examples)} examples: give one for each")
    units = str.split if task(name).unit == "phoneme" else list
    right, wrong, total = "", 0, 0
    for answer, accepted in zip(answers, examples["accepted"]):
        distance, size = min(
            (edit_distance(units(answer), units(form)), len(units(form))) for form in accepted
        )
        right += str(int(answer in accepted))
        wrong, total = wrong + distance, total + size
    return {"exact": right.count("1") / len(right), "error_rate": wrong / total, "right": right}
