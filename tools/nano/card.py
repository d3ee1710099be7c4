"""nano's model card and provenance, from the configs, the log and what was measured."""

from __future__ import annotations

import argparse
import hashlib
import json
from importlib import metadata

import numpy as np
import torch

from tools.nano.measuring import LORA_ROWS, LORA_STEPS, LORA_TOKENS
from tools.nano.text import CONTEXT, HOME, TEXT

CARD = """\
# nano

A language model of {parameters:,} parameters, pretrained for the chapters of this course: small enough to adapt on two CPU
cores within a minute, good enough that adapting it means something. This page is written by `tools/pretrain_nano.py`; every
figure on it was measured, and stands with more digits in `provenance.json`.

```python
model = AutoModelForCausalLM.from_pretrained("lora_course/data/nano", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("lora_course/data/nano")
```

## Bits per byte on held-out text
Test splits, which neither the model nor its tokenizer has seen. A document is scored after `<|endoftext|>`, in adjacent windows
of {context} tokens; all its tokens count. `xz -9` and the order-5 byte model (interpolated, Witten–Bell) were given the
domain's whole train split. The LoRA is PEFT's, r = 8, α = 16, all linear layers, AdamW, {lora_steps} steps of {lora_rows} × {lora_tokens}
tokens; its learning rate is the best of {lrs} on the validation split; its CPU time is that of all cores together.

| domain | bytes a token | nano | with LoRA | cut | lr | CPU s | `xz -9` | order-5 |
|---|---|---|---|---|---|---|---|---|
{rows}

Only the glosses are nano's own domain ({home:.2f} on their validation split); the others are new to its weights. After adapting to them: {forgetting}.

## Model
{layers} layers of Qwen2's architecture, width {width}, {heads} attention heads over {kv} key-value heads, intermediate size {inner},
vocabulary {vocabulary:,}, tied embeddings, positions up to {positions:,}; weights in bf16 (`model.safetensors`, {weight_bytes:,} bytes).

## Training
- Text: the train split of `glosses` (WordNet 3.0 licence) and {general:g} MB of general English: PostgreSQL 15's manual
  (PostgreSQL licence) and the Jargon File (public domain). See the data card in `../text`.
- {tokens:,} tokens in {steps:,} steps of {batch} × {context}, {minutes:.0f} minutes on {threads} shared CPU cores; {epochs:.1f} passes over {epoch:,} tokens.
- Matrices by Muon (lr {muon_lr:g}, decay {weight_decay:g}), embeddings, norms and biases by AdamW (lr {lr:g}); warm-up, constant, then 1 − √ over the last {decay:.0%} of the time.
- Last held-out loss in training: {validation:.3f} bits per byte of two documents of the validation split.

## Tokenizer
Byte-level BPE, {vocabulary:,} tokens, with Qwen2's rule for splitting words: lossless on any text in Unicode's NFC form (Qwen2's
tokenizer brings other text to it). `<|endoftext|>` ends a document and pads; nothing is added to a text by itself. It was trained on a balanced mix of the train splits of **all** domains and the general text, so its vocabulary knows the
domains that the weights have never seen. Bits per byte can be compared across tokenizers, perplexity per token can't.

## Samples
After `<|endoftext|>` and the prompt (bold), with {generation}.

{samples}

## Use and limits
For teaching: to watch adaptation, forgetting, quantisation and merging on a real pretrained model. It writes dictionary entries that
sound right and are mostly false; it knows no facts, follows no instructions, and carries the views of its sources. Use it for nothing else.

## Licence
The weights are released under the Apache License 2.0, as the project's code. They were trained on WordNet 3.0 (© 2006 Princeton University) and on the
PostgreSQL documentation (© 1996–2023 PostgreSQL Global Development Group, © 1994 Regents of the University of California), whose notices are to be kept.
"""


def card(args: argparse.Namespace) -> None:
    """Write the model card and provenance.json from the configs, the log and what was measured."""
    measured = json.loads((args.work / "measured.json").read_text())
    state = torch.load(args.work / "checkpoint.pt", weights_only=True)
    log = [json.loads(line) for line in (args.work / "log.jsonl").read_text().splitlines()]
    config = json.loads((args.out / "config.json").read_text())
    rows, home = [], measured["domains"][HOME]
    for domain, row in measured["domains"].items():
        lora, base = row.get("lora"), measured["baselines"][domain]
        cells = ["–"] * 4 if lora is None else [
            f"{lora['test']:.2f}", f"{1 - lora['test'] / row['nano']:.0%}", f"{lora['lr']:g}", f"{lora['cpu_seconds']:.0f}",
        ]  # fmt: skip
        cells = [
            f"{row['bytes a token']:.2f}",
            f"{row['nano']:.2f}",
            *cells,
            f"{base['xz -9']:.2f}",
            f"{base['order-5']:.2f}",
        ]
        rows.append(f"| {domain} | {' | '.join(cells)} |")
    samples = []
    for s in measured["samples"]:
        written = s["text"].removeprefix(s["prompt"]).rstrip().replace("\n", "  \n> ")
        samples.append(f"> **{s['prompt']}**{written}\n>\n> (seed {s['seed']})")
    adapted = [row["lora"] for row in measured["domains"].values() if "lora" in row]
    lrs, after = (
        sorted({float(lr) for lora in adapted for lr in lora["trials"]}),
        [lora["glosses"] for lora in adapted],
    )
    forgetting = (
        f"the first glosses of the test split went from {home['slice']:.2f} to {min(after):.2f}–{max(after):.2f}"
        if after
        else "not yet measured"
    )
    settings = state["settings"]
    epoch = len(np.load(args.work / "tokens.npy"))
    text = CARD.format(
        parameters=measured["parameters"], context=CONTEXT, rows="\n".join(rows), lora_steps=LORA_STEPS, lora_rows=LORA_ROWS,
        lora_tokens=LORA_TOKENS, lrs=", ".join(f"{lr:g}" for lr in lrs) or "–", layers=config["num_hidden_layers"], width=config["hidden_size"],
        heads=config["num_attention_heads"], kv=config["num_key_value_heads"], inner=config["intermediate_size"],
        vocabulary=config["vocab_size"], positions=config["max_position_embeddings"],
        weight_bytes=(args.out / "model.safetensors").stat().st_size, general=settings["general_megabytes"], tokens=state["tokens"],
        steps=state["step"], batch=settings["batch"], minutes=state["seconds"] / 60, threads=settings["threads"], epoch=epoch,
        epochs=state["tokens"] / epoch, muon_lr=settings["muon_lr"], weight_decay=settings["weight_decay"], lr=settings["lr"],
        decay=settings["decay_fraction"], validation=next(line["validation"] for line in reversed(log) if "validation" in line),
        generation=", ".join(f"`{k}={v}`" for k, v in measured["generation"].items()), samples="\n\n".join(samples),
        home=home["validation"],
        forgetting=forgetting,
    )  # fmt: skip
    (args.out / "README.md").write_text(text, encoding="utf-8")
    run = {key: state[key] for key in ("step", "tokens", "seconds", "settings")}
    sources = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(TEXT.glob("*.parquet"))
    }
    versions = {
        name: metadata.version(name)
        for name in ("torch", "transformers", "tokenizers", "peft", "numpy")
    }
    provenance = {
        "script": "tools/pretrain_nano.py",
        "pretraining": run,
        "text": sources,
        "versions": versions,
    }
    provenance |= {"log": log, "measured": measured}
    (args.out / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
