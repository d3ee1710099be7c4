"""The recipe of chapter 1.2."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_course import adalora, lab
from tests.recipes import LARGE, recipe


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
