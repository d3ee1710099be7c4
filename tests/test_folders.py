"""`lora_course.folders`: adapter folders as states, without a model."""

from pathlib import Path

import pytest
import torch

from lora_course.checkpoint import save_adapter
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import inject
from lora_course.sparse import SparseLoRALinear
from lora_course.states import factor_state
from tests.models import config, qwen, randomize

PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 7}, "use_rslora": True}


@pytest.mark.parametrize("fields", [{}, PATTERNS], ids=["plain", "patterns"])
def test_both_formats_give_the_states_that_the_model_has(tmp_path: Path, fields: dict) -> None:
    model = randomize(inject(qwen(), config(**fields)))
    expected = factor_state(model)
    for folder in (save_adapter(model, tmp_path / "a"), export_peft(model, tmp_path / "b")):
        found = read_factors(folder)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)
    taken = read_factors(expected)
    assert taken.keys() == expected.keys() and all(taken[k] is expected[k] for k in expected)


def test_what_holds_no_plain_factors_is_refused(tmp_path: Path) -> None:
    model = inject(qwen(), config(), SparseLoRALinear, sparsity=0.5)
    with pytest.raises(ValueError, match="SparseLoRALinear.*factor_state"):
        read_factors(save_adapter(model, tmp_path))
    with pytest.raises(FileNotFoundError, match="save_adapter"):
        read_factors(tmp_path / "nothing")
