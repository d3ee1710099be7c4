"""The study of chapter 4.4: what fusing a training step saves, and what merging and batching adapters save when they serve.

    python tools/studies/fused.py          about 12 minutes on one idle core; goes on where it was stopped

Times are processor time of one thread, as other programs on the machine disturb it less than they do the clock. Arms take
turns, in another order each round, so that a round's times belong together: compare ratios within rounds. Memory is the
size of tensors, the same in every run. Writes lora_course/data/studies/4_4_fused.json.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_course import lab, lora
from lora_course.fused import FusedLoRALinear, load_adapters, rows
from lora_course.injection import inject, merge, unload
from lora_course.lab import study
from lora_course.states import factor_state, split_state, use_adapter

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model": "nano", "domains": ["bible", "shakespeare", "milton", "python"], "r": 8, "lora_alpha": 16, "learning_rate": 8e-3,
    "steps": 40, "batch": 4, "length": 128, "train_bytes": 400_000, "test_bytes": 20_000, "seeds": [0, 1, 2],
    "dropout": 0.1, "memory_ranks": [4, 16, 64], "autocast_rank": 16, "process": [8, 256, 16],
    "step_ranks": [8, 64], "step_rounds": 61, "layer": {"width": 1024, "tokens": 512, "r": 16, "rounds": 31},
    "orders": {"rows": 512, "out": 704, "ranks": [2, 4, 8, 10, 12, 16, 32, 64], "rounds": 41},
    "latency_ranks": [4, 16, 64, 256], "tokens": [1, 4, 16, 64, 256], "latency_rounds": 31,
    "served": {"rows": 32, "r": 8, "adapters": [1, 2, 4, 8, 16, 32], "rounds": 21},
    "generate": {"rows": 16, "adapters": 4, "r": 8, "prompt": 16, "new": 24, "rounds": 7},
}  # fmt: skip
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in (
            "fused.py",
            "lora.py",
            "training.py",
            "lab/study.py",
            "lab/corpora.py",
            "lab/memory.py",
        )
    ),
    ROOT / "lora_course/data/nano/model.safetensors",
    *(ROOT / f"lora_course/data/text/{domain}.parquet" for domain in SETTINGS["domains"]),
]
LAYERS = {"plain": lora.LoRALinear, "fused": FusedLoRALinear}


def config(r: int, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def injected(kind: str, r: int, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """The base with an adapter whose B is not zero: "plain", "fused" or "peft"."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    model = (
        get_peft_model(model, config(r, dropout))
        if kind == "peft"
        else inject(model, config(r, dropout), layer=LAYERS[kind])
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or name.endswith(".B")):
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(4096, (batch, length), generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, ids: torch.Tensor, autocast: bool = False) -> None:
    """Forward and backward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that the graph made by `run` keeps for its backward pass; parameters left out, each storage counted once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def memory(kind: str, r: int, dropout: float, autocast: bool) -> dict[str, int]:
    """Bytes kept for the backward pass, and the peak of a step's tensors, gradients of the adapter included."""
    model, ids = injected(kind, r, dropout), tokens(SETTINGS["batch"], SETTINGS["length"])

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=ids, use_cache=False)

    saved = saved_bytes(model, forward)
    gc.collect()
    return {"saved": saved, "peak": lab.peak_memory(lambda: step(model, ids, autocast))[1]}


def process_step(kind: str, dropout: float) -> None:
    """What runs in a process of its own."""
    batch, length, r = SETTINGS["process"]
    step(injected(kind, r, dropout), tokens(batch, length))


