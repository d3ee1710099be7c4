"""The recipe of chapter 4.4."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_course import lab
from lora_course.export import export_peft
from lora_course.injection import disabled, inject, unload
from lora_course.serving import row_adapters
from tests.models import config, randomize, relative
from tests.recipes import recipe, small
from tools.chapters import ROOT


def use_it(stem: str) -> str:
    """The section "Use it" of a chapter's source."""
    source = (ROOT / "notebooks" / f"{stem}.md").read_text()
    return source[source.index("\n## Use it") : source.index("\n## The idea")]


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
    code = re.findall(r"^```python\n(.*?)^```", use_it("4_4_fused"), re.MULTILINE | re.DOTALL)[1]
    name = str(lab.base_path("nano"))
    given = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "name": name,
        "tokenizer": AutoTokenizer.from_pretrained(name),
        "unload": unload,
    }
    exec(code.replace('dtype="auto"', "dtype=torch.float32"), given | {"torch": torch})
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
