"""The study of chapter 1.1 on number formats: which weights' rounding costs SmolLM2 its perplexity.

    python tools/studies/formats.py          about 10 minutes on two idle cores; goes on where it was stopped

For int4, FP4 and NF4 in blocks of 64: all linear weights rounded, and only those whose magnitude, over the largest of their
block, lies in one of four bins; and NF4 with double quantisation. Per run: the squared error over Σ w², and the loss (nats
a token) on each of five texts (the "seeds" of this study). Writes lora_course/data/studies/1_1_formats.json.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lora_course import lab
from lora_course.lab import study

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model": "smol", "formats": ["int4", "fp4", "nf4"], "edges": [0, 0.15, 0.45, 0.75, 1.0], "characters": 2000,
    "seeds": ["glosses", "bible", "shakespeare", "milton", "python"],
}  # fmt: skip
SOURCES = [Path(__file__), ROOT / "lora_course/lab/models.py", *(ROOT / f"lora_course/data/text/{d}.parquet" for d in SETTINGS["seeds"])]


def roundtrip(weight: Tensor, kind: str) -> Tensor:
    """The nearest weight that a format can represent, `[out, in]`."""
    if kind in ("nf4", "fp4", "nf4 double"):
        double = kind.endswith("double")
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind[:3], compress_statistics=double)
        return bnb.functional.dequantize_4bit(packed, state)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
    return (torch.round(blocks / scale) * scale).reshape(weight.shape)


def magnitude(weight: Tensor) -> Tensor:
    """|w| over the largest of its block, `[out, in]`, from 0 to 1."""
    blocks = weight.reshape(-1, 64).abs()
    return (blocks / blocks.amax(1, keepdim=True).clamp(min=1e-12)).reshape(weight.shape)


def main() -> None:
    model, tokenizer = lab.load_base(SETTINGS["model"])
    originals = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    total = sum(w.square().sum() for w in originals.values()).item()
    texts = [lab.load_text(domain, "test")[0][: SETTINGS["characters"]] for domain in SETTINGS["seeds"]]
    inputs = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]

    @torch.no_grad()
    def result(kind: str | None, low: float, high: float) -> dict[str, object]:
        error = 0.0
        for name, weight in originals.items():
            rounded = weight if kind is None else roundtrip(weight, kind)
            if kind and (low, high) != (0, 1):
                size = magnitude(weight)
                rounded = torch.where((size >= low) & ((size < high) | (high == 1)), rounded, weight)
            error += (rounded - weight).square().sum().item()
            model.get_submodule(name).weight.data = rounded
        return {"error": error / total, "loss": [model(input_ids=ids, labels=ids).loss.item() for ids in inputs]}

    edges = SETTINGS["edges"]
    results = study.Study(study.STUDIES / "1_1_formats.json", SOURCES, SETTINGS)
    todo = [("base", None, 0, 1)] + [(f"{kind}/all", kind, 0, 1) for kind in (*SETTINGS["formats"], "nf4 double")]
    for kind in SETTINGS["formats"]:
        todo += [(f"{kind}/{low:g}-{high:g}", kind, low, high) for low, high in zip(edges, edges[1:])]
    for i, (key, kind, low, high) in enumerate(todo, 1):
        run = results.run(key, lambda: result(kind, low, high))
        print(f"{i:2}/{len(todo)}  {key:16} error {run['error']:.5f}  loss {[round(x, 3) for x in run['loss']]}", flush=True)


if __name__ == "__main__":
    main()
