"""The recipe of chapter 3.1."""

from pathlib import Path

import pytest
import torch

from lora_course import lab
from lora_course.adaptive import rank_history
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject
from lora_course.states import factor_state, use_adapter
from tests.models import config, randomize
from tests.recipes import recipe, small


@pytest.mark.slow
def test_3_1_grows_over_a_run_goes_on_from_peft_and_exports_plain_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    export_peft(randomize(inject(base, config(r=3, lora_alpha=9)), 1), "adapters/old")
    code = small(recipe("3_1_adaptive"), steps=7)
    assert code.count("start=40, every=10") == code.count("rows =") == 1
    code = code.replace("start=40, every=10", "start=2, every=1")
    code = code.replace("rows =", "use_adapter(model, read_factors('adapters/old'))\nrows =")
    given = {
        "texts": lab.load_text("bible", "train")[:40],
        "use_adapter": use_adapter,
        "read_factors": read_factors,
    }
    exec(code, given)
    model, schedule = given["model"], given["schedule"]
    totals = [sum(entry["ranks"].values()) for entry in rank_history(model)]
    assert totals == [3 * 28, *(3 * 28 + 28 * i for i in range(1, 6))]
    assert schedule.budget == 8 * 28 == totals[-1]
    exported = read_factors("adapters/grown")
    for name, tensor in factor_state(model).items():
        assert torch.equal(exported[name].to(tensor), tensor), name
    assert all(layer.pairs[-1][1].any() for layer in adapter_layers(model).values())
