"""The course's text: five domains as Parquet files, packed into blocks for training and scored in bits per byte."""

import math
from pathlib import Path

import datasets
import pandas
import pyarrow.parquet
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lora_course.lab.models import document_start, embedding_of, evaluating

TEXT = Path(__file__).resolve().parents[1] / "data" / "text"
DOMAINS = ("glosses", "bible", "shakespeare", "milton", "python")
SPLITS = ("train", "validation", "test")
LOGITS_AT_ONCE = 2**25  # numbers in one batch of logits: 128 MiB in fp32

# With ipywidgets installed these bars become widgets whose scripts come from the network.
datasets.disable_progress_bars()


def load_documents(domain: str, split: str) -> datasets.Dataset:
    """The documents of one split as a dataset with the columns `source` and `text`, in the file's order.

    Nothing is written to the cache of `datasets`. Raises ValueError for an unknown domain or split, listing what there is.
    """
    if domain not in DOMAINS:
        raise ValueError(
            f"domain={domain!r} is not in the course's text; there are {', '.join(DOMAINS)}"
        )
    if split not in SPLITS:
        raise ValueError(
            f"split={split!r} of {domain} does not exist; there are {', '.join(SPLITS)}"
        )
    table = pyarrow.parquet.read_table(
        TEXT / f"{domain}.parquet", columns=["source", "text"], filters=[("split", "=", split)]
    )
    return datasets.Dataset(table)


def load_text(domain: str, split: str) -> list[str]:
    """The documents of one split as strings (see `load_documents`)."""
    return load_documents(domain, split)["text"][:]


def describe() -> pandas.DataFrame:
    """How many documents and bytes (UTF-8) each split of each domain holds, and how the first training document starts."""
    rows = {}
    for domain in DOMAINS:
        row: dict[str, object] = {}
        for split in SPLITS:
            texts = load_text(domain, split)
            row[f"{split}: documents"] = len(texts)
            row[f"{split}: kB"] = round(sum(len(text.encode()) for text in texts) / 1000)
            if split == "train":
                row["starts with"] = " ".join(texts[0][:60].split()) + " …"
        rows[domain] = row
    table = pandas.DataFrame.from_dict(rows, orient="index")
    return table[[column for column in table.columns if column != "starts with"] + ["starts with"]]


def excerpt(texts: list[str], max_bytes: int, piece: int = 2048) -> list[str]:
    """An even sample of at most `max_bytes` bytes: the starts of documents spread over the whole list.

    About `max_bytes / piece` documents are taken at equal distances, each cut to an equal share between two characters.
    The same arguments give the same sample.
    """
    check_texts(texts)
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: expected a positive number of bytes")
    count = min(len(texts), max(1, max_bytes // piece))
    chosen = [texts[i * len(texts) // count] for i in range(count)]
    return [text.encode()[: max_bytes // count].decode(errors="ignore") for text in chosen]


def check_texts(texts: object) -> None:
    """Raise TypeError for one string, whose characters would count as documents."""
    if isinstance(texts, str):
        raise TypeError(
            f"texts is one string of {len(texts)} characters, each of which would be a document: give a list, [text]."
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each document with the start token before it."""
    start = document_start(tokenizer)
    # verbose=False: documents longer than the model's window are cut into windows later, so its warning does not apply.
    encoded = (
        tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        if texts
        else []
    )
    return [[start, *ids] for ids in encoded]


def blocks(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> datasets.Dataset:
    """Documents, each after a start token, joined in the given order and cut into rows of `length` tokens.

    Returns a dataset with `input_ids` and `labels` (equal; the model shifts them), both [rows, length] as torch tensors.
    What is left over at the end, fewer than `length` tokens, is dropped. Raises ValueError when not one row is filled.
    """
    check_texts(texts)
    if length < 1:
        raise ValueError(f"length={length}: a row has one token or more")
    stream = torch.tensor([token for ids in _tokens(tokenizer, texts) for token in ids])
    rows = len(stream) // length
    if rows == 0:
        raise ValueError(
            f"{len(texts)} documents hold {len(stream)} tokens, fewer than one block of length={length}: "
            "give more text or a smaller length"
        )
    ids = stream[: rows * length].reshape(rows, length).numpy()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    context: int = 256,
    max_bytes: int | None = None,
) -> float:
    """Bits the model needs for each UTF-8 byte of the texts: −Σ log₂ p(token | the tokens before it in its window) / bytes.

    A start token stands before each document, so that all its tokens are scored, each once. A document is scored in
    windows of `context` tokens that don't overlap; a window's first input is the token before it. Bytes, unlike tokens,
    mean the same for every tokenizer. `max_bytes` scores `excerpt(texts, max_bytes)` instead.
    The model's train or eval mode is left as it was. Raises ValueError when there is no text.
    """
    check_texts(texts)
    if context < 1:
        raise ValueError(f"context={context}: a window has one token or more")
    if max_bytes is not None:
        texts = excerpt(texts, max_bytes)
    byte_count = sum(len(text.encode()) for text in texts)
    if byte_count == 0:
        raise ValueError("bits_per_byte needs text: the documents given hold no byte")
    windows = []
    for ids in _tokens(tokenizer, texts):
        windows += [torch.tensor(ids[i : i + context + 1]) for i in range(0, len(ids) - 1, context)]
    windows.sort(key=len, reverse=True)
    batch = max(1, LOGITS_AT_ONCE // (len(embedding_of(model)) * context))
    device = embedding_of(model).device
    nats = 0.0
    with evaluating(model):
        for i in range(0, len(windows), batch):
            # Padding comes last and attention is causal, so no scored token can see it: no mask is needed.
            rows = nn.utils.rnn.pad_sequence(
                windows[i : i + batch], batch_first=True, padding_value=-100
            ).to(device)
            logits = model(input_ids=rows[:, :-1].clamp(min=0), use_cache=False).logits
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(),
                rows[:, 1:].flatten(),
                ignore_index=-100,
                reduction="none",
            )
            nats += losses.double().sum().item()
    return nats / math.log(2) / byte_count
