"""Bits per byte: of a model, and of two baselines that are no neural networks."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Qwen2Tokenizer

from tools.nano.text import CONTEXT, encode


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module, tokenizer: Qwen2Tokenizer, texts: Sequence[str], rows: int = 16
) -> float:
    """Bits per byte of documents: their tokens' summed negative log-likelihood in bits over their bytes of UTF-8.

    Each document is preceded by the end-of-text token, so that all of its tokens are scored, each once, in adjacent windows
    of 256 tokens; a window's first input is the token before it.
    """
    was_training = model.training
    model.eval()
    windows = [
        d[i : i + CONTEXT + 1]
        for d in encode(tokenizer, texts)
        for i in range(0, len(d) - 1, CONTEXT)
    ]
    windows.sort(key=len)
    nats = 0.0
    for start in range(0, len(windows), rows):
        chunk = windows[start : start + rows]
        width = max(map(len, chunk))
        ids = torch.tensor([w + [-100] * (width - len(w)) for w in chunk])
        logits = model(input_ids=ids[:, :-1].clamp(min=0)).logits.float()
        nats += F.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
    model.train(was_training)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def xz_bits(train: bytes, test: bytes) -> float:
    """Bits per byte that `xz -9` needs for the test part when it has seen the training part."""
    sizes = [len(lzma.compress(data, preset=9)) for data in (train, train + test)]
    return 8 * (sizes[1] - sizes[0]) / len(test)


def order_n_bits(train: bytes, test: bytes, order: int = 5) -> float:
    """Bits per byte of a byte model of the given order, trained on `train`, interpolated by Witten and Bell's rule.

    p_k(c | h) = (count(h, c) + t(h) p_{k-1}(c | h)) / (count(h) + t(h)), where `h` is the last k bytes, t(h) the number of
    different bytes seen after it, and p_{-1} = 1/256.
    """

    def contexts(data: bytes, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The last k bytes before each byte, and that byte behind them, as numbers."""
        codes = np.frombuffer(b"\0" * order + data, dtype=np.uint8).astype(np.uint64)
        before = np.zeros(len(data), dtype=np.uint64)
        for i in range(k):
            before = before << np.uint64(8) | codes[order - k + i : order - k + i + len(data)]
        return before, before << np.uint64(8) | codes[order:]

    def look_up(keys: np.ndarray, table: np.ndarray, values: np.ndarray) -> np.ndarray:
        at = np.searchsorted(table, keys).clip(max=len(table) - 1)
        return np.where(table[at] == keys, values[at], 0)

    p = np.full(len(test), 1 / 256)
    for k in range(order + 1):
        pairs, counts = np.unique(contexts(train, k)[1], return_counts=True)
        seen, first, different = np.unique(
            pairs >> np.uint64(8), return_index=True, return_counts=True
        )
        totals = np.add.reduceat(counts, first)
        before, with_byte = contexts(test, k)
        count, total, t = (
            look_up(with_byte, pairs, counts),
            look_up(before, seen, totals),
            look_up(before, seen, different),
        )
        p = np.where(total > 0, (count + t * p) / np.maximum(total + t, 1), p)
    return float(-np.log2(p).mean())
