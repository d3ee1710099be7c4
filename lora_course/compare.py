"""The comparison: methods that train one adapter on one task, side by side, under one rule.

    lora-course compare                                  # all methods, two domains; goes on where it was stopped
    lora-course compare --methods lora dora --domains shakespeare --out mine.json

Same base, same text in the same order, same number of steps, same schedule, same search for the learning rate, as many
parameters in the end as plain LoRA of rank 8 (or as near as a method allows), same effective scale s = 2. Seed 0 tries the
three middle rates of a grid in factors of two; while the best lies at an edge of what was tried, the next rate on that side
is tried too. Best is the lowest bits a byte on validation text: one seed is enough to tell rates apart, as all of them see the
same rows from the same start. The chosen rate gets all five seeds, and only its runs are scored on test text. (Plain LoRA also
at twice that rate, as `twice`: what a rate that is too high costs. Nothing is chosen by it.)

A run is stored under `method/domain/rate/seed/split` with a hash of all that makes it: the method's own sources, the ground
floor, this file's code that it passes through, settings, weights, text. A changed variant makes its own runs stale, and the
next call computes those again, and no others.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import platform
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from lora_course import lab, progressive
from lora_course.adalora import AdaLoRALinear, RankAllocator, prune, regularizer
from lora_course.adaptive import GrowingLoRALinear, GrowthSchedule, RankGrower
from lora_course.checkpoint import save_adapter
from lora_course.hierarchical import NestedLoRALinear
from lora_course.injection import adapter_layers, inject, trainable_parameters
from lora_course.lab import study
from lora_course.qlora import quantize_model
from lora_course.quantized import QuantizedLoRALinear, save_quantized
from lora_course.sparse import GatedLoRALinear, GateSparsity, SparseDeltaLinear
from lora_course.sparse import prune as prune_gates
from lora_course.training import compute_dtype, training_arguments

PACKAGE = Path(__file__).resolve().parent
RECORD = study.STUDIES / "5_1_comparison.json"
DOMAINS = ("shakespeare", "python")
SETTINGS: dict[str, Any] = {
    "model": "nano", "own_domain": "glosses", "steps": 32, "batch": 4, "length": 128, "train_bytes": 1_000_000,
    "score_bytes": {"validation": 10_000, "test": 20_000, "own_domain": 10_000}, "seeds": [0, 1, 2, 3, 4], "search_seeds": [0],
    "learning_rates": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128, 0.256], "first": [4e-3, 8e-3, 1.6e-2],
    "r": 8, "scaling": 2.0,
}  # fmt: skip
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t, two-sided 95%, by the number of values."""

# ------------------------------------------------------------------------------------------------ the methods


