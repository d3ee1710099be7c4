"""nano's architecture and its pretraining, which goes on from its last checkpoint."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from tools.nano.muon import Muon
from tools.nano.scores import bits_per_byte
from tools.nano.text import CONTEXT, HOME, batch, pretraining_tokens, read


def new_model(vocabulary: int, end: int) -> Qwen2ForCausalLM:
    """nano with fresh weights."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=704, max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=end, pad_token_id=end, use_cache=True,
        )
    )  # fmt: skip


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint so that a kill leaves either the old one or the new one."""
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def seconds_left(args: argparse.Namespace, spent: float) -> float:
    """Seconds of training still to go, by `--until` (a time of the day, UTC) or `--minutes` (of training in all)."""
    if args.until is None:
        return args.minutes * 60 - spent
    now = dt.datetime.now(dt.UTC)
    hour, minute = map(int, args.until.split(":"))
    deadline = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if deadline < now - dt.timedelta(hours=12):  # past midnight
        deadline += dt.timedelta(days=1)
    return (deadline - now).total_seconds()


def rate(done: float, decay: float) -> float:
    """The learning rate's factor when the share `done` of the time is spent: constant, then 1 - sqrt over the last `decay`."""
    return 1.0 if done < 1 - decay else max(0.0, 1 - math.sqrt((done - 1 + decay) / decay))


def train(args: argparse.Namespace) -> None:
    """Pretrain until the time is up; log to `log.jsonl`, checkpoint every few minutes."""
    torch.set_num_threads(args.threads)
    tokenizer = Qwen2Tokenizer.from_pretrained(args.work / "tokenizer")
    tokens = pretraining_tokens(args, tokenizer)
    model = new_model(len(tokenizer), tokenizer.eos_token_id)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step, spent, path = 0, 0.0, args.work / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["seconds"]
        torch.set_rng_state(state["rng"])
        print(f"resumed at step {step}", flush=True)
    held_out = read(HOME, "validation")[:2]
    log_path = args.work / "log.jsonl"
    logged = log_path.read_text().splitlines() if log_path.exists() else []
    log_path.write_text("".join(f"{line}\n" for line in logged if json.loads(line)["step"] <= step))
    log = log_path.open("a")
    last, losses = time.monotonic(), []
    saved_at, finished = time.monotonic(), False
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens an epoch", flush=True)
    while not finished:
        left = seconds_left(args, spent)
        finished = left <= 0
        factor = min(1.0, (step + 1) / args.warmup) * rate(
            spent / (spent + max(left, 1e-9)), args.decay_fraction
        )
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * factor
        ids = batch(tokens, step, args.batch)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, losses = step + 1, [*losses, loss.item()]
        spent, last = spent + time.monotonic() - last, time.monotonic()
        if finished or len(losses) == 50:
            line = {"step": step, "tokens": step * args.batch * CONTEXT, "seconds": round(spent, 1)}
            line |= {"loss": round(float(np.mean(losses)), 4), "factor": round(factor, 4)}
            if finished or time.monotonic() - saved_at > args.save_minutes * 60:
                line["validation"] = round(bits_per_byte(model, tokenizer, held_out), 4)
                state = {
                    "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                    "step": step, "tokens": line["tokens"], "seconds": spent, "rng": torch.get_rng_state(),
                    "settings": {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str))},
                }  # fmt: skip
                save_atomically(state, path)
                saved_at = time.monotonic()
            losses = []
            print(json.dumps(line), file=log, flush=True)
            print(line, flush=True)


def export(args: argparse.Namespace) -> None:
    """Write the last checkpoint as `from_pretrained` reads it: weights in bf16, configs, tokenizer."""
    state = torch.load(args.work / "checkpoint.pt", weights_only=True)
    tokenizer = Qwen2Tokenizer.from_pretrained(args.work / "tokenizer")
    model = new_model(len(tokenizer), tokenizer.eos_token_id)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(args.out)
    run = {key: state[key] for key in ("step", "tokens", "seconds", "settings")}
    (args.out / "provenance.json").write_text(json.dumps({"pretraining": run}, indent=1) + "\n")
    print(
        f"{args.out}: {sum(f.stat().st_size for f in args.out.iterdir()):,} bytes, {run['step']:,} steps"
    )
