"""The recipe of chapter 2.2."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_course import lab, load_adapter
from lora_course.injection import adapter_layers
from lora_course.progressive import load_stage
from tests.recipes import LARGE, chats, opening, recipe


@pytest.mark.slow
def test_2_2_adds_stages_to_two_that_stay_as_they_were_and_exports_their_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = _recipe()
    texts = lab.load_text("bible", "train")
    months = {
        name: texts[20 * i : 20 * i + 20] for i, name in enumerate(("january", "february", "march"))
    }
    unseen = opening(lab.load_text("bible", "validation")[:3])
    held_out = {name: [text] for name, text in zip(months, unseen, strict=True)}
    given: dict = {"months": months, "held_out": held_out}
    exec(code, given)
    # both ways are scored on every month after every month, one LoRA at the stages' summed rank
    scored = re.findall(r"^(one LoRA|stages) (\d) (\{.*\})$", capsys.readouterr().out, re.MULTILINE)
    assert [(way, int(month)) for way, month, _ in scored] == [
        (way, month) for way in ("one LoRA", "stages") for month in range(3)
    ]
    found = [ast.literal_eval(bits) for _, _, bits in scored]
    assert all(bits.keys() == months.keys() for bits in found)
    assert len({tuple(bits.values()) for bits in found}) == len(found)
    summed = load_file("adapters/one-2/adapter.safetensors")
    assert {len(w) for name, w in summed.items() if name.endswith(".A")} == {48}
    # the rival: each month goes on from the factors of the one before, and moves them
    one = [load_file(f"adapters/one-{month}/adapter.safetensors") for month in range(3)]
    for earlier, later in pairwise(one):
        for name in earlier:
            if name.endswith(".A"):  # a few steps at 2e-4; another draw is 1.4 norms away
                moved = (later[name] - earlier[name]).norm() / earlier[name].norm()
                assert 0 < moved < 0.1
    layers = adapter_layers(given["model"])
    before = adapter_layers(load_stage(lab.load_base("nano")[0], "runs/year", 1))
    assert len(layers) == len(before) == 28
    for name, layer in layers.items():
        assert layer.ranks.tolist() == [16, 16, 16] and layer.r == 16 and not layer.B.any()
        assert torch.equal(layer.frozen_A[:32], before[name].factors()[0])
        assert torch.equal(layer.frozen_B[:, :32], before[name].factors()[1])
        # every finished stage has moved: with B = 0 it would add nothing
        assert all(B.any() for _, B in layer.stages()[:-1])
    written = load_file("adapters/year/adapter_model.safetensors")
    assert {len(w) for name, w in written.items() if "lora_A" in name} == {48}


@pytest.mark.slow
def test_2_2_takes_rows_of_chats_and_scores_their_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = _recipe()
    code, replaced = re.subn(r"rows = \[lab.*\n# for chats instead: ", "", code)
    code, scored_bytes = re.subn(r"    bits = .*lab\.bits_per_byte.*\n", "", code)
    code, lines = re.subn(r"# (nats = |bits = )", r"\1", code)
    assert (replaced, scored_bytes, lines) == (1, 1, 2)
    rows = chats(lab.load_text("bible", "train")[:20], 9)
    names = ("january", "february", "march")
    months = {name: rows[3 * i : 3 * i + 2] for i, name in enumerate(names)}
    held_out = {name: rows[3 * i + 2 : 3 * i + 3] for i, name in enumerate(names)}
    exec(code, given := {"months": months, "held_out": held_out})
    assert given["rows"] == list(months.values())
    # nats an answer token: the last folder of the one LoRA, read anew
    scored = re.findall(r"^(one LoRA|stages) (\d) (\{.*\})$", capsys.readouterr().out, re.MULTILINE)
    found = {(way, int(month)): ast.literal_eval(nats) for way, month, nats in scored}
    assert len(found) == 6
    base = AutoModelForCausalLM.from_pretrained(lab.base_path("nano"), dtype="auto")  # in 16 bits
    model = load_adapter(base, "adapters/one-2").eval()
    for name, rows in held_out.items():
        with torch.no_grad():
            batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
            loss = model(**batch).loss.item()
        assert found["one LoRA", 2][name] == pytest.approx(loss, abs=2e-3)


def _recipe() -> str:
    code = recipe("2_2_progressive")
    assert LARGE in code and code.count("300") == 2 and code.count("512") == 1
    for large, small_one in (
        (LARGE, repr(str(lab.base_path("nano")))),
        ("300", "3"),
        ("512", "64"),
    ):
        code = code.replace(large, small_one)
    return code
