"""The study of chapter 3.2: four domain teachers into one student of half their rank, and what else four adapters can become.

    python tools/studies/distillation.py     about 20 minutes on one core; goes on where it was stopped

Students have one rank, one scale, the same rows in the same order and as many steps. Trained on the mixed text alone, and
distilled by domain, each gets every learning rate of the grid with every seed; the rate is chosen by the mean bits a byte on
validation text, mean over domains, and only the chosen one's runs are scored on the test text. The other distilled students
take the rate of the one distilled by domain. Merged adapters and a mixture of the teachers choose their one setting (a
weight, a router's rate) on validation text too (the router's with the first seed alone). Writes lora_course/data/studies/3_2_distillation.json.

Teachers have read more than students: 192 rows of one domain each, against 64 rows of each of the four.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch import Tensor, nn

from lora_course import experts, lab, lora
from lora_course.arguments import training_arguments
from lora_course.distillation import (
    DistillationConfig,
    DistillationTrainer,
    Teachers,
    distillation_step,
    mixture_log_probs,
)
from lora_course.injection import inject, merge, trainable_parameters, unload
from lora_course.lab import study
from lora_course.states import adapter_state, concatenate, truncate, use_adapter

ROOT = Path(__file__).resolve().parents[2]
# What the teachers' mixture is made of: each row's own teacher, all four equally, or all four's logits equally.
DISTILLED = {
    "by domain": {"by_domain": True},
    "by domain, reverse KL": {"by_domain": True, "divergence": "reverse"},
    "equal weights": {"by_domain": False},
    "equal weights, logits": {"by_domain": False, "mixture": "logits"},
}
SETTINGS = {
    "model": "nano", "domains": ["bible", "shakespeare", "milton", "python"], "train_bytes": 160_000, "score_bytes": 8_000,
    "batch": 8, "length": 128, "seeds": [0, 1, 2], "teacher": {"r": 8, "steps": 24, "learning_rate": 8e-3},
    "student": {"r": 4, "steps": 32}, "learning_rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2], "alpha": 0.5, "temperature": 1.0,
    "distilled": DISTILLED, "temperatures": [2.0, 4.0, 8.0], "merge_weights": [0.25, 0.5, 1.0],
    "router_rates": [3e-2, 1e-1, 3e-1, 1.0], "latency": {"batch": 8, "length": 128, "repeats": 15},
}  # fmt: skip
DOMAINS = SETTINGS["domains"]
SOURCES = [
    Path(__file__),
    *(
        ROOT / "lora_course" / name
        for name in ("distillation", "experts", "lora.py", "training.py")
    ),
    *(ROOT / "lora_course/lab" / name for name in ("study.py", "corpora.py")),
    ROOT / "lora_course/data/nano/model.safetensors",
    *(ROOT / f"lora_course/data/text/{domain}.parquet" for domain in DOMAINS),
]


# ---------------------------------------------------------------------------------------------------- data and models


@functools.cache
def rows(domain: str) -> datasets.Dataset:
    """All rows of a domain that anyone reads."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = lab.excerpt(lab.load_text(domain, "train"), SETTINGS["train_bytes"], piece=8192)
    return lab.blocks(tokenizer, texts, SETTINGS["length"])


@functools.cache
def mixed_rows() -> datasets.Dataset:
    """What the students read: equally many rows of each domain, which say of which they are."""
    count = SETTINGS["student"]["steps"] * SETTINGS["batch"] // len(DOMAINS)
    parts = [
        rows(d).select(range(count)).add_column("domain", [i] * count)
        for i, d in enumerate(DOMAINS)
    ]
    return datasets.concatenate_datasets(parts).with_format("torch")


def injected(r: int, seed: int) -> nn.Module:
    """nano with a new adapter; alpha = 2r, so that the scale is 2 throughout."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    return inject(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))


@functools.cache
def teacher_states(seed: int) -> dict[str, lora.AdapterState]:
    """One adapter a domain, each trained on its own text."""
    states, recipe = {}, SETTINGS["teacher"]
    for domain in DOMAINS:
        model = injected(recipe["r"], seed)
        plan = (recipe["learning_rate"], seed, recipe["steps"], SETTINGS["batch"])
        study.fit(model, rows(domain), *plan, disable_tqdm=True)
        states[domain] = adapter_state(model)
    return states


def train_on_data(rate: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A student that sees the mixed text alone."""
    model = injected(SETTINGS["student"]["r"], seed)
    start = time.perf_counter()
    plan = (rate, seed, SETTINGS["student"]["steps"], SETTINGS["batch"])
    losses = study.fit(model, mixed_rows(), *plan, disable_tqdm=True)
    return model, {"losses": losses, "seconds": time.perf_counter() - start}


