"""Trains and scores what the page that plays holds: adapters of nano, and a router over four of them.

    python -m tools.play            about 35 minutes of one thread; goes on where it was stopped

Writes into book/_data/play: an adapter a file (`<module>.A` and `<module>.B` in bf16, scaling 1) and record.json, which holds
settings, versions and every number that the page quotes. `tools.play_pack` turns the files into what a browser loads.

A plain adapter is written with its factors sorted by singular value (`truncate` at its own rank), so that its first k rows
and columns are its best cut to rank k. Of one domain the factors as trained are written too, and a nested adapter, which was
trained to be sliced. Scores are of the rounded files, on test text.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lora_course import lab
from lora_course.experts import mix_experts
from lora_course.hierarchical import NestedLoRALinear, RankSampler
from lora_course.lora import (
    AdapterState,
    LoRALinear,
    adapter_layers,
    adapter_state,
    concatenate,
    factor_state,
    inject,
    truncate,
    use_adapter,
)
from lora_course.merging import average_factors
from lora_course.quantized import fake_quantize
from lora_course.training import AdapterTrainer, training_arguments

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "book" / "_data" / "play"
RECORD = FOLDER / "record.json"
SETTINGS: dict[str, Any] = {
    "model": "nano", "domains": ["bible", "shakespeare", "milton", "python"], "cut_domain": "shakespeare", "r": 16,
    "lora_alpha": 32, "target_modules": "all-linear", "steps": 480, "batch": 8, "length": 128, "train_bytes": 1_600_000,
    "rates": [4e-3, 8e-3], "nested_rates": [8e-3, 1.6e-2], "nested_ranks": [1, 2, 4, 8, 16],
    "router_steps": 80, "router_rate": 0.3, "seed": 0,
    "validation_bytes": 20_000, "test_bytes": 10_000, "curve_bytes": 6_000, "group_size": 64,
    "cuts": [1, 2, 4, 8, 16], "scales": [0.0, 0.5, 1.0, 1.5, 2.0], "bits": [8, 4, 2], "merged": ["shakespeare", "python"],
}  # fmt: skip
DOMAINS, CUT = SETTINGS["domains"], SETTINGS["cut_domain"]
SCORED = ["glosses", *DOMAINS]
SAMPLE_BYTES = 800


class Record:
    """The numbers by key in one file, written after each: a run that is killed goes on where it was.

    Raises ValueError where the file holds results of other settings.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": SETTINGS, "runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != SETTINGS:
                raise ValueError(
                    f"{path} holds results of other settings: move it away to begin anew."
                )

    def run(self, key: str, function: Callable[[], Any]) -> Any:
        """The result of `key`; computed and written first if there is none yet."""
        runs = self.content["runs"]
        if key not in runs:
            began = time.perf_counter()
            runs[key] = function()
            packages = ("torch", "transformers", "peft")
            head = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
            )
            self.content |= {
                "versions": {name: importlib.metadata.version(name) for name in packages},
                "commit": head.stdout.strip(),
                "date": datetime.date.today().isoformat(),
            }
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.content, indent=1) + "\n")
            part.replace(self.path)
            print(f"{time.perf_counter() - began:6.1f} s  {key}  {brief(runs[key])}", flush=True)
        return runs[key]


def brief(result: Any) -> str:
    return json.dumps(result)[:140]


# ------------------------------------------------------------------------------------------------------- training


@functools.cache
def rows(domain: str) -> datasets.Dataset:
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(lab.load_text(domain, "train"), SETTINGS["train_bytes"], piece=8192)
    return lab.blocks(tokenizer, texts, SETTINGS["length"])


def fit(
    model: nn.Module, data: datasets.Dataset, rate: float, steps: int, callbacks: tuple = ()
) -> list[float]:
    """AdamW, 10% of warm-up, then linearly to zero; returns the loss at each step, in nats a token."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder, seed=SETTINGS["seed"], learning_rate=rate, max_steps=steps, warmup_steps=0.1,
            per_device_train_batch_size=SETTINGS["batch"], save_strategy="no", lr_scheduler_type="linear",
        )  # fmt: skip
        trainer = AdapterTrainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
        trainer.train()
    return [entry["loss"] for entry in trainer.history]


def config(r: int, alpha: float) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=SETTINGS["target_modules"])


def train_adapter(domain: str, rate: float, nested: bool) -> tuple[AdapterState, list[float]]:
    """Plain factors of one training: of a nested adapter with its scale and weights inside."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(SETTINGS["seed"])
    special = (
        {"layer": NestedLoRALinear, "ranks": SETTINGS["nested_ranks"]}
        if nested
        else {"layer": LoRALinear}
    )
    inject(model, config(SETTINGS["r"], SETTINGS["lora_alpha"]), **special)
    callbacks = (RankSampler(model, SETTINGS["seed"]),) if nested else ()
    losses = fit(model, rows(domain), rate, SETTINGS["steps"], callbacks)
    return concatenate([factor_state(model)]), losses  # the scaling goes into B


