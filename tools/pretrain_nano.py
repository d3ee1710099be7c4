"""Pretrain nano, the course's small base model, and export it with its tokenizer and model card.

    python tools/build_text.py                               # the text first
    python tools/pretrain_nano.py tokenizer
    python tools/pretrain_nano.py train --minutes 95         # resumes from its last checkpoint with the same command
    python tools/pretrain_nano.py export                     # weights in bf16, tokenizer, configs
    python tools/pretrain_nano.py measure                    # bits per byte, baselines, LoRA, samples
    python tools/pretrain_nano.py card                       # README.md and provenance.json from what was measured

Everything on the way (tokens, checkpoints, log, measurements) is kept in `--work`, by default `build/nano`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import lzma
import math
import os
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "lora_course/data/text"
NANO = ROOT / "lora_course/data/nano"
HOME = "glosses"
UNSEEN = ("bible", "shakespeare", "milton", "python")
END = "<|endoftext|>"
CONTEXT = 256

# Text and tokens ----------------------------------------------------------------------------------------------------


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


# Pretraining --------------------------------------------------------------------------------------------------------


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


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration (Jordan 2024), in fp32.

    torch.optim.Muon iterates in bfloat16, which is slow on CPUs without bfloat16 arithmetic.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(velocity, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The matrix with its singular values brought near 1, by a quintic Newton-Schulz iteration."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


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


# Export and measurement ---------------------------------------------------------------------------------------------


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


def load(folder: Path) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """The exported model, in fp32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


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


LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA_STEPS, LORA_ROWS, LORA_TOKENS = 200, 8, 128


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


PROMPTS = (
    ("dog, domestic dog, Canis familiaris (n.):", 1),
    ("physicist (n.):", 2),
    ("walk, stroll (v.):", 3),
    ("a small river in", 4),
)
GENERATION = {"max_new_tokens": 90, "do_sample": True, "temperature": 0.8, "top_p": 0.95}


def sample(model: torch.nn.Module, tokenizer: Qwen2Tokenizer, prompt: str, seed: int) -> str:
    """What the model writes after the end-of-text token and a prompt."""
    ids = torch.tensor(encode(tokenizer, [prompt]))
    torch.manual_seed(seed)
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GENERATION)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def excerpt(texts: Sequence[str], size: int) -> list[str]:
    """The first documents, as many as hold `size` bytes, or all."""
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return list(texts[: int(np.searchsorted(sizes, size)) + 1])


SLICE = 30_000  # bytes of each test split whose bits per byte a test recomputes


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build/nano",
        help="checkpoints, log, measurements (default: %(default)s)",
    )
    parser.add_argument(
        "--general",
        type=Path,
        default=ROOT / "build/general.parquet",
        help="the general text (default: %(default)s)",
    )
    parser.add_argument(
        "--general-megabytes",
        type=float,
        default=3.0,
        help="how much of it to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="torch's threads (default: %(default)s)"
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("tokenizer", help="train the tokenizer").set_defaults(run=build_tokenizer)
    sub = commands.add_parser("train", help="pretrain, or go on")
    sub.set_defaults(run=train)
    sub.add_argument(
        "--minutes",
        type=float,
        default=95,
        help="minutes of training in all (default: %(default)s)",
    )
    sub.add_argument("--until", help="end at this time instead, HH:MM in UTC")
    sub.add_argument(
        "--decay-fraction",
        type=float,
        default=0.3,
        help="share of the time in which the learning rate falls (default: %(default)s)",
    )
    sub.add_argument(
        "--warmup", type=int, default=60, help="steps of warm-up (default: %(default)s)"
    )
    sub.add_argument(
        "--batch",
        type=int,
        default=16,
        help=f"windows of {CONTEXT} tokens a step (default: %(default)s)",
    )
    sub.add_argument(
        "--muon-lr",
        type=float,
        default=0.02,
        help="learning rate of the matrices (default: %(default)s)",
    )
    sub.add_argument(
        "--lr",
        type=float,
        default=3e-3,
        help="learning rate of embeddings, norms and biases (default: %(default)s)",
    )
    sub.add_argument(
        "--weight-decay",
        type=float,
        default=0.1,
        help="decay of the matrices (default: %(default)s)",
    )
    sub.add_argument(
        "--save-minutes",
        type=float,
        default=3,
        help="minutes between checkpoints (default: %(default)s)",
    )
    for name, command, words in (
        ("export", export, "write the model as from_pretrained reads it"),
        ("measure", measure, "measure the exported model"),
        ("card", card, "write model card and provenance"),
    ):
        sub = commands.add_parser(name, help=words)
        sub.set_defaults(run=command)
        sub.add_argument(
            "--out",
            type=Path,
            default=NANO,
            help="folder of the exported model (default: %(default)s)",
        )
        if name == "measure":
            sub.add_argument(
                "--domains",
                nargs="+",
                default=[HOME, *UNSEEN],
                help="domains to measure (default: all)",
            )
            sub.add_argument(
                "--lora-lrs",
                nargs="+",
                type=float,
                default=[4e-3, 8e-3, 1.6e-2],
                help="learning rates to choose from (default: %(default)s)",
            )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()
