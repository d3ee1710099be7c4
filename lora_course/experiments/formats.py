"""The study of chapter 1.1 on number formats: which weights' rounding costs SmolLM2 its perplexity.

For int4, FP4 and NF4 in blocks of 64: all linear weights rounded; all rounded, with the signs of the errors drawn anew; and
only those rounded whose magnitude, over the largest of their block, lies in one of four bins; and NF4 with double
quantisation. Per run: the squared error over Σ w², and the loss (nats a token) on each of ten windows of 512 tokens, spread
evenly over each of five texts.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_course import lab
from lora_course.experiments import Runs, Study, Witness

SETTINGS: dict[str, Any] = {
    "model": "smol", "formats": ["int4", "fp4", "nf4"], "edges": [0, 0.15, 0.45, 0.75, 1.0], "tokens": 512, "windows": 10,
    "draws": 3, "texts": ["glosses", "bible", "shakespeare", "milton", "python"],
}  # fmt: skip


def roundtrip(weight: Tensor, kind: str) -> Tensor:
    """The nearest weight that a format can represent, `[out, in]`."""
    if kind != "int4":
        how: dict[str, Any] = {
            "quant_type": kind[:3],
            "compress_statistics": kind.endswith("double"),
        }
        packed = bnb.functional.quantize_4bit(weight, blocksize=64, **how)
        return bnb.functional.dequantize_4bit(*packed)
    blocks, largest = blocks_of(weight)
    return (torch.round(blocks / (largest / 7)) * (largest / 7)).reshape(weight.shape)


def blocks_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of a weight, `[blocks, 64]`, and the largest |w| of each, `[blocks, 1]`."""
    blocks = weight.reshape(-1, 64)
    return blocks, blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)


def windows(tokenizer: PreTrainedTokenizerBase, domain: str) -> Tensor:
    """Pieces of a domain's test split, spread evenly over it, `[windows, tokens]`."""
    tokens, count = SETTINGS["tokens"], SETTINGS["windows"]
    ids = tokenizer("\n\n".join(lab.load_text(domain, "test")), return_tensors="pt")["input_ids"][0]
    return torch.stack([ids[i * (len(ids) // count) :][:tokens] for i in range(count)])


@functools.cache
def loaded() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The model, its linear layers' weights as they were, and the texts' windows."""
    model, tokenizer = lab.load_base(SETTINGS["model"])
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights = {n: m.weight.detach().clone() for n, m in linears.items() if n != "lm_head"}
    return model, weights, {domain: windows(tokenizer, domain) for domain in SETTINGS["texts"]}


@torch.no_grad()
def losses(count: int) -> dict[str, list[float]]:
    """Nats a token of the model as it is, on the first `count` windows of each text."""
    model, _, texts = loaded()
    return {
        domain: [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in rows[:count]]
        for domain, rows in texts.items()
    }


@torch.no_grad()
def measure(
    kind: str | None, part: tuple[float, float] = (0, 1), draw: int | None = None, count: int = SETTINGS["windows"]
) -> dict[str, Any]:  # fmt: skip
    """Error and losses with weights rounded; `count`: of the windows of each text.

    part: only weights whose magnitude lies between these parts of their block's largest.    draw: of the errors' signs.
    """
    model, originals, _ = loaded()
    error, total = 0.0, sum(w.square().sum().item() for w in originals.values())
    if draw is not None:
        torch.manual_seed(draw)
    for name, weight in originals.items():
        rounded = weight if kind is None else roundtrip(weight, kind)
        if part != (0, 1):
            blocks, largest = blocks_of(weight)
            size, (low, high) = (blocks.abs() / largest).reshape(weight.shape), part
            inside = (size >= low) & ((size < high) | (high == 1))
            rounded = torch.where(inside, rounded, weight)
        if draw is not None:
            signs = torch.randint(0, 2, weight.shape) * 2 - 1
            rounded = weight + (rounded - weight).abs() * signs
        error += (rounded - weight).square().sum().item()
        model.get_submodule(name).weight.data = rounded
    return {"error": error / total, "loss": losses(count)}


def body(runs: Runs) -> None:
    formats, edges, draws = SETTINGS["formats"], SETTINGS["edges"], SETTINGS["draws"]
    runs.expect(2 + len(formats) * (1 + len(edges) - 1 + draws))
    runs("base", measure, None)
    for kind in (*formats, "nf4 double"):
        runs(f"{kind}/all", measure, kind)
    for kind in formats:
        for low, high in itertools.pairwise(edges):
            runs(f"{kind}/{low:g}-{high:g}", measure, kind, (low, high))
    for draw in range(draws):
        for kind in formats:
            runs(f"{kind}/signs {draw}", measure, kind, (0, 1), draw)


WITNESS = Witness(
    ("nf4/all",),
    {"error": 1e-6, "loss": 0.002},
    "No training: fp32 sums in another order move a loss by less than a thousandth, and the formats lie hundredths apart",
    part=lambda: measure("nf4", count=2),
)
STUDY = Study("1_1_formats", SETTINGS, body, WITNESS)
