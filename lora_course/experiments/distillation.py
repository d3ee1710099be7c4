"""The study of chapter 3.2: four domain teachers into one student of half their rank, and what else four adapters can become.

Students have one rank, one scale, the same rows in the same order and as many steps. Trained on the mixed text alone, and
distilled by domain, each searches its rate; the other distilled students take the rate of the one distilled by domain. Merged
adapters and a mixture of the teachers choose their one setting (a weight, a router's rate) on validation text too, the router's
with the first seed alone. Bits a byte are means over domains.

Teachers have read more than students: 192 rows of one domain each, against 64 rows of each of the four.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

from torch import nn

from lora_course.experiments import Runs, Study, Witness, base_of
from lora_course.experiments import distillation_costs as costs
from lora_course.experiments import distillation_models as made
from lora_course.experiments.arms import bits_by_domain
from lora_course.experiments.distillation_models import DISTILLED, SETTINGS, Found
from lora_course.experiments.domains import own_bits
from lora_course.experiments.rates import at_rate, choose
from lora_course.injection import trainable_parameters
from lora_course.lora import AdapterState

score = functools.partial(bits_by_domain, SETTINGS)


def result(scores: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"bits_per_byte": statistics.fmean(scores.values()), "by_domain": scores} | more


def scored(served: nn.Module | AdapterState, split: str) -> dict[str, Any]:
    return result(score(served, split))


def trained_result(found: Found, split: str) -> dict[str, Any]:
    model, history = found
    curves = {key: [round(x, 4) for x in history[key]] for key in history if key != "seconds"}
    counted = {"parameters": trainable_parameters(model), "seconds": round(history["seconds"], 2)}
    return scored(model, split) | counted | curves


def of_kind(kind: str, rate: float, seed: int, split: str = "test", **how: Any) -> dict[str, Any]:
    return trained_result(made.distilled(kind, rate, seed, **how), split)


ARMS: dict[str, Callable[[float, int, str], dict[str, Any]]] = {
    "data alone": lambda rate, seed, split: trained_result(made.on_data(rate, seed), split),
    "by domain": functools.partial(of_kind, "by domain"),
    "merged": lambda weight, seed, split: scored(made.merged(weight, seed), split),
    "experts": lambda rate, seed, split: scored(made.with_router(rate, seed), split),
}
"""The arms that choose something, as functions of what they choose, seed and split."""


def body(runs: Runs) -> None:
    rates, seeds, searching = SETTINGS["learning_rates"], runs.seeds, SETTINGS["search_seeds"]
    grids = {
        "data alone": (rates, searching),
        "by domain": (rates, searching),
        "merged": (SETTINGS["merge_weights"], searching),
        "experts": (SETTINGS["router_rates"], searching[:1]),
    }
    tried = sum(len(grid) * len(asked) for grid, asked in grids.values())
    sweep = list(itertools.product(SETTINGS["temperatures"], (True, False)))
    runs.expect(3 + tried + (len(DISTILLED) + 6 + len(sweep)) * len(seeds))
    runs("base/test", lambda: scored(base_of(SETTINGS), "test"))
    best = {}
    for arm, (grid, asked) in grids.items():
        # merged weights were no search beyond an edge: study 3_2_merge goes on below
        best[arm] = choose(runs, arm, ARMS[arm], grid, asked, edges=arm != "merged")
    rate = best["by domain"]
    for arm in ("data alone", "merged", "experts"):
        at_rate(runs, arm, best[arm], lambda r, s: ARMS[arm](r, s, "test"))
    for kind in DISTILLED:
        at_rate(runs, kind, rate, functools.partial(of_kind, kind))
    for seed in seeds:
        own = lambda s: result(own_bits(SETTINGS, made.teacher_states(s), "test"))  # noqa: E731
        runs(f"own teacher/{seed}/test", own, seed)
        for mixture in ("probabilities", "logits"):
            ensemble = lambda m, s: scored(costs.ensemble(s, m), "test")  # noqa: E731
            runs(f"ensemble, {mixture}/{seed}/test", ensemble, mixture, seed)
    for (temperature, squared), seed in itertools.product(sweep, seeds):
        how = {"temperature": temperature, "temperature_squared": squared}
        key = f"sweep/{temperature:g}/{'with' if squared else 'without'} T²/{seed}/validation"
        runs(key, functools.partial(of_kind, **how), "by domain", rate, seed, "validation")
    runs("latency", costs.latency, SETTINGS["seeds"][0])
    runs("memory", costs.memory, SETTINGS["seeds"][0])


WITNESS = Witness(("merged/0.25/0/test",), {"bits_per_byte": 0.005}, chapter="3_2_distillation")
STUDY = Study("3_2_distillation", SETTINGS, body, WITNESS)
