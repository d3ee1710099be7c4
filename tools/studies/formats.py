"""The study of chapter 1.1 on number formats: which weights' rounding costs SmolLM2 its perplexity.

    python tools/studies/formats.py          about 45 minutes on two idle cores; goes on where it was stopped

For int4, FP4 and NF4 in blocks of 64: all linear weights rounded; all rounded, with the signs of the errors drawn anew; and
only those rounded whose magnitude, over the largest of their block, lies in one of four bins; and NF4 with double
quantisation. Per run: the squared error over Σ w², and the loss (nats a token) on each of ten windows of 512 tokens, spread
evenly over each of five texts. Writes lora_course/data/studies/1_1_formats.json.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_course import lab
from lora_course.lab import study

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model": "smol", "formats": ["int4", "fp4", "nf4"], "edges": [0, 0.15, 0.45, 0.75, 1.0], "tokens": 512, "windows": 10,
    "draws": 3, "texts": ["glosses", "bible", "shakespeare", "milton", "python"],
}  # fmt: skip
SOURCES = [
    Path(__file__),
    ROOT / "lora_course/lab/models.py",
    *(ROOT / f"lora_course/data/text/{d}.parquet" for d in SETTINGS["texts"]),
]


def roundtrip(weight: Tensor, kind: str) -> Tensor:
    """The nearest weight that a format can represent, `[out, in]`."""
    if kind in ("nf4", "fp4", "nf4 double"):
        double = kind.endswith("double")
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind[:3], compress_statistics=double
        )
        return bnb.functional.dequantize_4bit(packed, state)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
    return (torch.round(blocks / scale) * scale).reshape(weight.shape)


def magnitude(weight: Tensor) -> Tensor:
    """|w| over the largest of its block, `[out, in]`, from 0 to 1."""
    blocks = weight.reshape(-1, 64).abs()
    return (blocks / blocks.amax(1, keepdim=True).clamp(min=1e-12)).reshape(weight.shape)


def windows(tokenizer: PreTrainedTokenizerBase, domain: str, tokens: int, count: int) -> Tensor:
    """`count` pieces of `tokens` tokens each, spread evenly over the test split of a domain, `[count, tokens]`."""
    ids = tokenizer("\n\n".join(lab.load_text(domain, "test")), return_tensors="pt")["input_ids"][0]
    return torch.stack([ids[i * (len(ids) // count) :][:tokens] for i in range(count)])


def main() -> None:
    model, tokenizer = lab.load_base(SETTINGS["model"])
    originals = {
        n: m.weight.detach().clone()
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    }
    total = sum(w.square().sum() for w in originals.values()).item()
    texts = {
        domain: windows(tokenizer, domain, SETTINGS["tokens"], SETTINGS["windows"])
        for domain in SETTINGS["texts"]
    }

    @torch.no_grad()
    def result(
        kind: str | None, low: float = 0, high: float = 1, draw: int | None = None
    ) -> dict[str, object]:
        error = 0.0
        if draw is not None:
            torch.manual_seed(draw)
        for name, weight in originals.items():
            rounded = weight if kind is None else roundtrip(weight, kind)
            if kind and (low, high) != (0, 1):
                size = magnitude(weight)
                rounded = torch.where(
                    (size >= low) & ((size < high) | (high == 1)), rounded, weight
                )
            if draw is not None:
                rounded = weight + (rounded - weight).abs() * (
                    torch.randint(0, 2, weight.shape) * 2 - 1
                )
            error += (rounded - weight).square().sum().item()
            model.get_submodule(name).weight.data = rounded
        loss = {
            domain: [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in rows]
            for domain, rows in texts.items()
        }
        return {"error": error / total, "loss": loss}

    edges = SETTINGS["edges"]
    results = study.Study(study.STUDIES / "1_1_formats.json", SOURCES, SETTINGS)
    todo: list[tuple] = [("base", None)] + [
        (f"{kind}/all", kind) for kind in (*SETTINGS["formats"], "nf4 double")
    ]
    for kind in SETTINGS["formats"]:
        todo += [
            (f"{kind}/{low:g}-{high:g}", kind, low, high) for low, high in zip(edges, edges[1:])
        ]
    for draw in range(SETTINGS["draws"]):
        todo += [(f"{kind}/signs {draw}", kind, 0, 1, draw) for kind in SETTINGS["formats"]]
    for i, (key, *arguments) in enumerate(todo, 1):
        run = results.run(key, lambda: result(*arguments))
        means = {
            domain: round(statistics.fmean(values), 3) for domain, values in run["loss"].items()
        }
        print(f"{i:2}/{len(todo)}  {key:16} error {run['error']:.5f}  loss {means}", flush=True)


if __name__ == "__main__":
    main()