def train_router() -> tuple[AdapterState, list[float]]:
    """The routers over the four adapters as they were written; the adapters stay frozen."""
    model = mixture()
    data = datasets.concatenate_datasets([rows(domain) for domain in DOMAINS]).shuffle(
        seed=SETTINGS["seed"]
    )
    losses = fit(
        model, data.with_format("torch"), SETTINGS["router_rate"], SETTINGS["router_steps"]
    )
    state = {k: t for k, t in adapter_state(model).items() if k.endswith(".router")}
    return state, losses


def mixture() -> nn.Module:
    """nano with the four written adapters as experts, their routers not yet trained."""
    torch.manual_seed(SETTINGS["seed"])
    return mix_experts(
        lab.load_base(SETTINGS["model"])[0], [read_adapter(domain) for domain in DOMAINS]
    )


def routed() -> nn.Module:
    """`mixture` with the routers that were written."""
    model = mixture()
    return use_adapter(model, adapter_state(model) | read("router"))


# ---------------------------------------------------------------------------------------------------------- files


def write(name: str, state: AdapterState) -> None:
    kept = {k: t.bfloat16().contiguous() for k, t in state.items() if not k.endswith(".scaling")}
    save_file(kept, FOLDER / f"{name}.safetensors")


def read(name: str) -> AdapterState:
    """A file's tensors in fp32."""
    return {k: t.float() for k, t in load_file(FOLDER / f"{name}.safetensors").items()}


def read_adapter(name: str, r: int | None = None) -> AdapterState:
    """A written adapter as a plain LoRA state of scaling 1, cut to its first `r` components."""
    state = read(name)
    one = torch.ones((), dtype=torch.float64)
    cut = {k: t[:r] if k.endswith(".A") else t[:, :r].contiguous() for k, t in state.items()}
    return cut | {f"{k[:-2]}.scaling": one.clone() for k in state if k.endswith(".A")}


# -------------------------------------------------------------------------------------------------------- scoring


@functools.cache
def plain() -> nn.Module:
    """The model into which adapters are put."""
    return inject(lab.load_base(SETTINGS["model"])[0], config(1, 1))


def with_state(state: AdapterState) -> nn.Module:
    return use_adapter(plain(), state)


def score(model: nn.Module, domain: str, split: str = "test", size: str = "test_bytes") -> float:
    """Bits a byte."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.load_text(domain, split)
    return round(lab.bits_per_byte(model, tokenizer, texts, max_bytes=SETTINGS[size]), 4)


def scores(model: nn.Module) -> dict[str, float]:
    return {domain: score(model, domain) for domain in SCORED}


def quantized_state(state: AdapterState, bits: int, granularity: str) -> AdapterState:
    """Both factors rounded as `QuantizedLoRALinear` rounds them: A's rows and B's columns share scales."""
    grid = (bits, granularity, SETTINGS["group_size"])
    rounded = dict(state)
    for key, tensor in state.items():
        if key.endswith(".A"):
            rounded[key] = fake_quantize(tensor, *grid)
        elif key.endswith(".B"):
            rounded[key] = fake_quantize(tensor.T.contiguous(), *grid).T.contiguous()
    return rounded


@torch.no_grad()
def quantized_base(model: nn.Module, bits: int, granularity: str) -> nn.Module:
    """The adapted linear layers' frozen weights rounded in place; embedding, norms and biases stay."""
    for layer in adapter_layers(model).values():
        weight = layer.base_layer.weight
        weight.copy_(fake_quantize(weight, bits, granularity, SETTINGS["group_size"]))
    return model


# ---------------------------------------------------------------------------------------------------------- study