@dataclasses.dataclass
class Arm:
    """A model about to be trained, and what its method adds to the training.

    fit: (rows, learning rate, seed) → losses; the course's recipe by default.
    finish: called after the training, before the model is scored; what is served comes out of it.
    parameters: how many numbers the served adapter has; by default those that were trained and are still there.
    save: writes the served adapter to a folder; `save_adapter` by default.
    """

    model: nn.Module
    callbacks: Sequence[TrainerCallback] = ()
    auxiliary_loss: Callable[[nn.Module], torch.Tensor] | None = None
    fit: Callable[[datasets.Dataset, float, int], list[float]] | None = None
    finish: Callable[[nn.Module], object] | None = None
    parameters: Callable[[nn.Module], int] = trainable_parameters
    save: Callable[[nn.Module, Path], object] = save_adapter


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the comparison.

    make: seed → the arm, with its factors drawn.    modules: the files of `lora_course` that are its own.
    chapter: where it is taught.    note: what it has in another way than plain LoRA, as the table says it.
    """

    title: str
    make: Callable[[int], Arm]
    modules: tuple[str, ...]
    chapter: str
    note: str


def base_model() -> nn.Module:
    return lab.load_base(SETTINGS["model"])[0]


def config(**fields: Any) -> LoraConfig:
    """Rank and scale of the comparison on all linear layers."""
    r = SETTINGS["r"]
    return LoraConfig(
        **{"r": r, "lora_alpha": SETTINGS["scaling"] * r, "target_modules": "all-linear", **fields}
    )


def make_lora(seed: int) -> Arm:
    torch.manual_seed(seed)
    return Arm(inject(base_model(), config()))


def make_qlora(seed: int) -> Arm:
    model = quantize_model(base_model())
    torch.manual_seed(seed)
    return Arm(inject(model, config()))


def make_peft(seed: int, **fields: Any) -> Arm:
    """PEFT's layers in transformers' own Trainer, starting from the `A`s that the course's LoRA draws with this seed."""
    drawn = adapter_layers(make_lora(seed).model)
    model = get_peft_model(base_model(), config(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for name, layer in drawn.items():
            model.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(layer.A)

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model, training_arguments(folder, **recipe(learning_rate, seed)), train_dataset=rows
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return Arm(model, fit=fit, save=lambda model, folder: model.save_pretrained(folder))


def make_rslora(seed: int) -> Arm:
    return make_peft(seed, use_rslora=True)


def make_dora(seed: int) -> Arm:
    return make_peft(seed, use_dora=True)


def make_adalora(seed: int) -> Arm:
    r, steps = SETTINGS["r"], SETTINGS["steps"]
    start = r * 3 // 2
    torch.manual_seed(seed)
    model = inject(
        base_model(),
        AdaLoraConfig(
            init_r=start, target_r=r, lora_alpha=SETTINGS["scaling"] * start, target_modules="all-linear", orth_reg_weight=0.5,
            tinit=steps // 10, tfinal=steps // 3, deltaT=2, total_step=steps,
        ),
        layer=AdaLoRALinear,
    )  # fmt: skip
    return Arm(model, [RankAllocator(model)], regularizer, finish=prune)


def make_adaptive(seed: int) -> Arm:
    r, steps = SETTINGS["r"], SETTINGS["steps"]
    torch.manual_seed(seed)
    model = inject(
        base_model(),
        config(r=r // 4, lora_alpha=SETTINGS["scaling"] * (r // 4)),
        layer=GrowingLoRALinear,
    )
    layers = len(adapter_layers(model))
    # half of the layers by 2 ranks at a time, from a fifth of the steps on, done after three quarters of them
    schedule = GrowthSchedule(
        layers * r,
        start=steps // 5,
        every=steps // 10,
        top=layers // 2,
        add=2,
        max_r=2 * r,
        seed=seed,
    )
    return Arm(model, [RankGrower(model, schedule)])


def make_progressive(seed: int) -> Arm:
    """Two stages of half the rank and half the steps."""
    model, stages = base_model(), 2

    def fit(rows: datasets.Dataset, learning_rate: float, seed: int) -> list[float]:
        steps = SETTINGS["steps"] // stages
        plan = [
            progressive.Stage(
                SETTINGS["r"] // stages, "all-linear", learning_rate, steps, warmup=0.1
            )
        ] * stages
        share = len(rows) // stages
        settings = {
            key: value
            for key, value in recipe(learning_rate, seed).items()
            if key not in progressive.SET_BY_STAGES
        }
        with tempfile.TemporaryDirectory() as folder:
            results = progressive.train_stages(
                model, plan, [rows.select(range(k * share, (k + 1) * share)) for k in range(stages)], folder,
                scaling=SETTINGS["scaling"], seed=seed, **settings,
            )  # fmt: skip
        return [entry["loss"] for result in results for entry in result["history"]]

    def parameters(model: nn.Module) -> int:
        return sum(
            A.numel() + B.numel()
            for A, B, _ in (layer.factors() for layer in adapter_layers(model).values())
        )

    return Arm(model, fit=fit, parameters=parameters)


def make_gates(seed: int) -> Arm:
    """From rank 12; the penalty under which about 8 were left in a trial. How many are is for the training to say."""
    start = SETTINGS["r"] * 3 // 2
    torch.manual_seed(seed)
    model = inject(
        base_model(), config(r=start, lora_alpha=SETTINGS["scaling"] * start), layer=GatedLoRALinear
    )
    return Arm(model, [GateSparsity(model, penalty=2.5)], finish=prune_gates)


def make_delta(seed: int) -> Arm:
    torch.manual_seed(seed)
    return Arm(inject(base_model(), config(), layer=SparseDeltaLinear))


def make_nested(seed: int) -> Arm:
    torch.manual_seed(seed)
    return Arm(
        inject(
            base_model(),
            config(),
            layer=NestedLoRALinear,
            ranks=(1, 2, 4, 8),
            weighting="matryoshka",
        )
    )


def make_quantized(seed: int) -> Arm:
    torch.manual_seed(seed)
    return Arm(
        inject(base_model(), config(), layer=QuantizedLoRALinear, bits=4), save=save_quantized
    )


METHODS: dict[str, Method] = {
    "lora": Method("LoRA", make_lora, (), "0_1_lora", "the reference"),
    "rslora": Method("rsLoRA (PEFT)", make_rslora, (), "0_1_lora", "the same α, so s = α/√r is √r times LoRA's: at LoRA's own s it would be LoRA"),
    "dora": Method("DoRA (PEFT)", make_dora, (), "0_1_lora", "a magnitude for each output on top of rank 8"),
    "qlora": Method("QLoRA", make_qlora, ("qlora",), "1_1_qlora", "the base in NF4 with double quantisation"),
    "adalora": Method("AdaLoRA", make_adalora, ("adalora",), "1_2_adalora", "from rank 12 down to 8 on average"),
    "progressive": Method("progressive", make_progressive, ("progressive",), "2_2_progressive", "two stages of rank 4 and half the steps"),
    "adaptive": Method("adaptive", make_adaptive, ("adaptive",), "3_1_adaptive", "from rank 2 up to 8 on average"),
    "gates": Method("gates", make_gates, ("sparse",), "4_1_sparse", "from rank 12 down to what the penalty leaves"),
    "delta": Method("ΔW mask", make_delta, ("sparse",), "4_1_sparse", "as many single weights as LoRA has numbers, at random places"),
    "nested": Method("nested", make_nested, ("hierarchical",), "4_2_hierarchical", "trained for the ranks 1, 2, 4 and 8 at once, served at 8"),
    "quantized": Method("4-bit factors", make_quantized, ("quantized",), "4_3_quantized", "factors trained and stored in 4 bits"),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------ one run


def recipe(learning_rate: float, seed: int) -> dict[str, Any]:
    """Fields of `TrainingArguments` that all methods share: those of `lab.study.fit`, and the rows in the order they come."""
    return {
        "learning_rate": learning_rate, "seed": seed, "max_steps": SETTINGS["steps"],
        "per_device_train_batch_size": SETTINGS["batch"], "warmup_steps": 0.1, "lr_scheduler_type": "linear",
        "save_strategy": "no", "train_sampling_strategy": "sequential", "disable_tqdm": True,
    }  # fmt: skip


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    return lab.load_base(SETTINGS["model"])[1]


@functools.cache
def rows_of(domain: str, seed: int) -> datasets.Dataset:
    """The training rows in the order of a seed, as many as the steps need."""
    texts = lab.excerpt(lab.load_text(domain, "train"), SETTINGS["train_bytes"], piece=8192)
    rows = lab.blocks(tokenizer(), texts, SETTINGS["length"]).shuffle(seed=seed)
    return rows.select(range(SETTINGS["steps"] * SETTINGS["batch"]))


def train(method: str, domain: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """One training.

    Returns:
        `model`, ready to be scored; `arm`; `losses` (nats a token at each step); `seconds` (of processor time, of the
        training alone); `step_bytes` (peak of the tensors that one more step allocates, its optimiser's moments included).
    """
    arm, rows = METHODS[method].make(seed), rows_of(domain, seed)
    set_seed(seed)
    start = time.process_time()
    if arm.fit:
        losses = arm.fit(rows, learning_rate, seed)
    else:
        settings = {
            k: v
            for k, v in recipe(learning_rate, seed).items()
            if k not in ("max_steps", "per_device_train_batch_size")
        }
        losses = study.fit(
            arm.model, rows, steps=SETTINGS["steps"], batch=SETTINGS["batch"], callbacks=arm.callbacks,
            auxiliary_loss=arm.auxiliary_loss, **settings,
        )  # fmt: skip
    seconds = time.process_time() - start
    peak = step_bytes(arm, rows)
    if arm.finish:
        arm.finish(arm.model)
    return {
        "arm": arm,
        "model": arm.model,
        "losses": losses,
        "seconds": round(seconds, 2),
        "step_bytes": peak,
    }


def step_bytes(arm: Arm, rows: datasets.Dataset) -> int:
    """Peak of what one optimiser step on one batch allocates, in bytes. At rate zero: the weights stay as they are."""
    ids, dtype = rows[: SETTINGS["batch"]]["input_ids"], compute_dtype("cpu")
    trained = [parameter for parameter in arm.model.parameters() if parameter.requires_grad]

    def step() -> None:
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = arm.model(input_ids=ids, labels=ids, use_cache=False).loss
        if arm.auxiliary_loss:
            loss = loss + arm.auxiliary_loss(arm.model)
        loss.backward()
        optimizer.step()

    arm.model.train()
    arm.model.zero_grad(set_to_none=True)
    peak = lab.peak_memory(step)[1]
    arm.model.zero_grad(set_to_none=True)
    return peak


def bits_per_byte(model: nn.Module, domain: str, split: str) -> float:
    """On the sample of a split that every method is scored on."""
    size = SETTINGS["score_bytes"]["own_domain" if domain == SETTINGS["own_domain"] else split]
    return lab.bits_per_byte(model, tokenizer(), lab.load_text(domain, split), max_bytes=size)


def score(trained: Mapping[str, Any], domain: str, split: str) -> dict[str, Any]:
    """What is recorded of a training. Forgetting and the costs come with the test split only."""
    arm, model = trained["arm"], trained["model"]
    found = {"bits_per_byte": bits_per_byte(model, domain, split), "seconds": trained["seconds"]}
    if split == "validation":
        return found
    with tempfile.TemporaryDirectory() as folder:
        arm.save(model, Path(folder))
        size = max(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    return found | {
        "own_domain": bits_per_byte(model, SETTINGS["own_domain"], split),
        "parameters": arm.parameters(model), "file_bytes": size,
        "model_bytes": lab.tensor_bytes(model), "step_bytes": trained["step_bytes"],
        "last_loss": round(statistics.fmean(trained["losses"][-10:]), 4),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the record


SHARED = (
    recipe,
    tokenizer,
    rows_of,
    train,
    step_bytes,
    bits_per_byte,
    score,
    base_model,
    config,
    make_lora,
    make_peft,
)


def source_hash(method: str, domain: str) -> str:
    """SHA-256 over what makes the runs of a method on a domain; comments and docstrings don't count."""
    files = [
        *(PACKAGE / name for name in ("lora.py", "training.py", "lab/study.py", "lab/corpora.py")),
        *(PACKAGE / f"{name}.py" for name in METHODS[method].modules),
        PACKAGE / "data/nano/model.safetensors",
        *(PACKAGE / f"data/text/{name}.parquet" for name in (domain, SETTINGS["own_domain"])),
    ]
    digest = hashlib.sha256(study.source_hash(files).encode())
    for function in (*SHARED, METHODS[method].make):
        digest.update(_code(inspect.unwrap(function)).encode())
    digest.update(json.dumps(SETTINGS, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _code(function: Callable) -> str:
    """The syntax tree of a function without its docstrings, as text."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def load(path: str | Path = RECORD) -> dict[str, Any]:
    """The record: `settings`, `base` (bits a byte by domain), `methods` (versions, date), `runs`. Empty where there is no file.

    Raises:
        ValueError: the file is no record, or one of other settings.
    """
    path = Path(path)
    if not path.exists():
        return {
            "command": "lora-course compare",
            "settings": SETTINGS,
            "base": {},
            "methods": {},
            "runs": {},
        }
    try:
        record = json.loads(path.read_text())
        settings = record["settings"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} holds no comparison: give the path of a new file, or of one that `lora-course compare` wrote."
        ) from None
    if settings != json.loads(json.dumps(SETTINGS)):
        raise ValueError(
            f"{path} holds a comparison of other settings: move it away, or give another path."
        )
    return record


def _write(
    path: Path,
    runs: Mapping[str, Mapping[str, Any]] | None = None,
    base: Mapping[str, float] | None = None,
) -> None:
    """Adds runs to the file, and drops those of the same method and domain that other sources made. The file is read again
    first, so that two calls for different methods or domains can share it."""
    record = load(path)
    record["base"] |= base or {}
    for key, run in (runs or {}).items():
        method, domain = key.split("/")[:2]
        kept = {
            k: r
            for k, r in record["runs"].items()
            if not k.startswith(f"{method}/{domain}/") or r["source"] == run["source"]
        }
        record["runs"] = kept | {key: dict(run)}
        record["methods"][method] = {
            "title": METHODS[method].title, "note": METHODS[method].note, "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
            "machine": platform.machine(), "dtype": str(compute_dtype("cpu")).removeprefix("torch."),
        }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def compare(
    methods: Iterable[str] = tuple(METHODS),
    domains: Iterable[str] = DOMAINS,
    out: str | Path = RECORD,
    progress: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Computes what the record lacks and writes each run when it is done; killed, the same call goes on.

    Args:
        methods, domains: names in `METHODS` and in the course's text, without the base's own domain.
        out: the record.    progress: is given a line after each run.

    Returns:
        The record.

    Raises:
        ValueError: an unknown method or domain; `out` is something else. Nothing has been computed then.
    """
    methods, domains, out = list(methods), list(domains), Path(out)
    _check(methods, METHODS, "method")
    _check(domains, [name for name in lab.DOMAINS if name != SETTINGS["own_domain"]], "domain")
    load(out)
    # before the first run: a file that is edited later is not what this process computes with
    sources = {
        (method, domain): source_hash(method, domain) for domain in domains for method in methods
    }
    start = time.perf_counter()
    wanted = [d for d in (*domains, SETTINGS["own_domain"]) if d not in load(out)["base"]]
    if wanted:
        model = base_model()
        _write(out, base={domain: bits_per_byte(model, domain, "test") for domain in wanted})
    for domain in domains:
        for position, method in enumerate(methods, 1):
            label = f"{domain} {position}/{len(methods)}"
            _search(
                method,
                domain,
                sources[method, domain],
                out,
                lambda line, label=label: progress(
                    f"{(time.perf_counter() - start) / 60:5.1f} min  {label:18} {line}"
                ),
            )
    return load(out)


def _search(
    method: str, domain: str, source: str, out: Path, progress: Callable[[str], object]
) -> None:
    """All runs of a method on a domain."""
    trained: dict[
        tuple[float, int], dict[str, Any]
    ] = {}  # what is chosen needs no second training for the other split

    def run(rate: float, seed: int, split: str) -> float:
        key = f"{method}/{domain}/{rate:g}/{seed}/{split}"
        found = load(out)["runs"].get(key)
        if not found or found["source"] != source:
            if (rate, seed) not in trained:
                trained[rate, seed] = train(method, domain, rate, seed)
            found = score(trained[rate, seed], domain, "test" if split == "twice" else split) | {
                "source": source
            }
            _write(out, {key: found})
        progress(f"{key:44} {found['bits_per_byte']:.4f} bits a byte")
        return found["bits_per_byte"]

    def validation(rate: float) -> float:
        return statistics.fmean(run(rate, seed, "validation") for seed in SETTINGS["search_seeds"])

    grid, scores = (
        SETTINGS["learning_rates"],
        {rate: validation(rate) for rate in SETTINGS["first"]},
    )
    while (best := min(scores, key=scores.__getitem__)) in (min(scores), max(scores)):
        place = grid.index(best) + (1 if best == max(scores) else -1)
        if not 0 <= place < len(grid):
            raise ValueError(
                f"{method} on {domain}: the best rate, {best:g}, is the last of the grid: extend SETTINGS['learning_rates']."
            )
        scores[grid[place]] = validation(grid[place])
    for seed in SETTINGS["seeds"]:
        run(best, seed, "test")
        if (
            method == "lora"
        ):  # on test text too: what a rate that is twice too high costs, to hold gains against
            run(2 * best, seed, "twice")


def _check(given: Sequence[str], known: Iterable[str], what: str) -> None:
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{what} {unknown[0]!r} is unknown; there are {', '.join(known)}.")
    if not given:
        raise ValueError(f"No {what} is given; there are {', '.join(known)}.")


# ------------------------------------------------------------------------------------------------ reading it


def stale(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """The methods of a record whose runs on a domain were made by other code than that which is here: {method: [domains]}."""
    made: dict[tuple[str, ...], set[str]] = {}
    for key, run in record["runs"].items():
        made.setdefault(tuple(key.split("/")[:2]), set()).add(run["source"])
    found: dict[str, list[str]] = {}
    for (method, domain), sources in made.items():
        if method in METHODS and sources != {source_hash(method, domain)}:
            found.setdefault(method, []).append(domain)
    return found


def chosen_rate(record: Mapping[str, Any], method: str, domain: str) -> float:
    """The rate that the runs on test text have. Raises KeyError if there are none."""
    for key in record["runs"]:
        if key.startswith(f"{method}/{domain}/") and key.endswith("/test"):
            return float(key.split("/")[2])
    raise KeyError(
        f"{method} on {domain}: not in the record; run `lora-course compare --methods {method} --domains {domain}`."
    )


def tried_rates(record: Mapping[str, Any], method: str, domain: str) -> list[float]:
    """The rates that were searched, in order."""
    return sorted(
        {
            float(k.split("/")[2])
            for k in record["runs"]
            if k.startswith(f"{method}/{domain}/") and k.endswith("/validation")
        }
    )


def series(
    record: Mapping[str, Any], method: str, domain: str, quantity: str = "bits_per_byte"
) -> list[float]:
    """A quantity of the runs on test text, one value a seed, in the order of the seeds.

    quantity: a field of the runs, or "forgetting": bits a byte lost on the base's own domain, against the untouched base.
    """
    rate = chosen_rate(record, method, domain)
    field = "own_domain" if quantity == "forgetting" else quantity
    values = [
        record["runs"][f"{method}/{domain}/{rate:g}/{seed}/test"][field]
        for seed in record["settings"]["seeds"]
    ]
    lost = record["base"][record["settings"]["own_domain"]] if quantity == "forgetting" else 0
    return [value - lost for value in values]


def paired(
    record: Mapping[str, Any],
    method: str,
    domain: str,
    quantity: str = "bits_per_byte",
    reference: str = "lora",
) -> list[float]:
    """`method` less `reference`, seed by seed: what the seeds share (text, order, start) drops out."""
    return [
        a - b
        for a, b in zip(
            *(series(record, name, domain, quantity) for name in (method, reference)), strict=True
        )
    ]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95% interval: mean ± t · s / √n, with s the standard deviation of the n values.

    Raises:
        ValueError: fewer than 2 values, or more than 10.
    """
    n = len(values)
    if n not in T_95:
        raise ValueError(f"{n} values: an interval needs 2 to 10 of them.")
    mean, half = statistics.fmean(values), T_95[n] * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def verdict(values: Sequence[float]) -> str:
    """ "lower", "higher" or "within noise": on which side of zero the whole 95% interval of paired differences lies."""
    _, low, high = interval(values)
    return "lower" if high < 0 else "higher" if low > 0 else "within noise"


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other point beats: none is as low or lower in both and lower in one. By the first number."""

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def methods_in(record: Mapping[str, Any], domain: str) -> list[str]:
    """The methods with runs on test text for every seed, in the order of `METHODS`."""
    seeds = record["settings"]["seeds"]
    counts = {
        m: sum(k.startswith(f"{m}/{domain}/") and k.endswith("/test") for k in record["runs"])
        for m in METHODS
    }
    return [method for method, count in counts.items() if count >= len(seeds)]


def table(
    record: Mapping[str, Any], domain: str, methods: Sequence[str] | None = None
) -> pandas.DataFrame:
    """A row a method: mean and 95% interval of quality and forgetting in bits a byte, then what it costs."""
    rows = {}
    for method in methods_in(record, domain):
        if methods is not None and method not in methods:
            continue
        quality, forgetting = (
            interval(series(record, method, domain, name))
            for name in ("bits_per_byte", "forgetting")
        )
        difference = (
            paired(record, method, domain)
            if method != "lora" and "lora" in methods_in(record, domain)
            else None
        )
        costs = {
            name: statistics.median(series(record, method, domain, name))
            for name in ("parameters", "file_bytes", "model_bytes", "step_bytes", "seconds")
        }
        rows[METHODS[method].title] = {
            "bits a byte": f"{quality[0]:.3f} ± {quality[2] - quality[0]:.3f}",
            "minus LoRA's": f"{interval(difference)[0]:+.3f} {verdict(difference)}" if difference else "",
            "forgetting": f"{forgetting[0]:.3f} ± {forgetting[2] - forgetting[0]:.3f}",
            "learning rate": f"{chosen_rate(record, method, domain):g}",
            "parameters": f"{costs['parameters']:,.0f}", "file, kB": f"{costs['file_bytes'] / 1000:.0f}",
            "model, MB": f"{costs['model_bytes'] / 1e6:.1f}", "step, MB": f"{costs['step_bytes'] / 1e6:.0f}",
            "CPU seconds": f"{costs['seconds']:.1f}",
        }  # fmt: skip
    return pandas.DataFrame.from_dict(rows, orient="index")
