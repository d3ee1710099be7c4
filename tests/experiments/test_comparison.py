"""`lora_course.experiments.comparison`: one rule for all methods, and what is read from its record."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_course.experiments import base_of, comparison, methods
from lora_course.experiments.comparison import METHODS, SETTINGS, STUDY, paired, series, table
from lora_course.experiments.methods import Method
from lora_course.experiments.peft_methods import from_loras_start
from lora_course.injection import adapter_layers, trainable_parameters
from lora_course.lab import study

SMALL = {
    "steps": 20,
    "batch": 2,
    "length": 32,
    "train_bytes": 60_000,
    "score_bytes": {"validation": 500, "test": 500, "own_domain": 500},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setitem(SETTINGS, name, value)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Nothing is trained: quality is a parabola in the exponent of the rate, best where the test says, and calls are counted."""
    calls, best = [], {"lora": 8e-3, "dora": 6.4e-2}

    def train(method: str, domain: str, rate: float, seed: int) -> tuple[str, float, int]:
        calls.append((method, domain, rate, seed))
        return method, rate, seed

    def score(domain: str, trained: tuple[str, float, int], split: str) -> dict[str, Any]:
        method, rate, seed = trained
        quality = 2 + 0.01 * math.log2(rate / best[method]) ** 2 + 0.001 * seed
        costs = dict.fromkeys(("parameters", "file_bytes", "model_bytes", "step_bytes"), 1)
        return {"bits_per_byte": quality, "own_domain": 1.5, "seconds": 1.0} | costs

    bits = lambda model, domain, split: 1.3 if domain == "glosses" else 3.0  # noqa: E731
    for name, fake in {"train": train, "score": score, "bits_per_byte": bits}.items():
        monkeypatch.setattr(comparison, name, fake)
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_each_method_ends_with_about_as_many_parameters_as_lora_and_at_its_scale(
    small, method: str
) -> None:
    trained = comparison.train(method, "python", 4e-3, 0)
    found, values = trained[0], comparison.score("python", trained, "test")
    plain = trainable_parameters(methods.lora(SETTINGS, 0).model)
    # a tenth, since what moves ranks between layers has a budget of ranks, and they cost less in small layers; gates have none
    most = 0.5 if method == "gates" else 0.1
    assert abs(values["parameters"] / plain - 1) < most
    assert len(found.losses) == SMALL["steps"] and all(math.isfinite(x) for x in found.losses)
    assert 1 < values["bits_per_byte"] < 5 and values["file_bytes"] > 0
    assert values["step_bytes"] > 1e6
    base = base_of(SETTINGS)
    assert values["bits_per_byte"] != comparison.bits_per_byte(base, "python", "test")
    if not METHODS[method].title.endswith("(PEFT)"):
        layers = adapter_layers(found.model).values()
        assert {round(layer.scaling, 6) for layer in layers} == {SETTINGS["scaling"]}


