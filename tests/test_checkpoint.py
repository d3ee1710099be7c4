"""`lora_course.checkpoint`: what is saved comes back, and the wrong base is refused."""

import copy
import importlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora_course.checkpoint import HOMES, load_adapter, read_extra, restore_adapter, save_adapter
from lora_course.export import export_peft, load_peft
from lora_course.injection import adapter_layers, inject, injection_of, merge
from lora_course.lora import LAYERS
from lora_course.sparse import SparseLoRALinear
from lora_course.states import adapter_state, concatenate, use_adapter
from tests.models import PATTERNS, config, logits, qwen, randomize
from tests.processes import run


@pytest.mark.parametrize("fields", [{}, PATTERNS], ids=["plain", "patterns"])
def test_reload_is_the_same_function_with_the_same_configuration(
    tmp_path: Path, fields: dict
) -> None:
    model = randomize(inject(qwen(), config(**fields)))
    save_adapter(model, tmp_path / "a", extra={"step": 7})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_adapter(qwen(), tmp_path / "a")
    assert torch.equal(logits(model), logits(again))
    assert read_extra(tmp_path / "a") == {"step": 7}
    mine, other = injection_of(model).config, injection_of(again).config
    assert {k: v for k, v in mine.to_dict().items() if k != "peft_version"} == {
        k: set(v) if k == "target_modules" else v
        for k, v in other.to_dict().items()
        if k != "peft_version"
    }
    assert all(layer.A.requires_grad for layer in adapter_layers(again).values())
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"adapter.safetensors", "adapter.json"}


def test_a_state_of_another_rank_than_the_configuration_comes_back(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    use_adapter(model, concatenate([adapter_state(model)] * 2, [0.3, 0.5]))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(load_adapter(qwen(), tmp_path)))


def test_saving_while_merged_does_not_apply_the_update_twice(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    expected = logits(model)
    save_adapter(merge(model), tmp_path / "own")
    export_peft(model, tmp_path / "peft")
    torch.testing.assert_close(
        logits(load_adapter(qwen(), tmp_path / "own")), expected, atol=0, rtol=0
    )
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(qwen(), tmp_path / "peft")), expected, atol=1e-5, rtol=1e-5
    )


