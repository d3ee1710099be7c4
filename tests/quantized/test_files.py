"""`quantized.files`: what is loaded is what was saved, as small as the bits say; damaged files are refused."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from lora_course.checkpoint import save_adapter
from lora_course.injection import adapter_layers, inject, merge
from lora_course.lora import LoRALinear
from lora_course.quantized import (
    FILE,
    GRANULARITIES,
    QuantizedLoRALinear,
    load_quantized,
    quantize,
    quantize_after_training,
    save_quantized,
    unpack,
)
from lora_course.states import factor_state, split_state, use_adapter
from tests.models import batch, config, logits, qwen, randomize
from tests.quantized.models import GRIDS, PATTERNS, adapted


@pytest.mark.parametrize(
    "arguments",
    [{"bits": b} for b in (2, 3, 4, 8)] + [{"bits_A": 2, "bits_B": 32}, {"clip": 0.5}, *GRIDS[:2]],
    ids=str,
)
def test_what_is_loaded_computes_what_was_saved_bit_for_bit(
    arguments: dict, tmp_path: Path
) -> None:
    model = adapted(fields=PATTERNS, **arguments)
    reference = model(**batch()).logits
    save_quantized(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_quantized(qwen(), tmp_path)
    assert torch.equal(loaded(**batch()).logits, reference)
    found, expected = factor_state(loaded), factor_state(model)
    assert found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in found
    )
    assert {type(layer) for layer in adapter_layers(loaded).values()} == {LoRALinear}
    assert all(
        p.requires_grad for layer in adapter_layers(loaded).values() for p in (layer.A, layer.B)
    )


def test_files_are_as_small_as_the_bits_say(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(512, 640))
    sizes = {}
    for bits in (2, 3, 4, 8, 32):
        model = inject(
            copy.deepcopy(base),
            config(r=8, target_modules=["0"], task_type=None),
            layer=QuantizedLoRALinear,
            bits=bits,
        )
        sizes[bits] = save_quantized(model, tmp_path / str(bits)).stat().st_size
    numbers, header = 8 * (512 + 640), 1200
    for bits, size in sizes.items():
        payload = numbers * (bits + (32 / 64 if bits < 32 else 0)) / 8
        assert payload < size < payload + header, bits
    plain = save_adapter(
        inject(copy.deepcopy(base), config(r=8, target_modules=["0"], task_type=None)),
        tmp_path / "plain",
    )
    assert sizes[4] < (plain / "adapter.safetensors").stat().st_size / 5.5


def test_the_stored_integers_are_those_of_quantize(tmp_path: Path) -> None:
    model = adapted(bits_A=4, bits_B=2)
    tensors = load_file(save_quantized(model, tmp_path))
    for name, layer in adapter_layers(model).items():
        for key, rows, bits in (("A", layer.A.detach(), 4), ("B", layer.B.detach().T, 2)):
            codes, scale = quantize(rows, bits, "group", 20)
            assert torch.equal(unpack(tensors[f"{name}.{key}.codes"], bits, rows.shape), codes)
            assert torch.equal(tensors[f"{name}.{key}.scale"], scale)
    assert len(tensors) == 4 * len(adapter_layers(model))


def test_other_layers_merged_models_and_lost_trainings_are_refused(tmp_path: Path) -> None:
    plain, model = randomize(inject(qwen(), config())), adapted()
    with pytest.raises(ValueError, match="quantize_after_training"):
        save_quantized(plain, tmp_path)
    with pytest.raises(ValueError, match="QuantizedLoRALinear"):
        quantize_after_training(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        quantize_after_training(merge(plain))
    next(iter(adapter_layers(model).values())).B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        save_quantized(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_that_are_missing_cut_changed_foreign_or_for_another_base_are_refused(
    tmp_path: Path,
) -> None:
    model, base = adapted(), qwen()
    with pytest.raises(FileNotFoundError, match="save_quantized"):
        load_quantized(base, tmp_path)
    path = save_quantized(model, tmp_path)
    assert path == tmp_path / FILE
    whole = path.read_bytes()
    for content, message in (
        (whole[:-100], "cut short"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged"),
        (whole.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'), "version 9"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_quantized(base, tmp_path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not written by save_quantized"):
        load_quantized(base, tmp_path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="matches no linear layer"):
        load_quantized(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    wider = qwen()
    wider.set_submodule("model.layers.0.mlp.up_proj", nn.Linear(48, 96))
    with pytest.raises(ValueError, match="another base model"):
        load_quantized(wider, tmp_path)
    assert not any(isinstance(module, LoRALinear) for m in (base, wider) for module in m.modules())
    with pytest.warns(UserWarning, match="not those that the adapter"):
        load_quantized(qwen(seed=5), tmp_path)
    assert load_quantized(base, tmp_path)(**batch()).logits.shape == (2, 9, 97)


def test_description_is_json_in_the_file_and_says_the_grid(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(save_quantized(adapted(bits_A=2, bits_B=4), tmp_path), "pt") as file:
        description = json.loads(file.metadata()["lora_course"])
    assert description["grid"] == {
        "bits_A": 2,
        "bits_B": 4,
        "granularity": "group",
        "group_size": 20,
    }
    assert set(GRANULARITIES) == {grid["granularity"] for grid in GRIDS}


def test_a_name_that_ends_another_name_is_loaded_as_itself(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.block = nn.Linear(8, 8), nn.ModuleDict({"fc": nn.Linear(8, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block["fc"](torch.tanh(self.fc(x)))

    settings = LoraConfig(r=2, lora_alpha=6, target_modules="fc")
    model = randomize(inject(Block(), settings, QuantizedLoRALinear, bits=4))
    save_quantized(model, tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(load_quantized(Block(), tmp_path)(x), model(x), atol=0, rtol=0)


@pytest.mark.parametrize("bits", [4, 32])
def test_modules_of_rank_zero_are_computed_with_and_left_out_of_the_file(
    tmp_path: Path, bits: int
) -> None:
    model = randomize(inject(qwen(), config()))
    state = factor_state(model)
    for name, tensors in split_state(state).items():
        if "layers.0" in name:
            state |= {f"{name}.A": tensors["A"][:0], f"{name}.B": tensors["B"][:, :0]}
    quantize_after_training(use_adapter(model, state), bits=bits)
    reference = logits(model)
    plain = use_adapter(inject(qwen(), config()), factor_state(model))
    assert torch.equal(logits(plain), reference)
    save_quantized(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_quantized(qwen(), tmp_path)
    assert torch.equal(logits(loaded), reference)
    assert all("layers.1" in name for name in adapter_layers(loaded))
    for layer in adapter_layers(model).values():
        layer.load_tensors({"A": layer.A[:0], "B": layer.B[:, :0]})
    with pytest.raises(ValueError, match="rank 0"):
        save_quantized(model, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
