"""The recipes of chapter 3.2."""

from pathlib import Path

import pytest
import torch

from lora_course import lab
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject, unload
from lora_course.states import factor_state
from tests.models import config, randomize
from tests.recipes import recipe, small

SMALL_STUDENT = '"Qwen/Qwen2.5-0.5B-Instruct"'


@pytest.mark.slow
def test_3_2_folders_teach_a_student_that_is_exported_and_a_large_model_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, tokenizer = lab.load_base("nano")
    for seed, name in enumerate(("law", "code")):
        export_peft(randomize(inject(base, config(r=2 + seed)), seed), f"adapters/{name}")
        unload(base)
    texts = {
        name: lab.load_text(domain, "train")[:40]
        for name, domain in {"law": "bible", "code": "python"}.items()
    }
    code = small(recipe("3_2_distillation"), steps=2)
    assert SMALL_STUDENT in code
    code = code.replace(SMALL_STUDENT, repr(str(lab.base_path("nano"))))
    rows = lab.blocks(tokenizer, texts["law"], length=32)
    batches = [{key: rows[:2][key] for key in ("input_ids", "labels")}] * 2
    held_out = {
        name: lab.load_text(domain, "validation")[:2]
        for name, domain in {"law": "bible", "code": "python"}.items()
    }
    given = {"texts": texts, "held_out": held_out, "batches": batches}
    exec(code, given)

    teachers, model = given["teachers"], given["model"]
    assert teachers.names == ["law", "code"] and torch.equal(
        teachers.weights, torch.eye(2).double()
    )
    assert [next(iter(layers.values())).r for layers in teachers.layers] == [2, 3]
    assert given["trainer"].history[-1]["divergence"] > 0.01  # random teachers say something else
    exported = read_factors("adapters/student")
    for name, tensor in factor_state(model).items():
        assert torch.equal(exported[name].to(tensor), tensor), name
    for trained in (model, given["student"]):
        layers = adapter_layers(trained).values()
        assert len(layers) == 28 and all(layer.B.any() for layer in layers)
    assert given["said"].shape[-1] == given["known"] == len(tokenizer)
