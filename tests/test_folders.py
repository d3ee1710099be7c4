"""`lora_course.folders`: adapter folders as states, without a model."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from lora_course.checkpoint import save_adapter
from lora_course.export import export_peft, load_peft
from lora_course.folders import read_factors
from lora_course.injection import inject
from lora_course.serving import load_adapters
from lora_course.sparse import SparseLoRALinear
from lora_course.states import factor_state
from tests.models import config, logits, qwen, randomize

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


def trained_by_peft(folder: Path, **fields: object) -> PeftModel:
    """A folder by PEFT whose factors are not those that they started as."""
    asked = {"lora_alpha": 4, "r": 4, "target_modules": ["q_proj", "down_proj"]} | fields
    model = get_peft_model(qwen(), config(**asked))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: read_factors(folder),
        lambda folder: load_adapters(qwen(), {"one": folder}),
        lambda folder: load_peft(qwen(), folder),
    ],
    ids=["read_factors", "load_adapters", "load_peft"],
)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [5]),
    ],
)
def test_factors_that_are_no_plain_lora_on_this_base_are_refused(
    tmp_path: Path, load: Callable, field: str, value: object
) -> None:
    trained_by_peft(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        load(tmp_path)


@pytest.mark.parametrize("start", ["orthogonal", "Gaussian", "mica"])
def test_a_start_that_leaves_the_base_alone_is_plain_lora(tmp_path: Path, start: str) -> None:
    theirs = trained_by_peft(tmp_path, init_lora_weights=start)
    torch.testing.assert_close(
        logits(load_peft(qwen(), tmp_path)), logits(theirs), atol=1e-5, rtol=1e-5
    )


def test_an_export_beside_an_adapter_does_not_hide_its_base(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    save_adapter(model, tmp_path)
    export_peft(model, tmp_path)
    other = qwen()
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    with pytest.warns(UserWarning, match="not those that the adapter in"):
        load_adapters(other, {"a": tmp_path})
