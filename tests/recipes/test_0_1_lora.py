"""The recipe of chapter 0.1."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_course import lab, load_adapter
from tests.recipes import recipe, small


@pytest.mark.slow
def test_0_1_trains_an_adapter_that_peft_loads_and_merges_it_into_a_plain_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, tokenizer = lab.load_base("nano")
    base.save_pretrained("nano")  # in fp32, so that the merge is exact; its own file is in 16 bits
    tokenizer.save_pretrained("nano")
    code = small(recipe("0_1_lora"), steps=2).replace(str(lab.base_path("nano")), "nano")
    given = {"texts": lab.excerpt(lab.load_text("shakespeare", "train"), 90_000)}
    exec(code, given)
    losses = given["losses"]
    assert len(set(losses.values())) == 3  # each rate trained from the base, on its own
    kept_runs = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}
    exec(code.replace("4e-4)", "4e-4, 8e-4)"), given)  # one more rate, as the text says
    assert given["losses"] == losses | {8e-4: given["losses"][8e-4]}
    assert all(path.stat().st_mtime_ns == before for path, before in kept_runs.items())
    losses = given["losses"]
    ids = lab.blocks(tokenizer, lab.load_text("glosses", "test"), 32)[:4]["input_ids"]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        chosen = load_adapter(copy.deepcopy(base), f"adapters/{min(losses, key=losses.get)}")
        kept = chosen(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, "adapters/mine")(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained("merged")(input_ids=ids).logits
    torch.testing.assert_close(kept, adapted, atol=1e-4, rtol=1e-4)  # of the best rate
    # two steps move the logits a hundred times as far as fp32 rounds them
    assert (adapted - before).abs().max() > 0.01
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
