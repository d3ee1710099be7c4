"""The recipe of chapter 2.1."""

from pathlib import Path

import pytest

from lora_course import experts, lab
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, unload
from tests.models import config, randomize
from tests.recipes import recipe, small


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
    # started at a size of 0.02; two steps of a rate of 0.08 move entries further than that
    assert all(router.abs().max() > 0.05 for router in routers)
