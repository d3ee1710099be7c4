"""The recipe of chapter 3.1."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_course import lab
from lora_course.adaptive import rank_history
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject
from lora_course.states import factor_state
from tests.models import config, randomize
from tests.recipes import opening, recipe, small


@pytest.mark.parametrize(("top", "growths"), [("n", 1), ("n // 4", 4)])
def test_3_1_goes_on_from_peft_grows_and_exports_plain_lora(
    top: str, growths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    export_peft(randomize(inject(base, config(r=3, lora_alpha=9)), 1), "adapters/old")
    code = small(recipe("3_1_adaptive"), steps=7)
    assert code.count("start=20, every=10") == code.count("top=n") == 1
    code = code.replace("start=20, every=10", "start=2, every=1").replace("top=n", f"top={top}")
    given = {
        "texts": lab.load_text("bible", "train")[:40],
        "held_out": opening(lab.load_text("bible", "validation")[:8]),
    }
    exec(code, given)
    model = given["model"]
    totals = [sum(entry["ranks"].values()) for entry in rank_history(model)]
    assert totals == [3 * 28 + 16 * 28 * i // growths for i in range(growths + 1)]
    assert {layer.scaling for layer in adapter_layers(model).values()} == {9 / 3}
    exported = read_factors("adapters/grown")
    for name, tensor in factor_state(model).items():
        assert torch.equal(exported[name].to(tensor), tensor), name
    pairs = [layer.pairs for layer in adapter_layers(model).values()]
    assert all(B.any() for of_layer in pairs for _, B in of_layer)

    # the way with PEFT alone: the same function at the larger rank, and new rows within PEFT's bound that can learn
    old, wider = (
        load_file(f"adapters/{name}/adapter_model.safetensors") for name in ("old", "wider")
    )
    for key, tensor in wider.items():
        side = 0 if ".lora_A." in key else 1
        kept, new = tensor.split([3, 16], dim=side)
        assert torch.equal(kept, old[key])
        bound = tensor.shape[1] ** -0.5
        assert not new.any() if side else 0.9 * bound < new.abs().max() <= bound
    plain = PeftModel.from_pretrained(lab.load_base("nano")[0], "adapters/old")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = plain(input_ids=ids).logits
    larger = PeftModel.from_pretrained(
        lab.load_base("nano")[0], "adapters/wider", is_trainable=True
    )
    assert larger.peft_config["default"].r == 19
    found = larger(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits.detach(), before, atol=1e-4, rtol=1e-4)
    found.loss.backward()
    learning = [p.grad[:, 3:] for name, p in larger.named_parameters() if ".lora_B." in name]
    assert len(learning) == 28 and all(gradient.any() for gradient in learning)