def test_pefts_layers_in_transformers_trainer_go_the_way_of_ours(
    small, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same function, start, rows, order and schedule: what differs between two methods is the method. fp32, since bf16
    # rounds at other places in the two implementations.
    monkeypatch.setattr("lora_course.arguments.compute_dtype", lambda device=None: torch.float32)
    alpha = SETTINGS["scaling"] * math.sqrt(SETTINGS["r"])
    makes = {
        "ours": methods.lora,
        "peft": from_loras_start,
        "rslora": functools.partial(from_loras_start, use_rslora=True, lora_alpha=alpha),
    }
    losses = {}
    for name, make in makes.items():
        monkeypatch.setitem(METHODS, name, Method(name, make, "", ""))
        losses[name] = comparison.train(name, "python", 8e-3, 3)[0].losses
    assert losses["ours"] == pytest.approx(losses["peft"], abs=2e-3)
    assert losses["ours"] == pytest.approx(losses["rslora"], abs=2e-3)
    last = comparison.ordered_rows("python", 3)[-SMALL["batch"] :]["input_ids"]
    with torch.no_grad():
        untrained = base_of(SETTINGS)(input_ids=last, labels=last).loss.item()
    assert abs(losses["ours"][-1] - untrained) > 0.1  # and it has gone somewhere


def test_the_chosen_rate_alone_is_tested_and_lora_at_twice_its_rate_too(
    quick, tmp_path: Path
) -> None:
    arms = ["lora/python", "dora/python"]
    record = STUDY.run(tmp_path / "r.json", arms=arms, progress=str)
    assert study.tried_rates(record, "lora/python") == [4e-3, 8e-3, 1.6e-2]
    assert study.tried_rates(record, "dora/python")[-3:] == [3.2e-2, 6.4e-2, 0.128]
    assert study.chosen_rate(record, "dora/python") == 6.4e-2
    twice = [key for key in record["runs"] if key.endswith("/twice")]
    assert twice == [f"lora/python/0.016/{seed}/twice" for seed in SETTINGS["seeds"]]
    # what was searched is not trained again to be tested; of twice the rate the model is not held
    assert len(quick) == 3 + 6 + 2 * 4 + 5
    assert record["runs"]["base/python/test"] == {"bits_per_byte": 3.0}
    assert comparison.methods_in(record, "python") == ["lora", "dora"]
    assert comparison.methods_in(record, "shakespeare") == []


def test_the_table_says_what_the_record_holds(quick, tmp_path: Path) -> None:
    record = STUDY.run(tmp_path / "r.json", arms=["lora/python", "dora/python"], progress=str)
    found = table(record, "python")
    assert list(found.index) == ["LoRA", "DoRA (PEFT)"] and found.loc["LoRA", "minus LoRA's"] == ""
    assert found.loc["DoRA (PEFT)", "forgetting"].startswith("0.200 ±")
    assert found.loc["DoRA (PEFT)", "learning rate"] == "0.064"
    assert list(table(record, "python", ["dora"]).index) == ["DoRA (PEFT)"]
    alone = copy.deepcopy(record)
    alone["runs"] = {key: run for key, run in record["runs"].items() if not key.startswith("lora/")}
    assert table(alone, "python").loc["DoRA (PEFT)", "minus LoRA's"] == ""


def test_values_are_paired_by_seed_and_forgetting_is_what_the_base_lost() -> None:
    values = {"lora": [2.0, 2.1, 2.2, 2.3, 2.4], "dora": [2.01, 2.12, 2.19, 2.33, 2.41]}
    runs = {"base/glosses/test": {"bits_per_byte": 1.5}}
    for method, found in values.items():
        for seed, value in enumerate(found):
            runs[f"{method}/python/0.004/{seed}/validation"] = {"bits_per_byte": value + 1}
            runs[f"{method}/python/0.008/{seed}/test"] = {"bits_per_byte": value, "own_domain": 2 * value}  # fmt: skip
    record = {"study": "s", "settings": {"seeds": list(range(5)), "own_domain": "glosses"}, "runs": runs}  # fmt: skip
    assert series(record, "dora", "python") == values["dora"]
    forgotten = series(record, "lora", "python", "forgetting")
    assert forgotten == pytest.approx([2.5, 2.7, 2.9, 3.1, 3.3])
    assert paired(record, "dora", "python") == pytest.approx([0.01, 0.02, -0.01, 0.03, 0.01])
    lost = paired(record, "dora", "python", "forgetting")
    assert lost == pytest.approx([0.02, 0.04, -0.02, 0.06, 0.02])
    with pytest.raises(KeyError, match="qlora/python: not in the record"):
        series(record, "qlora", "python")


def test_no_chosen_rate_of_the_committed_record_lies_at_an_edge() -> None:
    record = study.load_study(STUDY.name)
    for domain in comparison.DOMAINS:
        assert comparison.methods_in(record, domain) == list(METHODS)
        for method in METHODS:
            tried = study.tried_rates(record, f"{method}/{domain}")
            assert min(tried) < study.chosen_rate(record, f"{method}/{domain}") < max(tried)
