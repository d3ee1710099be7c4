"""The recipe of chapter 1.1."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as Linear4bitLora
from transformers import AutoModelForCausalLM

from lora_course import lab, qlora
from lora_course.injection import adapter_layers
from tests.recipes import opening, recipe, small
from tests.recipes.test_0_1_lora import TEMPLATE


@pytest.mark.slow
def test_1_1_trains_on_four_bits_and_exports_what_peft_loads_on_the_same_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {
        "texts": opening(lab.excerpt(lab.load_text("shakespeare", "train"), 90_000))
    }
    code, alone, merging = small(recipe("1_1_qlora"), steps=3).split("import torch\n")
    exec(code, given)
    layers = adapter_layers(given["model"])
    assert len(layers) == 28 and all(
        type(layer.base_layer) is Linear4bit for layer in layers.values()
    )
    # the first step's rate is 0 (warm-up); from the second on every B moves, by about the rate a step
    assert all(layer.B.abs().max() > 1e-5 for layer in layers.values())
    assert not set(map(str, given["held_out"]["input_ids"])) & set(map(str, given["rows"]["input_ids"]))  # fmt: skip
    losses, folder = given["losses"], tmp_path / "adapters"
    assert len(set(losses.values())) == 3  # each rate trained from the base, on its own
    assert (
        2 < min(losses.values()) <= max(losses.values()) < math.log(4096)
    )  # of chance over nano's vocabulary
    assert given["best"] == min(losses, key=losses.get)
    mine, best = (folder / name / "adapter_model.safetensors" for name in ("mine", given["best"]))
    assert mine.read_bytes() == best.read_bytes()
    config = json.loads((folder / "mine" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"

    lines = recipe("0_1_lora")  # those that try the result, as the text says
    lines = lines[lines.index("asked = tokenizer") : lines.index('export_peft(model, "adapters/mine")')]  # fmt: skip
    given["tokenizer"].chat_template, given["pairs"] = TEMPLATE, [("Who is there?", "A friend.")]
    exec(lines, given)
    assert "<user>Who is there?\n<assistant>" in capsys.readouterr().out

    base = qlora.load_4bit(lab.base_path("nano"))
    served = PeftModel.from_pretrained(base, tmp_path / "adapters" / "mine")
    for name, layer in layers.items():
        twin = served.base_model.model.get_submodule(name)
        assert isinstance(twin, Linear4bitLora)
        A, B = twin.lora_A["default"].weight, twin.lora_B["default"].weight
        torch.testing.assert_close(twin.scaling["default"] * B @ A, layer.delta_weight())

    ids = given["rows"][:2]["input_ids"]
    for layer in layers.values():  # three steps move less than bf16 rounds
        torch.nn.init.normal_(layer.B, std=0.1)
    with torch.no_grad():
        before, wanted = (m.eval()(input_ids=ids).logits.float() for m in (base, given["model"]))
        exec("import torch\n" + merging, given)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        merged = plain(input_ids=ids).logits.float()
    # what the adapter does is four times what is allowed below, so a merge that drops it would fail
    assert (wanted - before).norm() > 0.2 * wanted.norm()
    # bf16 has 8 bits for each weight of the sum
    assert (merged - wanted).norm() < 0.05 * wanted.norm()

    # With PEFT alone. Trainer wants to be told of a CPU, which has nothing to page.
    on_cpu = alone.replace("bf16=True", "bf16=True, use_cpu=True")
    exec("import torch\n" + on_cpu.replace("paged_adamw_32bit", "adamw_torch"), given)
    twins = {n: m for n, m in given["model"].named_modules() if isinstance(m, Linear4bitLora)}
    assert len(twins) == 28
    assert any(getattr(m, "gradient_checkpointing", False) for m in given["model"].modules())
    assert all(t.lora_B["default"].weight.abs().max() > 1e-5 for t in twins.values())
    assert 2 < float(capsys.readouterr().out.split()[-1]) < math.log(4096)
    again = PeftModel.from_pretrained(base, tmp_path / "adapters" / "plain-peft")
    for name, module in twins.items():
        twin = again.get_submodule(name)
        torch.testing.assert_close(twin.lora_B["default"].weight.cpu(), module.lora_B["default"].weight.cpu(), atol=1e-6, rtol=1e-6)  # fmt: skip
