"""The recipe of chapter 1.2."""

import re
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from lora_course import adalora, lab
from tests.recipes import LARGE, opening, recipe, small
from tests.recipes.test_0_1_lora import PEFT, ROW, TEMPLATE, pairs


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


@pytest.mark.slow
def test_1_2_trains_on_the_chats_of_chapter_0_1_and_scores_the_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = lab.load_base("nano")
    model.save_pretrained("nano")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("nano")
    chats = small(recipe("0_1_lora"), 4, ROW).split(PEFT)[0]
    code = recipe("1_2_adalora").replace(LARGE, '"nano"').replace("1000", "12")
    for (
        pattern,
        new,
    ) in (  # what the text says: 0.1's rows and held_out without its model, and another score
        (r"^rows = .*\n", ""),
        (r"train_dataset=rows", "train_dataset=rows, eval_dataset=held_out"),
        (r"^score = .*$", 'score = trainer.evaluate()["eval_loss"]'),
        (r'"deltaT": 10', '"deltaT": 2'),  # of 12 steps
    ):
        code, count = re.subn(pattern, new, code, flags=re.MULTILINE)
        assert count == 1
    chats, count = re.subn(r"^model = .*\n", "", chats.replace(str(lab.base_path("nano")), "nano"), flags=re.MULTILINE)  # fmt: skip
    assert count == 1
    given = {"pairs": pairs(50)}
    exec(chats, given)
    assert "model" not in given
    exec(code, given)
    assert 0 < given["score"] < 12  # nats a token; chance over nano's vocabulary is 8.3
    assert len(given["held_out"]) == 20
    assert sum(adalora.kept_triplets(given["model"]).values()) == 8 * 28
    assert Path("adapters/mine-0.0008/adapter_model.safetensors").is_file()
