"""The recipe of chapter 1.2."""

import re
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from lora_course import adalora, lab
from tests.recipes import LARGE, opening, recipe


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
        ("8e-4", "0.03"),  # nano's: in 20 steps the other moves nothing
    ):
        code = code.replace(large, small_one)
    given = {
        "texts": lab.load_text("bible", "train")[:40],
        "validation": opening(lab.load_text("bible", "validation")[:4]),
    }
    exec(code, given)
    model = given["model"]
    # the printed score, by which rates are compared, is of the adapter in the folder
    base, tokenizer = lab.load_base("nano")
    untrained = lab.bits_per_byte(base, tokenizer, given["validation"])
    served = PeftModel.from_pretrained(base.to(model.dtype), "adapters/mine-0.03")
    scored = lab.bits_per_byte(served, tokenizer, given["validation"])
    assert given["score"] == pytest.approx(scored, abs=1e-3)  # nano's file is in 16 bits
    assert given["score"] < untrained - 0.01
    ranks = adalora.kept_triplets(model)
    assert len(ranks) == 28 and sum(ranks.values()) == 8 * 28
    assert len(set(ranks.values())) > 1  # chosen in the whole model, not a share for each
    written = load_file(tmp_path / "adapters" / "mine-0.03" / "adapter_model.safetensors")
    A = {name: w for name, w in written.items() if "lora_A" in name}
    assert {len(w) for w in A.values()} == {max(ranks.values())}
    # rows that no triplet fills are zeros
    assert sum((w != 0).any(1).sum().item() for w in A.values()) == 8 * 28

    # the lines for a small GPU, which stand there as comments, in four steps
    lines, count = re.subn(r"^( +)# ((?:\w+=\w+,\s?)+)$", r"\1\2", code, flags=re.MULTILINE)
    assert count == 2
    exec(re.sub('"(runs|adapters)/', r'"small/\1/', lines).replace(" 20, ", " 4, "), given)
    assert given["trainer"].state.global_step == 4 and given["how"].gradient_accumulation_steps == 8
    assert given["model"].is_gradient_checkpointing
    assert sum(adalora.kept_triplets(given["model"]).values()) == 8 * 28
