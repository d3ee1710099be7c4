"""The recipe of each chapter ("Use it") runs as it stands, on a small model in place of the large one."""

import re
from pathlib import Path

import pytest
import torch

from lora_course import experts, lab
from lora_course.adaptive import rank_history
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject, unload
from lora_course.states import factor_state, use_adapter
from tests.models import config, randomize
from tools.run_chapters import ROOT

LARGE = '"Qwen/Qwen2.5-7B-Instruct"'


def recipe(stem: str) -> str:
    """The Python under "Use it" of a chapter's source."""
    source = (ROOT / "notebooks" / f"{stem}.md").read_text()
    section = source[source.index("\n## Use it") : source.index("\n## The idea")]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code


def small(code: str, steps: int) -> str:
    """The recipe with nano in place of the large model, and few steps."""
    shorter, count = re.subn(r"max_steps=\d+", f"max_steps={steps}", code)
    assert LARGE in code and count == 1
    return shorter.replace(LARGE, repr(str(lab.base_path("nano"))))


@pytest.mark.slow
def test_2_1_puts_three_folders_of_peft_under_a_router_and_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    for seed, name in enumerate(("law", "code", "support")):
        export_peft(randomize(inject(base, config(r=2 + seed)), seed), f"adapters/{name}")
        unload(base)
    given = {"mixed": lab.load_text("bible", "train")[:40]}
    exec(small(recipe("2_1_experts"), steps=2), given)
    model = given["model"]
    assert (tmp_path / "adapters" / "mixture" / "adapter.safetensors").is_file()
    assert experts.expert_state(model, 2).keys() and len(adapter_layers(model)) == 28
    routers = [layer.router for layer in adapter_layers(model).values() if hasattr(layer, "router")]
    assert len(routers) == 4
    # started at a size of 0.02; two steps of a rate of 0.05 move entries further than that
    assert all(router.abs().max() > 0.05 for router in routers)


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
