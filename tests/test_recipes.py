"""The recipe of each chapter ("Use it") runs as it stands, on a small model in place of the large one."""

import re
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as Linear4bitLora
from safetensors.torch import load_file

from lora_course import adalora, experts, lab, qlora
from lora_course.adaptive import rank_history
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject, unload
from lora_course.states import factor_state, use_adapter
from tests.models import config, randomize
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
def test_1_1_trains_on_four_bits_and_exports_what_peft_loads_on_the_same_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"texts": lab.load_text("shakespeare", "train")[:2]}
    exec(small(recipe("1_1_qlora"), steps=3), given)
    layers = adapter_layers(given["model"])
    assert len(layers) == 28 and all(
        type(layer.base_layer) is Linear4bit for layer in layers.values()
    )
    # the first step's rate is 0 (warm-up); from the second on every B moves, by about the rate a step
    assert all(layer.B.abs().max() > 1e-5 for layer in layers.values())

    base = qlora.load_4bit(lab.base_path("nano"))
    served = PeftModel.from_pretrained(base, tmp_path / "adapters" / "mine")
    for name, layer in layers.items():
        twin = served.base_model.model.get_submodule(name)
        assert isinstance(twin, Linear4bitLora)
        A, B = twin.lora_A["default"].weight, twin.lora_B["default"].weight
        torch.testing.assert_close(twin.scaling["default"] * B @ A, layer.delta_weight())


@pytest.mark.slow
def test_1_2_meets_its_budget_and_exports_plain_lora_of_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = recipe("1_2_adalora")
    assert LARGE in code and code.count("1000") == 1  # the steps of run and schedule
    for large, small_one in (
        (LARGE, repr(str(lab.base_path("nano")))),
        ("1000", "20"),
        ("512", "64"),
    ):
        code = code.replace(large, small_one)
    given = {"texts": lab.load_text("bible", "train")[:40]}
    exec(code, given)
    model = given["model"]
    ranks = adalora.kept_triplets(model)
    assert len(ranks) == 28 and sum(ranks.values()) == 8 * 28
    assert len(set(ranks.values())) > 1  # chosen in the whole model, not a share for each
    written = load_file(tmp_path / "adapters" / "law" / "adapter_model.safetensors")
    A = {name: w for name, w in written.items() if "lora_A" in name}
    assert {len(w) for w in A.values()} == {max(ranks.values())}
    # rows that no triplet fills are zeros
    assert sum((w != 0).any(1).sum().item() for w in A.values()) == 8 * 28


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


@pytest.mark.slow
def test_4_4_trains_fused_exports_and_serves_three_tenants_in_one_call(
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