def race(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each arm in each round, after one that isn't counted; the order turns with the rounds."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.thread_time()
            arms[name]()
            if i:
                times[name].append(time.thread_time() - start)
    return {name: [round(t, 7) for t in values] for name, values in times.items()}


def step_times(r: int, dropout: float) -> dict[str, list[float]]:
    """Of a whole step; "B as it lies" is the plain one without lora.LARGEST_COPIED_RANK's transposed copy."""
    models = {kind: injected(kind, r, dropout) for kind in ("plain", "fused", "peft")}
    ids = tokens(SETTINGS["batch"], SETTINGS["length"])

    def arm(model: nn.Module, thin: int = lora.LARGEST_COPIED_RANK) -> Callable[[], None]:
        def run() -> None:
            before, lora.LARGEST_COPIED_RANK = lora.LARGEST_COPIED_RANK, thin
            model.zero_grad()
            step(model, ids)
            lora.LARGEST_COPIED_RANK = before

        return run

    return race(
        {kind: arm(model) for kind, model in models.items()}
        | {"B as it lies": arm(models["plain"], 0)},
        SETTINGS["step_rounds"],
    )


def order_times(r: int) -> dict[str, list[float]]:
    """The two thin products of the backward pass that B takes part in, each written in two ways; g is ∂L/∂y, h is x Aᵀ."""
    s = SETTINGS["orders"]
    torch.manual_seed(0)
    g, h, B = torch.randn(s["rows"], s["out"]), torch.randn(s["rows"], r), torch.randn(s["out"], r)
    Bt = B.t().contiguous()
    return race(
        {
            "gᵀh": lambda: g.t() @ h,
            "(hᵀg)ᵀ": lambda: (h.t() @ g).t(),
            "gB": lambda: g @ B,
            "g(Bᵀ)ᵀ": lambda: g @ Bt.t(),
        },
        s["rounds"],
    )


def layer_times() -> dict[str, list[float]]:
    """Forward and backward pass of one wide layer."""
    s = SETTINGS["layer"]
    arms = {}
    for kind, layer in LAYERS.items():
        torch.manual_seed(0)
        wrapped = layer(nn.Linear(s["width"], s["width"]), s["r"], s["r"]).train()
        nn.init.normal_(wrapped.B)
        x = torch.randn(s["tokens"], s["width"], requires_grad=True)
        arms[kind] = lambda wrapped=wrapped, x=x: wrapped(x).sum().backward()
    return race(arms, s["rounds"])


@torch.no_grad()
def latency(count: int) -> dict[str, list[float]]:
    """One forward pass of `count` rows of one token: the base, merged adapters, unmerged ones of several ranks."""
    ids = tokens(count, 1)
    models = {"base": lab.load_base(SETTINGS["model"])[0]}
    models["merged"] = unload(merge(injected("plain", 16)))
    models |= {f"r = {r}": injected("plain", r) for r in SETTINGS["latency_ranks"]}
    arms = {
        name: (lambda model=model.eval(): model(input_ids=ids, use_cache=False))
        for name, model in models.items()
    }
    return race(arms, SETTINGS["latency_rounds"])


def fleet(
    count: int, r: int
) -> tuple[dict[str, lora.AdapterState], nn.Module, nn.Module, nn.Module]:
    """States of so many adapters; all of them on one base, ours and PEFT's; and a model that takes one at a time."""
    states = {f"adapter {i}": factor_state(injected("plain", r, seed=i)) for i in range(count)}
    ours = load_adapters(lab.load_base(SETTINGS["model"])[0], states).eval()
    one = injected("plain", r).eval()
    theirs = get_peft_model(
        lab.load_base(SETTINGS["model"])[0], config(r), adapter_name="adapter 0"
    )
    for name in list(states)[1:]:
        theirs.add_adapter(name, config(r))
    for name, state in states.items():
        for module, tensors in split_state(state).items():
            peft = theirs.base_model.model.get_submodule(module)
            peft.lora_A[name].weight.data.copy_(tensors["A"])
            peft.lora_B[name].weight.data.copy_(tensors["B"])
    return states, ours, one, theirs.eval()


@torch.no_grad()
def served(count: int) -> dict[str, list[float]]:
    """One forward pass of rows of one token that use `count` adapters: as one batch (with the copying), by groups, and in PEFT."""
    s = SETTINGS["served"]
    states, ours, one, theirs = fleet(count, s["r"])
    base, _ = lab.load_base(SETTINGS["model"])
    ids, names = tokens(s["rows"], 1), [f"adapter {i % count}" for i in range(s["rows"])]

    def by_groups() -> None:
        for name, state in states.items():
            use_adapter(one, state)
            one(input_ids=ids[[i for i, n in enumerate(names) if n == name]], use_cache=False)

    def batched() -> None:
        with rows(ours, names):
            ours(input_ids=ids, use_cache=False)

    arms = {
        "base": lambda: base(input_ids=ids, use_cache=False),
        "batched": batched,
        "by groups": by_groups,
        "peft": lambda: theirs(input_ids=ids, adapter_names=names, use_cache=False),
    }
    return race(arms, s["rounds"])


@torch.no_grad()
def generated() -> dict[str, list[float]]:
    """Cached, greedy generation of rows that use several adapters; and that all wrote the same."""
    s = SETTINGS["generate"]
    states, ours, one, theirs = fleet(s["adapters"], s["r"])
    base, _ = lab.load_base(SETTINGS["model"])
    ids, names = (
        tokens(s["rows"], s["prompt"]),
        [f"adapter {i % s['adapters']}" for i in range(s["rows"])],
    )
    how = {
        "max_new_tokens": s["new"],
        "min_new_tokens": s["new"],
        "do_sample": False,
        "pad_token_id": 0,
    }

    def batched() -> torch.Tensor:
        with rows(ours, names):
            return ours.generate(ids, **how)

    def by_groups() -> torch.Tensor:
        written = torch.empty(len(ids), s["prompt"] + s["new"], dtype=ids.dtype)
        for name, state in states.items():
            own = [i for i, n in enumerate(names) if n == name]
            written[own] = use_adapter(one, state).generate(ids[own], **how)
        return written

    def peft() -> torch.Tensor:
        return theirs.generate(input_ids=ids, adapter_names=names, **how)

    same = [float((batched() == other()).all(1).float().mean()) for other in (by_groups, peft)]
    arms = {
        "base": lambda: base.generate(ids, **how),
        "batched": batched,
        "by groups": by_groups,
        "peft": peft,
    }
    return race(arms, s["rounds"]) | {"rows written alike": same}


def trained(kind: str, domain: str, seed: int) -> dict[str, object]:
    """Bits a byte on test text after training on one domain."""
    model, tokenizer = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    model = inject(model, config(SETTINGS["r"]), layer=LAYERS[kind])
    losses = study.fit(
        model,
        training_rows(domain),
        SETTINGS["learning_rate"],
        seed,
        SETTINGS["steps"],
        SETTINGS["batch"],
        disable_tqdm=True,
    )
    bits = lab.bits_per_byte(
        model, tokenizer, lab.load_text(domain, "test"), max_bytes=SETTINGS["test_bytes"]
    )
    return {"bits_per_byte": bits, "last_loss": losses[-1]}


def training_rows(domain: str):
    """The text that an adapter of a domain is trained on."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(lab.load_text(domain, "train"), SETTINGS["train_bytes"], piece=8192)
    return lab.blocks(tokenizer, texts, SETTINGS["length"])


def machine() -> dict[str, object]:
    """What the times were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = (
        [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        if cpuinfo.exists()
        else []
    )
    return {
        "processor": (lines or [platform.processor()])[0],
        "cores": len(lines),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def main() -> None:
    torch.set_num_threads(1)
    results = study.Study(study.STUDIES / "4_4_fused.json", SOURCES, SETTINGS)
    start = time.perf_counter()

    def run(key: str, function: Callable[[], dict[str, Any]]) -> None:
        results.run(key, function)
        print(f"{(time.perf_counter() - start) / 60:5.1f} min  {key}", flush=True)

    run("machine", machine)
    for kind in ("plain", "fused", "peft"):
        for r in SETTINGS["memory_ranks"]:
            for mode, dropout in (("fp32", 0.0), ("dropout", SETTINGS["dropout"])):
                run(
                    f"memory/{mode}/{r}/{kind}",
                    lambda k=kind, r=r, d=dropout: memory(k, r, d, False),
                )
        for dropout in (0.0, SETTINGS["dropout"]):
            run(
                f"process/{dropout:g}/{kind}",
                lambda k=kind, d=dropout: {
                    "grown": lab.process_peak("tools.studies.fused:process_step", k, d).grown
                },
            )
    for r in SETTINGS["step_ranks"]:
        for mode, dropout in (("fp32", 0.0), ("dropout", SETTINGS["dropout"])):
            run(f"step/{mode}/{r}", lambda r=r, d=dropout: step_times(r, d))
    run("layer", layer_times)
    for r in SETTINGS["orders"]["ranks"]:
        run(f"orders/{r}", lambda r=r: order_times(r))
    for count in SETTINGS["tokens"]:
        run(f"latency/{count}", lambda c=count: latency(c))
    for count in SETTINGS["served"]["adapters"]:
        run(f"served/{count}", lambda c=count: served(c))
    run("generate", generated)
    for seed in SETTINGS["seeds"]:
        for domain in SETTINGS["domains"]:
            for kind in LAYERS:
                run(
                    f"trained/{domain}/{seed}/{kind}",
                    lambda k=kind, d=domain, s=seed: trained(k, d, s),
                )
    for kind in ("plain", "fused", "peft"):
        run(
            f"memory/autocast/{SETTINGS['autocast_rank']}/{kind}",
            lambda k=kind: memory(k, SETTINGS["autocast_rank"], 0.0, True),
        )


if __name__ == "__main__":
    main()