def train_all(record: Record) -> None:
    def trial(name: str, domain: str, nested: bool) -> None:
        """Every rate, the best by validation written."""

        def run() -> dict[str, Any]:
            tried, best = {}, None
            for rate in SETTINGS["nested_rates" if nested else "rates"]:
                state, losses = train_adapter(domain, rate, nested)
                ranks = SETTINGS["nested_ranks"] if nested else [SETTINGS["r"]]
                found = [
                    score(with_state(first(state, r)), domain, "validation", "validation_bytes")
                    for r in ranks
                ]
                tried[f"{rate:g}"] = round(sum(found) / len(found), 4)
                if best is None or tried[f"{rate:g}"] < best[0]:
                    best = (tried[f"{rate:g}"], rate, state, losses)
            _, rate, state, losses = best
            write(name, state if nested else truncate(state, SETTINGS["r"]))
            if domain == CUT and not nested:
                write(f"{name}-as-trained", state)
            return {
                "domain": domain, "rate": rate, "validation": tried,
                "loss": [round(sum(part) / 10, 4) for part in (losses[:10], losses[-10:])],
            }  # fmt: skip

        record.run(f"train/{name}", run)

    for domain in [CUT, *(d for d in DOMAINS if d != CUT)]:
        trial(domain, domain, nested=False)
    trial("nested", CUT, nested=True)

    def router() -> dict[str, Any]:
        state, losses = train_router()
        write("router", state)
        return {"loss": [round(sum(part) / 10, 4) for part in (losses[:10], losses[-10:])]}

    record.run("train/router", router)


def first(state: AdapterState, r: int) -> AdapterState:
    """The first r rows of each A and columns of each B."""
    return {
        k: t[:r] if k.endswith(".A") else t[:, :r].contiguous() if k.endswith(".B") else t
        for k, t in state.items()
    }


def score_all(record: Record) -> None:
    base, _ = lab.load_base(SETTINGS["model"])
    record.run("sample/base", score_samples)
    record.run("scores/base", lambda: scores(base))
    for name in (*DOMAINS, "nested"):
        record.run(f"scores/{name}", lambda n=name: scores(with_state(read_adapter(n))))
    record.run("scores/routed", lambda: scores(routed()))
    equal = [1 / len(DOMAINS)] * len(DOMAINS)
    record.run(
        "scores/all averaged",
        lambda: scores(with_state(concatenate([read_adapter(d) for d in DOMAINS], equal))),
    )
    for name in (CUT, f"{CUT}-as-trained", "nested"):
        for r in SETTINGS["cuts"]:
            record.run(f"rank/{name}/{r}", lambda n=name, r=r: curve(read_adapter(n, r), CUT))
    for scale in SETTINGS["scales"]:
        record.run(
            f"scale/{scale:g}", lambda s=scale: curve(concatenate([read_adapter(CUT)], [s]), CUT)
        )
    for granularity in ("tensor", "group"):
        for bits in SETTINGS["bits"]:
            record.run(
                f"bits/adapter/{granularity}/{bits}",
                lambda g=granularity, b=bits: curve(quantized_state(read_adapter(CUT), b, g), CUT),
            )
            record.run(
                f"bits/base/{granularity}/{bits}", lambda g=granularity, b=bits: quantized(b, g)
            )
    pair = [read_adapter(name) for name in SETTINGS["merged"]]
    for name, merge in (("updates", concatenate), ("factors", average_factors)):
        for domain in SETTINGS["merged"]:
            record.run(
                f"merge/{name}/{domain}", lambda m=merge, d=domain: curve(m(pair, [0.5, 0.5]), d)
            )


def score_samples() -> dict[str, float]:
    """nano alone on the samples: the mark that the page's bars carry."""
    model, tokenizer = lab.load_base(SETTINGS["model"])
    samples = json.loads((FOLDER / "samples.json").read_text())
    return {d: round(lab.bits_per_byte(model, tokenizer, [text]), 4) for d, text in samples.items()}


def write_samples() -> None:
    """A piece of each domain's test text, which the page scores while one watches: whole lines from a document's middle."""
    samples = {}
    for domain in SCORED:
        texts = [text for text in lab.load_text(domain, "test") if len(text) > 5_000]
        text = texts[len(texts) // 2]
        _, _, rest = text[len(text) // 2 :].partition("\n")
        piece = rest.encode()[:SAMPLE_BYTES].decode(errors="ignore")
        samples[domain] = piece[: piece.rindex("\n") + 1].lstrip("\n")
    (FOLDER / "samples.json").write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def curve(state: AdapterState, domain: str) -> float:
    return score(with_state(state), domain, size="curve_bytes")


def quantized(bits: int, granularity: str) -> float:
    model = inject(lab.load_base(SETTINGS["model"])[0], config(1, 1))
    use_adapter(quantized_base(model, bits, granularity), read_adapter(CUT))
    return score(model, CUT, size="curve_bytes")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    record = Record(RECORD)
    write_samples()
    train_all(record)
    score_all(record)
    print("finished", flush=True)


if __name__ == "__main__":
    main()