def test_the_wrong_base_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    save_adapter(randomize(inject(qwen(), config())), tmp_path)
    other = type(qwen())(copy.deepcopy(qwen().config))
    other.config.intermediate_size = 96
    wider = type(other)(other.config)
    names = [n for n, _ in wider.named_parameters()]
    with pytest.raises(
        ValueError,
        match=r"for another base.*up_proj|for another base.*down_proj|for another base.*gate_proj",
    ):
        load_adapter(wider, tmp_path)
    assert [n for n, p in wider.named_parameters() if p.requires_grad] == names
    attention_only = inject(qwen(), config(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="modules differ"):
        restore_adapter(attention_only, tmp_path)
    with pytest.warns(UserWarning, match="not those"):
        load_adapter(qwen(seed=1), tmp_path)


def test_the_same_base_in_another_type_is_no_other_base(tmp_path: Path) -> None:
    base = qwen().to(torch.bfloat16)
    save_adapter(randomize(inject(copy.deepcopy(base), config())), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(base.float(), tmp_path)


def test_torn_missing_future_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save_adapter"):
        load_adapter(qwen(), tmp_path)
    folder = save_adapter(randomize(inject(qwen(), config())), tmp_path / "a")
    content, description = (
        (folder / "adapter.safetensors").read_bytes(),
        json.loads((folder / "adapter.json").read_text()),
    )
    (folder / "adapter.safetensors").write_bytes(content[:-4])
    with pytest.raises(ValueError, match="cut short"):
        load_adapter(qwen(), folder)
    (folder / "adapter.safetensors").write_bytes(content)
    for change, message in (
        ({"format_version": 99}, "version 99"),
        ({"layer": "Unknown"}, "'Unknown'"),
    ):
        (folder / "adapter.json").write_text(json.dumps(description | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(qwen(), folder)
    get_peft_model(qwen(), config()).save_pretrained(tmp_path / "p")
    with pytest.raises(FileNotFoundError, match="load_peft"):
        load_adapter(qwen(), tmp_path / "p")
    get_peft_model(qwen(), config(use_dora=True)).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="lora_magnitude|use_dora"):
        load_peft(qwen(), tmp_path / "dora")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        load_peft(qwen(), folder)


def test_other_files_in_the_folder_survive_and_a_second_save_replaces_the_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = randomize(inject(qwen(), config()))
    save_adapter(model, tmp_path)
    save_adapter(randomize(model, seed=9), tmp_path)
    assert torch.equal(logits(load_adapter(qwen(), tmp_path)), logits(model))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert isinstance(injection_of(model).config, LoraConfig)


class Killed(BaseException):
    """No error that a program handles: as when the process is gone."""


@pytest.mark.parametrize("step", range(12))
def test_a_save_that_is_killed_at_any_step_leaves_the_old_adapter_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    old, new = (randomize(inject(qwen(), config(r=r)), seed=r) for r in (3, 5))
    save_adapter(old, tmp_path)
    calls = 0

    def counted(module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: object, **keywords: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise Killed
            return real(*arguments, **keywords)

        monkeypatch.setattr(module, name, call)

    for name in ("replace", "link", "fsync", "unlink"):
        counted(os, name)
    try:
        save_adapter(new, tmp_path)
    except Killed:
        pass
    else:
        assert step >= calls  # all of its steps were tried
    monkeypatch.undo()
    found = logits(load_adapter(qwen(), tmp_path))
    assert any(torch.equal(found, logits(model)) for model in (old, new))
    save_adapter(new, tmp_path)
    assert torch.equal(logits(load_adapter(qwen(), tmp_path)), logits(new))
    assert {p.name for p in tmp_path.iterdir()} == {"adapter.json", "adapter.safetensors"}


def test_several_writers_at_once_leave_one_whole_adapter(tmp_path: Path) -> None:
    models = [randomize(inject(qwen(), config(r=r)), seed=r) for r in (2, 3, 4)]
    with ThreadPoolExecutor(len(models)) as pool:
        for _ in range(5):
            list(pool.map(lambda model: save_adapter(model, tmp_path), models))
            found = logits(load_adapter(qwen(), tmp_path))
            assert any(torch.equal(found, logits(model)) for model in models)


def test_a_diverged_adapter_does_not_replace_a_good_one(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    expected = logits(load_adapter(qwen(), save_adapter(model, tmp_path)))
    with torch.no_grad():
        next(iter(adapter_layers(model).values())).A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(qwen(), tmp_path)), expected)


@pytest.mark.parametrize(
    "change", [{"r": 5}, {"lora_alpha": 7}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str
)
def test_an_adapter_of_another_configuration_is_not_put_into_an_injected_model(
    tmp_path: Path, change: dict
) -> None:
    save_adapter(randomize(inject(qwen(), config())), tmp_path)
    model = inject(qwen(), config(**change))
    before = adapter_state(model)
    with pytest.raises(ValueError, match=rf"config\.{next(iter(change))} is"):
        restore_adapter(model, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in adapter_state(model).items())


def test_a_layer_is_known_before_its_module_was_imported(tmp_path: Path) -> None:
    model = inject(qwen(), config(), SparseLoRALinear, sparsity=0.5)
    save_adapter(model, tmp_path)
    qwen().save_pretrained(tmp_path / "base")
    code = (
        "import sys; from transformers import Qwen2ForCausalLM; from lora_course import load_adapter\n"
        "assert 'lora_course.sparse' not in sys.modules\n"
        f"model = load_adapter(Qwen2ForCausalLM.from_pretrained({str(tmp_path / 'base')!r}), {str(tmp_path)!r})\n"
        "assert type(model.lora_course.layer).__name__ and 'lora_course.sparse' in sys.modules"
    )
    process = run(code)
    assert process.returncode == 0, process.stderr


def test_every_layer_of_the_package_has_its_home() -> None:
    for name, module in HOMES.items():
        importlib.import_module(f"lora_course.{module}")
        assert LAYERS[name].__module__.startswith(f"lora_course.{module}")
    ours = {n for n, layer in LAYERS.items() if layer.__module__.startswith("lora_course.")}
    assert ours == {*HOMES, "LoRALinear"}


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"format_version": 1}', "null"])
def test_a_description_that_is_none_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    save_adapter(inject(qwen(), config()), tmp_path)
    (tmp_path / "adapter.json").write_text(text)
    model = qwen()
    with pytest.raises(ValueError, match=r"adapter\.json is no description of an adapter"):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "lora_course")


def test_tokens_that_were_added_and_no_adapter_holds_are_said(tmp_path: Path) -> None:
    """Their embeddings start at random: trained on, they are another model's after the next start."""
    base = qwen()
    base.resize_token_embeddings(100)
    folder = save_adapter(randomize(inject(copy.deepcopy(base), config())), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(copy.deepcopy(base), folder)
    again = qwen()
    with pytest.warns(UserWarning, match="100 tokens, .* there, 97 tokens, .* here"):
        load_adapter(again, folder)
    again = qwen()
    again.get_input_embeddings().weight.data[-1] += 1
    with pytest.warns(UserWarning, match="last tokens are not those"):
        load_adapter(again, save_adapter(randomize(inject(qwen(), config())), tmp_path / "b"))


def test_what_is_trained_besides_the_adapter_is_said_when_it_is_not_written(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    model.model.norm.weight.requires_grad_(True)
    for write in (save_adapter, export_peft):
        with pytest.warns(UserWarning, match=r"'model.norm.weight' \(1 in all\).*does not hold it"):
            write(model, tmp_path / write.__name__)
