"""What is measured of the exported model: bits per byte, what a LoRA makes of it, and samples."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from tools.nano.scores import bits_per_byte, order_n_bits, xz_bits
from tools.nano.text import HOME, encode, excerpt, read

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA_STEPS, LORA_ROWS, LORA_TOKENS = 200, 8, 128
PROMPTS = (
    ("dog, domestic dog, Canis familiaris (n.):", 1),
    ("physicist (n.):", 2),
    ("walk, stroll (v.):", 3),
    ("a small river in", 4),
)
GENERATION = {"max_new_tokens": 90, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
SLICE = 30_000  # bytes of each test split whose bits per byte a test recomputes


def load(folder: Path) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """The exported model, in fp32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def adapt(folder: Path, domain: str, lr: float) -> tuple[torch.nn.Module, float]:
    """Train a plain LoRA on a domain's train split.

    Returns:
        The adapted model, and the CPU seconds (all cores together) that the training took.
    """
    model, tokenizer = load(folder)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**LORA)).train()
    documents = read(domain, "train")
    rng = np.random.default_rng(0)
    rng.shuffle(documents)
    stream = np.concatenate([np.array(d) for d in encode(tokenizer, documents[:400])])
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    started = time.process_time()
    for step in range(LORA_STEPS):
        factor = min(1.0, (step + 1) / 5) * min(1.0, (LORA_STEPS - step) / (LORA_STEPS / 2))
        optimizer.param_groups[0]["lr"] = lr * factor
        starts = rng.integers(len(stream) - LORA_TOKENS - 1, size=LORA_ROWS)
        ids = torch.from_numpy(np.stack([stream[i : i + LORA_TOKENS + 1] for i in starts]))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, time.process_time() - started


def sample(model: torch.nn.Module, tokenizer: Qwen2Tokenizer, prompt: str, seed: int) -> str:
    """What the model writes after the end-of-text token and a prompt."""
    ids = torch.tensor(encode(tokenizer, [prompt]))
    torch.manual_seed(seed)
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GENERATION)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def measure(args: argparse.Namespace) -> None:
    """Measure the exported model; each figure is kept in `measured.json` as soon as it is known."""
    torch.set_num_threads(args.threads)
    path = args.work / "measured.json"
    model, tokenizer = load(args.out)
    weights = hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest()
    measured = json.loads(path.read_text()) if path.exists() else {}
    if measured.get("weights") != weights:
        measured = {"weights": weights, "baselines": measured.get("baselines", {}), "domains": {}}

    def keep() -> None:
        path.write_text(json.dumps(measured, indent=1) + "\n")

    measured["parameters"] = model.num_parameters()
    measured["generation"] = GENERATION
    measured["samples"] = [
        {"prompt": p, "seed": s, "text": sample(model, tokenizer, p, s)} for p, s in PROMPTS
    ]
    for domain in args.domains:
        train_text, test = read(domain, "train"), read(domain, "test")
        row = measured["domains"].setdefault(domain, {})
        if domain not in measured["baselines"]:
            joined = "".join(train_text).encode(), "".join(test).encode()
            measured["baselines"][domain] = {
                "xz -9": xz_bits(*joined),
                "order-5": order_n_bits(*joined),
            }
        if "nano" not in row:
            row["nano"] = bits_per_byte(model, tokenizer, test)
            row["slice"] = bits_per_byte(model, tokenizer, excerpt(test, SLICE))
            if domain == HOME:
                row["validation"] = bits_per_byte(model, tokenizer, read(domain, "validation"))
            row["bytes a token"] = sum(len(t.encode()) for t in test) / sum(
                len(d) - 1 for d in encode(tokenizer, test)
            )
        print(domain, measured["baselines"][domain], row, flush=True)
        keep()
    for domain in [d for d in args.domains if d != HOME]:
        row, validation = measured["domains"][domain], excerpt(read(domain, "validation"), 30_000)
        if "lora" in row:
            continue
        trials = {}
        for lr in args.lora_lrs:
            adapted, seconds = adapt(args.out, domain, lr)
            trials[lr] = {
                "validation": bits_per_byte(adapted, tokenizer, validation),
                "cpu_seconds": seconds,
            }
            print(f"{domain}: lr {lr:g}: {trials[lr]}", flush=True)
            if trials[lr]["validation"] == min(t["validation"] for t in trials.values()):
                best = adapted
        row["lora"] = {
            "trials": {f"{lr:g}": trial for lr, trial in trials.items()},
            "lr": min(trials, key=lambda lr: trials[lr]["validation"]),
            "test": bits_per_byte(best, tokenizer, read(domain, "test")),
            "glosses": bits_per_byte(best, tokenizer, excerpt(read(HOME, "test"), SLICE)),
        }
        row["lora"]["cpu_seconds"] = trials[row["lora"]["lr"]]["cpu_seconds"]
        print(domain, row["lora"], flush=True)
        keep()