def train_distilled(
    kind: str, rate: float, seed: int, **settings: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A student of the four teachers; the recipe is that of `study.fit`."""
    model, how = injected(SETTINGS["student"]["r"], seed), dict(DISTILLED[kind])
    weights = torch.eye(len(DOMAINS)) if how.pop("by_domain") else None
    teachers = Teachers(model, teacher_states(seed), weights)
    usual = {"alpha": SETTINGS["alpha"], "temperature": SETTINGS["temperature"]}
    config = DistillationConfig(**usual | how | settings)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(
            folder, learning_rate=rate, seed=seed, max_steps=SETTINGS["student"]["steps"], warmup_steps=0.1,
            lr_scheduler_type="linear", per_device_train_batch_size=SETTINGS["batch"], save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = DistillationTrainer(
            model, args, teachers=teachers, config=config, train_dataset=mixed_rows()
        )
        start = time.perf_counter()
        trainer.train()
    seconds = time.perf_counter() - start
    history = {key: [entry[key] for entry in trainer.history] for key in ("task", "divergence")}
    return model, {
        "losses": history["task"],
        "divergences": history["divergence"],
        "seconds": seconds,
    }


def merged(weight: float, seed: int) -> lora.AdapterState:
    """The sum of the teachers' updates, each times `weight`, cut to the student's rank."""
    states = list(teacher_states(seed).values())
    return truncate(concatenate(states, [weight] * len(states)), SETTINGS["student"]["r"])


def train_router(rate: float, seed: int) -> nn.Module:
    """The teachers as frozen experts behind trained routers (chapter 2.1): all of them stay, and run at once."""
    model, _ = lab.load_base(SETTINGS["model"])
    torch.manual_seed(seed)
    experts.mix_experts(model, list(teacher_states(seed).values()))
    plan = (rate, seed, SETTINGS["student"]["steps"], SETTINGS["batch"])
    study.fit(model, mixed_rows(), *plan, disable_tqdm=True)
    return model


class Ensemble(nn.Module):
    """The teachers' mixture as one model: a forward pass of each for every answer."""

    def __init__(self, teachers: Teachers, mixture: str) -> None:
        super().__init__()
        self.model, self.config = teachers.model, teachers.model.config
        self.each, self.settings = teachers, DistillationConfig(mixture=mixture)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        each = []
        for name in self.each.names:
            with self.each.switched(name) as model:
                each.append(model(input_ids=input_ids, use_cache=False).logits)
        return SimpleNamespace(logits=mixture_log_probs(each, None, self.settings))


def ensemble(seed: int, mixture: str) -> Ensemble:
    return Ensemble(
        Teachers(injected(SETTINGS["student"]["r"], seed), teacher_states(seed)), mixture
    )


# ----------------------------------------------------------------------------------------------------------- measures


def score(model: nn.Module, split: str, domains: list[str] = DOMAINS) -> dict[str, float]:
    """Bits a byte on a sample of a split, by domain."""
    _, tokenizer = lab.load_base(SETTINGS["model"])
    texts = {domain: lab.load_text(domain, split) for domain in domains}
    most = SETTINGS["score_bytes"]
    return {
        d: lab.bits_per_byte(model, tokenizer, text, max_bytes=most) for d, text in texts.items()
    }


def score_state(
    state: lora.AdapterState, split: str, domains: list[str] = DOMAINS
) -> dict[str, float]:
    return score(use_adapter(injected(SETTINGS["student"]["r"], 0), state), split, domains)


def own_teachers(seed: int) -> dict[str, Any]:
    """Each domain's test text with that domain's teacher."""
    states = teacher_states(seed)
    return result(
        {domain: score_state(states[domain], "test", [domain])[domain] for domain in DOMAINS}
    )


def result(scores: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"bits_per_byte": statistics.fmean(scores.values()), "by_domain": scores} | more


def scored(trained: tuple[nn.Module, dict[str, Any]], split: str) -> dict[str, Any]:
    model, history = trained
    seconds = round(history.pop("seconds"), 2)
    curves = {key: [round(x, 4) for x in values] for key, values in history.items()}
    return result(
        score(model, split), parameters=trainable_parameters(model), seconds=seconds, **curves
    )


def forward_times(seed: int) -> dict[str, float]:
    """Milliseconds of a forward pass of each way to serve four domains, median of repeats that take turns."""
    how, base = SETTINGS["latency"], lab.load_base(SETTINGS["model"])[0]
    ids = mixed_rows()["input_ids"][: how["batch"]][:, : how["length"]]
    student, inside = (
        use_adapter(injected(SETTINGS["student"]["r"], seed), merged(1.0, seed)) for _ in range(2)
    )
    mixed, _ = lab.load_base(SETTINGS["model"])
    experts.mix_experts(mixed, list(teacher_states(seed).values()))
    models = {
        "base": base,
        "student": student,
        "student, merged into the base": unload(merge(inside)),
        "mixture of experts": mixed,
        "all four teachers": ensemble(seed, "probabilities"),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(how["repeats"] + 1):  # the first turn warms up
            for name, model in models.items():
                start = time.perf_counter()
                model.eval()(input_ids=ids, use_cache=False)
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(statistics.median(values[1:]), 2) for name, values in times.items()}


def memory(seed: int) -> dict[str, Any]:
    """Bytes: of the base, of one teacher as an adapter, of the student; and what a training step allocates at its peak."""
    base, states = lab.load_base(SETTINGS["model"])[0], teacher_states(seed)
    model = injected(SETTINGS["student"]["r"], seed)
    model.train()
    batch = mixed_rows()[: SETTINGS["batch"]]
    plain = {key: value for key, value in batch.items() if key != "domain"}
    peaks = {"data alone": lambda: model(**plain, use_cache=False).loss.backward()}
    for count in range(1, len(states) + 1):
        teachers = Teachers(model, dict(list(states.items())[:count]))
        peaks[f"{count} teachers"] = lambda teachers=teachers: distillation_step(
            teachers, plain
        ).loss.backward()
    steps = {}
    for name, step in peaks.items():
        step()  # gradients exist from here on
        steps[name] = lab.peak_memory(step)[1]
    return {
        "base_bytes": lab.tensor_bytes(base),
        "teacher_bytes": sum(t.nbytes for t in states[DOMAINS[0]].values()),
        "student_bytes": sum(tensor.nbytes for tensor in adapter_state(model).values()),
        "step_peak_bytes": steps,
    }


# ----------------------------------------------------------------------------------------------------------- the runs


def main() -> None:
    results = study.Study(study.STUDIES / "3_2_distillation.json", SOURCES, SETTINGS)
    seeds, start = SETTINGS["seeds"], time.perf_counter()

    def run(key: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = results.run(key, function)
        note = f"{found['bits_per_byte']:.4f} bits a byte" if "bits_per_byte" in found else ""
        print(f"{(time.perf_counter() - start) / 60:5.1f} min  {key:48} {note}", flush=True)
        return found

    def best(
        arm: str,
        choices: list[float],
        validate: Callable[[float, int], dict[str, Any]],
        seeds: list[int] = seeds,
    ) -> float:
        """Every choice with every seed on validation text; the choice with the lowest mean."""
        runs = {
            c: [run(f"{arm}/{c:g}/{s}/validation", lambda c=c, s=s: validate(c, s)) for s in seeds]
            for c in choices
        }
        return min(
            runs, key=lambda c: statistics.fmean(found["bits_per_byte"] for found in runs[c])
        )

    def distilled(kind: str, rate: float, seed: int, split: str, **settings: Any) -> dict[str, Any]:
        return scored(train_distilled(kind, rate, seed, **settings), split)

    run("base/test", lambda: result(score(lab.load_base(SETTINGS["model"])[0], "test")))
    grid = SETTINGS["learning_rates"]
    alone = best(
        "data alone", grid, lambda rate, seed: scored(train_on_data(rate, seed), "validation")
    )
    rate = best(
        "by domain", grid, lambda rate, seed: distilled("by domain", rate, seed, "validation")
    )
    weight = best(
        "merged",
        SETTINGS["merge_weights"],
        lambda w, s: result(score_state(merged(w, s), "validation")),
    )
    rates = SETTINGS["router_rates"]
    router = best(
        "experts", rates, lambda r, s: result(score(train_router(r, s), "validation")), seeds[:1]
    )
    for seed in seeds:
        run(
            f"data alone/{alone:g}/{seed}/test",
            lambda seed=seed: scored(train_on_data(alone, seed), "test"),
        )
        for kind in DISTILLED:
            run(
                f"{kind}/{rate:g}/{seed}/test",
                lambda kind=kind, seed=seed: distilled(kind, rate, seed, "test"),
            )
        run(
            f"merged/{weight:g}/{seed}/test",
            lambda seed=seed: result(score_state(merged(weight, seed), "test")),
        )
        run(
            f"experts/{router:g}/{seed}/test",
            lambda seed=seed: result(score(train_router(router, seed), "test")),
        )
        run(f"own teacher/{seed}/test", lambda seed=seed: own_teachers(seed))
        for mixture in ("probabilities", "logits"):
            key = f"ensemble, {mixture}/{seed}/test"
            run(
                key,
                lambda mixture=mixture, seed=seed: result(score(ensemble(seed, mixture), "test")),
            )
    for temperature in SETTINGS["temperatures"]:
        for squared in (True, False):
            for seed in seeds:
                how = {"temperature": temperature, "temperature_squared": squared}
                key = (
                    f"sweep/{temperature:g}/{'with' if squared else 'without'} T²/{seed}/validation"
                )
                run(
                    key,
                    lambda how=how, seed=seed: distilled(
                        "by domain", rate, seed, "validation", **how
                    ),
                )
    run(
        "latency",
        lambda: {"milliseconds": forward_times(seeds[0]), "threads": torch.get_num_threads()},
    )
    run("memory", lambda: memory(seeds[0]))


if __name__ == "__main__":
    main()
