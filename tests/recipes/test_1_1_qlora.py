"""The recipe of chapter 1.1."""

import json
import math
import re
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
from tests.recipes import LARGE, opening, recipe
from tests.recipes.test_0_1_lora import TEMPLATE
from tests.recipes.test_0_1_lora import parts as of_0_1

CHANCE = math.log(4096)  # nats, over nano's vocabulary


def parts() -> tuple[str, str, str]:
    """The training with PEFT alone, the training with the package, the merge: on nano, three steps each, on a CPU."""
    code = recipe("1_1_qlora").replace(LARGE, repr(str(lab.base_path("nano"))))
    # Trainer wants to be told of a CPU, which has nothing to page
    for stated, here, count in (
        ("max_steps=500", "max_steps=3", 2),
        ("warmup_steps=25", "warmup_steps=1", 1),
        ('bf16=True, optim="paged_adamw_32bit"', "bf16=True, use_cpu=True", 1),
    ):
        assert code.count(stated) == count, stated
        code = code.replace(stated, here)
    alone, rest = code.split("# pip install git+")
    resumed, merging = rest.split("model = None")
    return alone, "# " + resumed, "model = None" + merging


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What chapter 0.1's first step and its fold for plain text make, without the model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = lab.load_base("nano")
    model.save_pretrained("nano")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("nano")
    chats, _, _, plain = of_0_1(steps=3)
    chats, count = re.subn(r"^model = .*\n", "", chats, flags=re.MULTILINE)
    assert count == 1
    texts = opening(lab.excerpt(lab.load_text("shakespeare", "train"), 90_000))
    given: dict[str, Any] = {"texts": texts, "pairs": [("Who is there?", "A friend.")]}
    exec(chats + plain, given)
    assert not set(map(str, given["held_out"]["input_ids"])) & set(map(str, given["rows"]["input_ids"]))  # fmt: skip
    return given


def check(losses: dict[str, float], best: str) -> None:
    """Each rate trained from the base, on its own; the best one is what `adapters/mine` holds."""
    assert len(set(losses.values())) == 3
    assert 2 < min(losses.values()) <= max(losses.values()) < CHANCE
    assert best == min(losses, key=losses.get)  # type: ignore[arg-type]
    files = [Path("adapters", name, "adapter_model.safetensors") for name in ("mine", best)]
    assert files[0].read_bytes() == files[1].read_bytes()
    config = json.loads(Path("adapters/mine/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


def trained(code: str, given: dict[str, Any]) -> Any:
    """The code, and the last model that it trained."""
    exec(
        code.replace("    del model, trainer", "    trained = model\n    del model, trainer"), given
    )
    return given["trained"]


@pytest.mark.slow
def test_1_1_trains_on_four_bits_with_peft_and_merges_what_the_base_really_was(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    alone, _, merging = parts()
    model = trained(alone, given)
    check(given["losses"], given["best"])
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    twins = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bitLora)}
    # the first step's rate is 0 (warm-up); from the second on every B moves, by about the rate a step
    assert len(twins) == 28
    assert all(t.lora_B["default"].weight.abs().max() > 1e-5 for t in twins.values())

    lines = recipe("0_1_lora")  # those that try the result, as the text says
    lines = lines[lines.index("asked = tokenizer") : lines.index('model.save_pretrained("adapters/mine")')]  # fmt: skip
    exec(lines, given)
    assert "<user>Who is there?\n<assistant>" in capsys.readouterr().out

    ids = given["rows"][:2]["input_ids"]
    adapted = given["model"].eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # three steps move less than bf16 rounds
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained("adapters/mine")
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits.float()
        with adapted.disable_adapter():
            before = adapted(input_ids=ids).logits.float()
        exec(merging, given)
        merged = AutoModelForCausalLM.from_pretrained("merged")(input_ids=ids).logits.float()
    # what the adapter does is four times what is allowed below, so a merge that drops it would fail
    assert (wanted - before).norm() > 0.2 * wanted.norm()
    # bf16 has 8 bits for each weight of the sum
    assert (merged - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.slow
def test_1_1_exports_what_peft_loads_on_the_same_base(given: dict[str, Any]) -> None:
    _, resumed, _ = parts()
    layers = adapter_layers(trained(resumed, given))
    check(given["losses"], given["best"])
    assert len(layers) == 28
    assert all(type(layer.base_layer) is Linear4bit for layer in layers.values())
    assert all(layer.B.abs().max() > 1e-5 for layer in layers.values())
    finished, losses = {f: f.stat().st_mtime_ns for f in Path("runs").rglob("*.safetensors")}, given["losses"]  # fmt: skip
    exec(resumed, given)  # a list may be run again
    assert finished and all(f.stat().st_mtime_ns == before for f, before in finished.items())
    assert given["losses"] == losses and given["losses"] is not losses

    served = PeftModel.from_pretrained(qlora.load_4bit(lab.base_path("nano")), "adapters/mine")
    for name, layer in adapter_layers(given["model"]).items():
        twin = served.base_model.model.get_submodule(name)
        assert isinstance(twin, Linear4bitLora)
        A, B = twin.lora_A["default"].weight, twin.lora_B["default"].weight
        torch.testing.assert_close(twin.scaling["default"] * B @ A, layer.delta_weight())
