"""`lora_course.export`: PEFT reads ours and we read PEFT's."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_course.export import export_peft, load_peft
from lora_course.injection import adapter_layers, inject
from tests.models import PATTERNS, batch, config, logits, qwen, randomize


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


def mixed() -> nn.Module:
    """Ranks, scales and modules that differ: what pruning, growing and patterns leave."""
    fields = {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [0],
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"down_proj": 7},
    }
    return randomize(inject(qwen(), config(**fields)))


def test_a_uniform_export_is_the_same_update_at_one_rank_and_one_scale_in_every_block(
    tmp_path: Path,
) -> None:
    model = mixed()
    export_peft(model, tmp_path / "folder", uniform=True, base_model_name_or_path="some/base")
    written = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {} and written["alpha_pattern"] == {}
    assert written["r"] == 5 and written["lora_alpha"] == 5
    assert isinstance(written["lora_alpha"], int)
    assert written["base_model_name_or_path"] == "some/base"
    assert sorted(written["target_modules"]) == ["down_proj", "q_proj"]
    tensors = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2  # A and B of both types in both blocks, adapted or not
    assert {t.shape[0] for name, t in tensors.items() if ".lora_A." in name} == {5}
    served = PeftModel.from_pretrained(qwen(), tmp_path / "folder").eval()
    torch.testing.assert_close(logits(served), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("fields", [{}, {"layers_to_transform": [0]}], ids=["all", "block 0"])
def test_blocks_compiled_one_by_one_are_exported_as_plain_ones(
    tmp_path: Path, fields: dict, uniform: bool
) -> None:
    model = randomize(inject(qwen(), config(target_modules=["q_proj", "down_proj"], **fields)))
    expected = export_peft(model, tmp_path / "plain", uniform=uniform)
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend="eager")
    found = export_peft(model, tmp_path / "compiled", uniform=uniform)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_an_equal_scale_is_kept_in_a_uniform_export(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config(r=4, lora_alpha=12)))
    export_peft(model, tmp_path, uniform=True)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 12)
    name = next(iter(adapter_layers(model)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    B = tensors[f"base_model.model.{name}.lora_B.weight"]
    assert torch.equal(B, adapter_layers(model)[name].B)


def test_r_is_the_largest_rank_so_that_a_servers_limit_guards_something(tmp_path: Path) -> None:
    export_peft(mixed(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 5


class Nested(nn.Module):
    """A root module whose name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 10)
        self.block = nn.Module()
        self.block.fc = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.fc(self.fc(x))


@pytest.mark.parametrize("targets", ["fc", r"fc|block\.fc"])
def test_a_name_that_ends_another_name_is_exported_as_itself(tmp_path: Path, targets: str) -> None:
    patterns = {} if targets == "fc" else {"rank_pattern": {"^fc": 2}, "alpha_pattern": {"^fc": 9}}
    ours = inject(Nested(), LoraConfig(r=3, lora_alpha=6, target_modules=targets, **patterns))
    randomize(ours)
    export_peft(ours, tmp_path)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for theirs in (PeftModel.from_pretrained(Nested(), tmp_path), load_peft(Nested(), tmp_path)):
        torch.testing.assert_close(theirs(x), ours(x), atol=1e-5, rtol=1e-5)


def test_a_diverged_adapter_is_not_exported_and_the_old_export_stays(tmp_path: Path) -> None:
    model = mixed()
    export_peft(model, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(iter(adapter_layers(model).values())).B[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        export_peft(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_a_model_card_says_how_to_load_and_a_card_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    model = mixed()
    export_peft(model, tmp_path, base_model_name_or_path="some/base")
    card = (tmp_path / "README.md").read_text()
    assert "base_model: some/base" in card and "r = 5" in card and "LoRALinear" in card
    (tmp_path / "README.md").write_text("mine")
    export_peft(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def steps(model: nn.Module, count: int) -> list[float]:
    """Losses of `count` steps of plain SGD, which keeps nothing between two of them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(count):
        loss = model.train()(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("uniform", [False, True])
def test_an_adapter_goes_on_in_peft_and_comes_back_with_the_losses_of_one_that_stayed(
    tmp_path: Path, uniform: bool
) -> None:
    fields = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 5}}
    stayed = randomize(inject(qwen(), config(**({} if uniform else fields))))
    first = steps(stayed, 2)
    export_peft(stayed, tmp_path / "out", uniform=uniform)
    theirs = PeftModel.from_pretrained(qwen(), tmp_path / "out", is_trainable=True)
    assert steps(theirs, 3) == pytest.approx(middle := steps(stayed, 3), rel=1e-5)
    theirs.save_pretrained(tmp_path / "back")
    back = load_peft(qwen(), tmp_path / "back")
    assert steps(back, 3) == pytest.approx(last := steps(stayed, 3), rel=1e-5)
    assert first[0] > middle[0] > last[-1]  # or nothing was trained, and all would agree
