"""The recipe of chapter 4.1."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_course import lab, load_adapter, sparse
from lora_course.injection import adapter_layers
from tests.recipes import LARGE, recipe


@pytest.mark.slow
def test_4_1_closes_some_of_the_gates_that_start_alike_exports_its_ranks_and_keeps_an_update_by_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = recipe("4_1_sparse")
    knobs = "rate, steps, penalty = 1e-3, 6000, 0.5"
    assert LARGE in code and knobs in code
    for large, small_one in (
        (LARGE, repr(str(lab.base_path("nano")))),
        # takes 0.96 of gates that start at one: how Adam moved a gate decides
        (knobs, "rate, steps, penalty = 0.016, 20, 6"),
        ("max_steps=2000", "max_steps=20"),
        ("512", "64"),
    ):
        assert large in code
        code = code.replace(large, small_one)
    given = {"texts": lab.load_text("bible", "train")[:40]}
    gates, update = code.split("import torch\n")
    exec(gates, given)
    model = given["model"]
    ranks = sparse.open_gates(model)
    # 0.96 would leave 34% of 448 normal gates, and all that start at one: only what Adam moved can close them
    assert len(ranks) == 28 and 448 * 0.5 < sum(ranks.values()) < 448
    assert {len(layer.A) for layer in adapter_layers(model).values()} == set(ranks.values())
    written = load_file(tmp_path / "adapters" / "law-0.016" / "adapter_model.safetensors")
    prefix, factor = "base_model.model.", ".lora_A.weight"
    rows = {name: len(w) for name, w in written.items() if name.endswith(factor)}
    assert rows == {f"{prefix}{name}{factor}": r for name, r in ranks.items() if r}
    exec("import torch\n" + update, given)
    assert given["masked"] is model, "one base in memory"
    masked = adapter_layers(model)
    task = torch.load(tmp_path / "adapters" / "law.pt")
    again = adapter_layers(load_adapter(lab.load_base("nano")[0], "adapters/law-update"))
    assert len(masked) == 28
    for name, layer in masked.items():
        assert len(layer.values_delta) == 16 * sum(layer.base_layer.weight.shape)
        assert layer.values_delta.any()
        assert torch.equal(again[name].delta_weight(), layer.delta_weight())
        places, change = task[name]
        assert torch.equal(layer.delta_weight().flatten()[places], change)
