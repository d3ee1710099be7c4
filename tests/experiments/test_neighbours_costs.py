"""`neighbours_costs`: bytes that can be counted by hand, the same in every run, and times that take turns."""

from typing import Any

import pytest
import torch
from torch import nn

from lora_course.experiments import neighbours_costs as costs
from lora_course.experiments.fused_costs import saved_bytes
from lora_course.experiments.neighbours import LINES


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"batch": 2, "length": 16, "steps": 2, "train_bytes": 9_000, "rounds": 2}.items():  # fmt: skip
        monkeypatch.setitem(costs.SETTINGS, key, value)


def test_all_rows_of_the_chapters_table_are_measured_beside_lora() -> None:
    assert set(costs.METHODS) == {"lora", *LINES}


def test_numbers_and_state_are_those_of_the_formulas() -> None:
    base = costs.comparison.base_of(costs.SETTINGS)
    linear = [m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    both = sum(m.out_features + m.in_features for m in linear)
    out = sum(m.out_features for m in linear)
    found = {name: costs.counted(name) for name in ("lora", "dora", "lora_fa", "beft")}
    trained = {name: of["trained"] for name, of in found.items()}
    assert trained == {"lora": 8 * both, "dora": 8 * both + out, "lora_fa": 8 * out, "beft": out}
    counters = (2, 3, 0, 1)  # tensors a layer that count steps; LoRA-FA counts them in a number
    for (name, of), each in zip(found.items(), counters, strict=True):
        assert of["optimizer"] == 8 * trained[name] + 4 * each * len(linear)
    # frozen A needs no wide input for its gradient; DoRA builds each layer's whole weight for its norms
    assert found["lora_fa"]["saved"] < found["lora"]["saved"] < found["dora"]["saved"]
    assert all(of["peak"] > of["saved"] for of in found.values())
    assert costs.counted("dora") == found["dora"]


def test_what_a_model_holds_anyway_is_not_counted_as_kept() -> None:
    module, x = nn.Module(), torch.randn(4, 3, requires_grad=True)
    module.register_buffer("shared", torch.randn(3, 5))
    other = torch.randn(3, 5)
    assert saved_bytes(module, lambda: x @ module.shared) == 0
    assert saved_bytes(module, lambda: x @ other) == 4 * 3 * 5


def test_a_graph_that_is_dropped_on_the_way_keeps_nothing() -> None:
    x, other = torch.randn(4, 3, requires_grad=True), torch.randn(3, 5)

    def run() -> torch.Tensor:
        length = (x @ torch.randn(3, 7)).norm().detach()
        return length * (x @ other)

    assert saved_bytes(nn.Module(), run) == 4 * 3 * 5 + 4  # the length as well


def test_times_are_ratios_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {name: costs.METHODS[name] for name in ("lora", "plus", "lora_fa")}
    monkeypatch.setattr(costs, "METHODS", methods)
    found = costs.timed()
    assert found["ratios"]["lora"] == [1, 1] and len(found["lora_seconds"]) == 2
    assert all(len(v) == 2 and min(v) > 0 for v in found["ratios"].values())
    one = {"saved": 200, "trained": 50}
    record: dict[str, Any] = {"runs": {"times": {"ratios": {"dora": [1.2, 9.0, 1.3]}}}}
    record["runs"] |= {"bytes/lora": one, "bytes/dora": {"saved": 300, "trained": 60}}
    assert costs.times_loras(record, "dora", "saved") == 1.5
    assert costs.times_loras(record, "dora", "time") == 1.3
