"""`lora_course.export`: PEFT reads ours and we read PEFT's."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from lora_course.export import export_peft, load_peft
from lora_course.injection import adapter_layers, inject
from tests.models import batch, config, qwen, randomize

PATTERNS = {
    "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"k_proj": 7}, "use_rslora": True,
    "lora_dropout": 0.1,
}  # fmt: skip


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


@pytest.mark.parametrize("fields", [{}, PATTERNS], ids=["plain", "patterns"])
def test_peft_loads_our_export_with_equal_logits(tmp_path: Path, fields: dict) -> None:
    model = randomize(inject(qwen(), config(**fields)))
    export_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(qwen(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)


def test_modules_of_rank_zero_are_left_out_of_an_export(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    for name, layer in adapter_layers(model).items():
        if "layers.0" in name:
            layer.A, layer.B = (
                nn.Parameter(torch.zeros(0, layer.in_features)),
                nn.Parameter(torch.zeros(layer.out_features, 0)),
            )
            layer.r = 0
    export_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(qwen(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    assert not any("layers.0" in name for name in theirs.peft_config["default"].target_modules)


@pytest.mark.parametrize("fields", [{}, PATTERNS], ids=["plain", "patterns"])
def test_we_load_what_peft_saved_and_can_train_it(tmp_path: Path, fields: dict) -> None:
    theirs = get_peft_model(qwen(), config(init_lora_weights=False, **fields))
    theirs.save_pretrained(tmp_path)
    ours = load_peft(qwen(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    ours(**batch()).loss.backward()
    assert all(layer.A.grad.abs().max() > 0 for layer in adapter_layers(ours).values())
