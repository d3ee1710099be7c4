"""The recipe of each chapter ("Use it") runs as it stands, on a small model in place of the large one."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_course import experts, lab
from lora_course.export import export_peft, load_peft
from lora_course.injection import adapter_layers, disabled, inject, merge, unload
from lora_course.serving import row_adapters
from tests.models import config, randomize, relative
from tools.run_chapters import ROOT

LARGE = '"Qwen/Qwen2.5-7B-Instruct"'


def use_it(stem: str) -> str:
    """The section "Use it" of a chapter's source."""
    source = (ROOT / "notebooks" / f"{stem}.md").read_text()
    return source[source.index("\n## Use it") : source.index("\n## The idea")]


def recipe(stem: str) -> str:
    """The Python under "Use it" of a chapter's source."""
    (code,) = re.findall(r"^```python\n(.*?)^```", use_it(stem), re.MULTILINE | re.DOTALL)
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
def test_4_4_trains_fused_exports_and_serves_three_tenants_in_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    export_peft(randomize(inject(base, config(r=2)), 1), "adapters/code")
    given = {"texts": lab.load_text("bible", "train")[:40]}
    code = recipe("4_4_fused")
    exec(small(code, steps=2), given)
    model, batch = given["model"], given["batch"]
    with row_adapters(model, ["law", "code", None]), torch.no_grad():
        logits = model(**batch).logits[:, -1]
    with disabled(model), torch.no_grad():
        without = model(**batch).logits[:, -1]
    assert relative(logits[0], without[0]) > 1e-3 and relative(logits[1], without[1]) > 0.05
    torch.testing.assert_close(logits[2], without[2])


@pytest.mark.slow
def test_4_4_merges_one_adapter_into_a_plain_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, ids = lab.load_base("nano")[0], torch.arange(12)[None]
    adapted = randomize(inject(model, config(r=2)), 1).eval()
    export_peft(adapted, "adapters/law")
    expected = adapted(ids).logits
    given = {"model": unload(adapted), "merge": merge, "unload": unload, "load_peft": load_peft}
    lines = re.findall(r"`((?:merge|unload)\(.+?\))`", use_it("4_4_fused"))
    assert len(lines) == 2
    for line in lines:
        exec(line, given)
    served = AutoModelForCausalLM.from_pretrained("served")
    assert not any("lora" in name for name, _ in served.named_parameters())
    # the merged weights are rounded once more, 6e-8 of each; logits are of the order of ten
    torch.testing.assert_close(served(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_4_4_the_server_is_told_what_the_recipe_made() -> None:
    section = use_it("4_4_fused")
    code = recipe("4_4_fused")
    assert re.search(r"--max-lora-rank (\d+)", section)[1] == re.search(r"\br=(\d+)", code)[1]
    modules = re.search(r"--lora-modules (.+)", section)[1].split()
    served = re.findall(r'"(\w+)": "(adapters/\w+)"', code)
    assert [tuple(module.split("=")) for module in modules] == served
    assert '"model": "law"' in section
