"""The recipe of chapter 4.2."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_course import export_peft, inject, lab, unload
from lora_course.injection import disabled
from tests.models import config, randomize
from tests.recipes import LARGE, chats, recipe
from tools.chapters import ROOT


def test_4_2_cuts_a_folder_of_peft_by_svd_and_a_nested_training_at_three_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    export_peft(randomize(inject(base, config(r=48)), 1), "adapters/mine")
    unload(base)
    answers = chats(lab.load_text("bible", "train")[:40], 40, asked=32)
    given = {"rows": answers[4:], "held_out": answers[:4]}
    code = recipe("4_2_hierarchical")
    assert LARGE in code and "max_steps=200" in code and code.count("{kept:.1%}") == 2
    code = code.replace(LARGE, repr(str(lab.base_path("nano")))).replace("=200", "=3")
    exec(code.replace("{kept:.1%}", "{kept}"), given)
    said = re.findall(r"^(SVD|nested) (\d+) keeps (\S+) of", capsys.readouterr().out, re.MULTILINE)
    scores = {(way, int(b)): float(kept) for way, b, kept in said}
    # each cut is scored by itself, and by the answers alone
    assert len(scores) == 6 and len(set(scores.values())) == 6
    ids = torch.tensor([row["input_ids"] for row in given["held_out"]])
    with torch.no_grad(), disabled(given["model"]):
        logits = given["model"](ids).logits[:, 31:-1].float()
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 32:].flatten())
    assert given["plain"] == pytest.approx(found.item(), abs=1e-4)

    def factors(name: str) -> dict:
        return load_file(tmp_path / "adapters" / name / "adapter_model.safetensors")

    for way in ("svd", "nested-0.0002"):
        whole = factors(f"{way}-16")
        for b in (4, 8, 16):
            written = factors(f"{way}-{b}")
            assert len(written) == len(whole) == 2 * 28
            for name, part in written.items():
                rows = whole[name][:b] if "lora_A" in name else whole[name][:, :b]
                assert part.shape == rows.shape and part.abs().max() > 0
                if way != "svd":  # a cut is a slice of the file of the whole
                    assert part.equal(rows)


@pytest.mark.parametrize(("gradients", "which"), [((0, 0, 1), 0), ((1, 1, 1), 1)])
def test_a_row_without_a_gradient_moves_as_far_as_the_self_test_says(
    gradients: tuple[float, ...], which: int
) -> None:
    text = (ROOT / "notebooks" / "4_2_hierarchical.md").read_text()
    answer = text[text.index("5. Row 8 was trained at step 3") : text.index("## What goes wrong")]
    weight = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    for gradient in (*gradients, 0.0):
        before = weight.item()
        weight.grad = torch.tensor([float(gradient)])
        adam.step()
    said = re.findall(r"by (0\.\d\d)", answer)
    assert f"{before - weight.item():.2f}" == said[which] and len(said) == 2
