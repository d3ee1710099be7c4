"""What nano reads: documents, their tokens, and the windows of a step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import Qwen2Tokenizer

ROOT = Path(__file__).resolve().parents[2]

TEXT = ROOT / "lora_course/data/text"
HOME = "glosses"
UNSEEN = ("bible", "shakespeare", "milton", "python")
CONTEXT = 256


def read(domain: str, split: str, folder: Path = TEXT) -> list[str]:
    """The documents of one split of a domain."""
    table = pq.read_table(folder / f"{domain}.parquet", filters=[("split", "=", split)])
    return table["text"].to_pylist()


def build_tokenizer(args: argparse.Namespace) -> None:
    """Train a byte-level BPE on a mix of all domains' train splits and the general text."""
    texts: list[str] = []
    for domain, megabytes in {HOME: 4.0, "general": 1.5, **dict.fromkeys(UNSEEN, 1.5)}.items():
        documents = read(domain, "train", args.general.parent if domain == "general" else TEXT)
        np.random.default_rng(0).shuffle(documents)
        sizes = np.cumsum([len(d.encode()) for d in documents])
        texts += documents[: int(np.searchsorted(sizes, megabytes * 1e6)) + 1]
    # Qwen2's own class, as AutoTokenizer loads any tokenizer of a Qwen2 model with it: its rule for splitting words, NFC.
    blank = Qwen2Tokenizer(model_max_length=1024, clean_up_tokenization_spaces=False)
    tokenizer = blank.train_new_from_iterator(texts, vocab_size=4096, show_progress=False)
    tokenizer.save_pretrained(args.work / "tokenizer")
    for domain in (HOME, *UNSEEN):
        sample = "".join(read(domain, "validation")[:5])
        print(
            f"{domain}: {len(sample.encode()) / len(tokenizer(sample)['input_ids']):.2f} bytes a token"
        )


def encode(tokenizer: Qwen2Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each document, each beginning with the end-of-text token."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [[tokenizer.eos_token_id, *document] for document in ids]


def pretraining_tokens(args: argparse.Namespace, tokenizer: Qwen2Tokenizer) -> np.ndarray:
    """All documents that nano is pretrained on, mixed and joined to one stream, `[tokens]`; kept in a file."""
    path = args.work / "tokens.npy"
    if not path.exists():
        rng = np.random.default_rng(0)
        documents = read("general", "train", args.general.parent)
        rng.shuffle(documents)
        sizes = np.cumsum([len(d.encode()) for d in documents])
        documents = documents[: int(np.searchsorted(sizes, args.general_megabytes * 1e6))] + read(
            HOME, "train"
        )
        rng.shuffle(documents)
        np.save(
            path,
            np.concatenate([np.array(d, dtype=np.uint16) for d in encode(tokenizer, documents)]),
        )
    return np.load(path)


def batch(tokens: np.ndarray, step: int, size: int) -> torch.Tensor:
    """The windows of a step, `[size, CONTEXT + 1]`.

    An epoch is a permutation of adjacent windows that start at a shift of their own, so that windows differ from epoch
    to epoch. All follows from the step's number: a resumed run reads on where it was.
    """
    windows = (len(tokens) - CONTEXT - 1) // CONTEXT
    steps = windows // size
    rng = np.random.default_rng(step // steps)
    shift, order = rng.integers(CONTEXT), rng.permutation(windows - 1)
    chosen = order[step % steps * size :][:size] * CONTEXT + shift
    return torch.from_numpy(
        np.stack([tokens[i : i + CONTEXT + 1] for i in chosen]).astype(np.int64)
    )


def excerpt(texts: Sequence[str], size: int) -> list[str]:
    """The first documents, as many as hold `size` bytes, or all."""
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return list(texts[: int(np.searchsorted(sizes, size)) + 1])
