"""`lora_course.lab.study`: one training that is paired by seed, and what a record says of itself."""

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from lora_course.injection import inject
from lora_course.lab import blocks, load_base, load_text
from lora_course.lab.study import (
    budget,
    chosen_rate,
    fit,
    load_study,
    provenance,
    series,
    tried_rates,
)


def test_fit_repeats_itself_and_the_seed_orders_the_rows() -> None:
    def train(seed: int) -> list[float]:
        model, tokenizer = load_base("nano")
        rows = blocks(tokenizer, load_text("bible", "validation")[:6], 32)
        torch.manual_seed(0)
        inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
        return fit(model, rows, 1e-2, seed=seed, steps=4, batch=2, disable_tqdm=True)

    first = train(1)
    assert len(first) == 4
    assert train(1) == first
    assert train(2) != first


def test_fit_takes_what_a_method_adds_to_the_training() -> None:
    class Counter(TrainerCallback):
        seen: list[int] = []

        def on_optimizer_step(self, args, state, control, **_) -> None:
            self.seen.append(state.global_step + 1)

    model, tokenizer = load_base("nano")
    rows = blocks(tokenizer, load_text("bible", "validation")[:6], 32)
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    added = {"callbacks": [Counter()], "auxiliary_loss": lambda m: torch.tensor(100.0)}
    losses = fit(model, rows, 1e-2, 0, 2, 2, **added, disable_tqdm=True)
    assert Counter.seen == [1, 2] and min(losses) > 100


def record_of(runs: dict[str, dict], **settings: object) -> dict:
    return {"study": "s", "settings": {"seeds": [0, 1]} | settings, "runs": runs, "made": [], "verified": None}  # fmt: skip


RUNS = {
    "base/test": {"bits_per_byte": 3.0},
    "lora/0.004/0/validation": {"bits_per_byte": 2.5, "parameters": 10},
    "lora/0.008/0/validation": {"bits_per_byte": 2.4, "parameters": 10},
    "lora/0.016/0/validation": {"bits_per_byte": 2.6, "parameters": 10},
    "lora/0.004/1/validation": {"bits_per_byte": 2.3, "parameters": 10},
    "lora/0.008/1/validation": {"bits_per_byte": 2.35, "parameters": 10},
    "lora/0.016/1/validation": {"bits_per_byte": 2.6, "parameters": 10},
    "lora/0.008/0/test": {"bits_per_byte": 2.45, "parameters": 10},
    "lora/0.008/1/test": {"bits_per_byte": 2.47, "parameters": 12},
    "short/python/0.004/0/test": {"bits_per_byte": 2.9},
    "top/0/0/test": {"bits_per_byte": 1.0},
    "top/0.1/0/test": {"bits_per_byte": 1.0},
}


def test_the_budget_is_read_from_the_record() -> None:
    settings = {"steps": 60, "batch": 4, "length": 128, "score_bytes": {"validation": 1, "test": 40_000}, "arm_steps": {"short": 8, "top": 0}}  # fmt: skip
    table = budget(record_of(RUNS, **settings))
    assert list(table.index) == ["lora", "short/python", "top/0", "top/0.1"]
    assert dict(table.loc["lora"]) == {
        "parameters": "10 to 12", "steps": 60, "rows a step": 4, "tokens a row": 128, "tokens read": "30,720",
        "rates tried": "0.004, 0.008, 0.016", "rate": "0.008", "agree": "1 of 2", "seeds": "0, 1", "test bytes": "40,000",
    }  # fmt: skip
    assert table.loc["short/python", "steps"] == 8 and table.loc["short/python", "agree"] == ""
    assert table.loc["top/0", "tokens read"] == "0" and table.loc["top/0", "rate"] == ""


def test_rates_and_series_of_an_arm_whose_name_may_hold_a_slash() -> None:
    record = record_of(RUNS)
    assert (
        tried_rates(record, "lora") == [4e-3, 8e-3, 1.6e-2] and chosen_rate(record, "lora") == 8e-3
    )
    assert series(record, "lora") == [2.45, 2.47] and series(record, "lora", "parameters") == [
        10,
        12,
    ]
    assert chosen_rate(record, "short/python") == 4e-3 and tried_rates(record, "short/python") == []
    with pytest.raises(KeyError, match="dora: not in the record; `lora-course study run s --arms"):
        series(record, "dora")


def test_provenance_is_a_sentence_of_when_and_how_far() -> None:
    made = {
        "date": "2026-11-24",
        "commit": "bcf0bcb",
        "versions": {"torch": "2.13.0"},
        "keys": ["a"],
    }
    record = record_of({}) | {"made": [made, made | {"date": "2026-11-26", "commit": None}]}
    assert provenance(record) == (
        "Recorded from 2026-11-24 to 2026-11-26; no run was repeated since."
    )
    verified = {
        "date": "2026-12-01", "commit": "1234567", "keys": ["a"], "reason": "", "holds": True,
        "largest": {"bits_per_byte": 0.0012, "own_domain": 0.001, "parameters": 0},
        "within": {"bits_per_byte": 0.01, "own_domain": 0.02, "parameters": 0},
    }  # fmt: skip
    off = "; one run, repeated on 2026-12-01, differs by 0.0012 in bits a byte (0.01 allowed)."
    assert provenance(record | {"verified": verified}).endswith(off)
    same = verified | {"largest": dict.fromkeys(verified["largest"], 0)}
    assert provenance(record | {"verified": same}).endswith("came out the same.")
    assert provenance(record | {"verified": verified | {"holds": False}}).endswith("DID NOT HOLD.")
    assert provenance(record_of({})) == "Nothing is recorded yet."


def test_a_committed_record_is_loaded_by_its_name() -> None:
    record = load_study("1_2_adalora")
    assert chosen_rate(record, "adalora") == 3.2e-2 and len(series(record, "adalora")) >= 3
    with pytest.raises(ValueError, match="has no record; there are"):
        load_study("1_2_adalroa")
