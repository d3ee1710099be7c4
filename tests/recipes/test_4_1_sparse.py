"""The recipe of chapter 4.1."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_course import lab, load_adapter, sparse
from lora_course.injection import adapter_layers
from tests.recipes import LARGE, recipe


@pytest.mark.slow
def test_4_1_closes_the_gates_that_start_small_exports_one_rank_and_keeps_an_update_by_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = recipe("4_1_sparse")
    knobs = "rate, steps, penalty = 1e-3, 2000, 0.5"
    assert LARGE in code and knobs in code
    for large, small_one in (
        (LARGE, repr(str(lab.base_path("nano")))),
        # a hundredth of the steps takes as much with a hundred times the penalty
        (knobs, "rate, steps, penalty = 1e-3, 20, 50"),
        ("512", "64"),
    ):
        code = code.replace(large, small_one)
    given = {"texts": lab.load_text("bible", "train")[:40]}
    exec(code, given)
    model = given["model"]
    ranks = sparse.open_gates(model)
    # 38% of 448 normal gates start within the 0.5 that the schedule takes: 172, with a deviation of 10
    assert len(ranks) == 28 and 448 - 172 - 40 < sum(ranks.values()) < 448 - 172 + 40
    assert {len(layer.A) for layer in adapter_layers(model).values()} == set(ranks.values())
    written = load_file(tmp_path / "adapters" / "law" / "adapter_model.safetensors")
    A = [w for name, w in written.items() if "lora_A" in name]
    assert {len(w) for w in A} == {max(ranks.values())}
    # rows that no rank fills are zeros
    assert sum((w != 0).any(1).sum().item() for w in A) == sum(ranks.values())
    masked = adapter_layers(given["masked"])
    again = adapter_layers(load_adapter(lab.load_base("nano")[0], "adapters/law-update"))
    assert len(masked) == 28
    for name, layer in masked.items():
        assert len(layer.values_delta) == 16 * sum(layer.base_layer.weight.shape)
        assert layer.values_delta.any()
        assert torch.equal(again[name].delta_weight(), layer.delta_weight())
