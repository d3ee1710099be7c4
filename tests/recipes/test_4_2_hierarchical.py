"""The recipe of chapter 4.2."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_course import export_peft, inject, lab, unload
from tests.models import config, randomize
from tests.recipes import recipe, small


@pytest.mark.slow
def test_4_2_cuts_a_folder_of_peft_by_svd_and_a_nested_training_at_four_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    export_peft(randomize(inject(base, config(r=48)), 1), "adapters/mine")
    unload(base)
    exec(
        small(recipe("4_2_hierarchical"), steps=3), {"texts": lab.load_text("bible", "train")[:40]}
    )

    def factors(name: str) -> dict:
        return load_file(tmp_path / "adapters" / name / "adapter_model.safetensors")

    for way in ("svd", "nested"):
        whole = factors(f"{way}-32")
        for b in (4, 8, 16, 32):
            written = factors(f"{way}-{b}")
            assert len(written) == len(whole) == 2 * 28
            for name, part in written.items():
                rows = whole[name][:b] if "lora_A" in name else whole[name][:, :b]
                assert part.shape == rows.shape and part.abs().max() > 0
                if way == "nested":  # a cut is a slice of the file of the whole
                    assert part.equal(rows)
