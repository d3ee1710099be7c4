"""The recipes of chapter 3.2."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import Trainer

from lora_course import distillation, lab
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject, unload
from lora_course.states import factor_state
from tests.models import config, randomize
from tests.recipes import recipe, small
from tools.chapters import ROOT

SMALL_STUDENT = '"Qwen/Qwen2.5-0.5B-Instruct"'


@pytest.mark.slow
def test_3_2_a_model_teaches_a_small_one_and_folders_teach_one_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    for seed, name in enumerate(("law", "code")):
        export_peft(randomize(inject(base, config(r=2 + seed)), seed), f"adapters/{name}")
        unload(base)
    domains = {"law": "bible", "code": "python"}
    read = {name: lab.load_text(domain, "train")[:40] for name, domain in domains.items()}
    unread = {name: lab.load_text(domain, "validation")[:2] for name, domain in domains.items()}
    given = {"texts": read["law"], "held_out": unread["law"], "read": read, "unread": unread}
    both = recipe("3_2_distillation") + recipe("3_2_distillation", "Several adapters", "The sketch")
    code = small(both, steps=2)
    assert SMALL_STUDENT in code
    exec(code.replace(SMALL_STUDENT, repr(str(lab.base_path("nano")))), given)

    teacher, alone, student, one = (
        given[name] for name in ("teacher", "alone", "student", "model")
    )
    said = capsys.readouterr().out
    assert re.findall(r"^(\w+): \d\.\d{3} bits a byte", said, re.MULTILINE) == [
        "student", "alone", "teacher",
    ]  # fmt: skip
    assert (
        len(re.findall(r"^(?:law|code): student \d\.\d{3}, teacher \d+\.\d{3}", said, re.MULTILINE))
        == 2
    )
    for name, model in {"teacher": teacher, "alone": alone, "student": student, "one": one}.items():
        layers = adapter_layers(model).values()
        assert len(layers) == 28 and all(layer.B.any() for layer in layers)
        exported = read_factors(f"adapters/{name}")
        for factor, tensor in factor_state(model).items():
            assert torch.equal(exported[factor].to(tensor), tensor), factor
    # both small models began alike, and read the same rows: what differs is the teacher
    apart = [
        (layer.B - twin.B).abs().max()
        for layer, twin in zip(
            adapter_layers(alone).values(), adapter_layers(student).values(), strict=True
        )
    ]
    assert max(apart) > 0
    assert given["by_teacher"].teacher is teacher
    assert given["by_teacher"].tokens == len(given["tokenizer"])

    # the line for another seed: other factors and another order of the rows
    page = (ROOT / "notebooks" / "3_2_distillation.md").read_text()
    (line,) = re.findall(r"`(again = with_lora\(.*?)`", page)
    exec(line, given)
    again = adapter_layers(given["again"]).values()
    assert all(
        not torch.equal(layer.A, twin.A)
        for layer, twin in zip(again, adapter_layers(alone).values(), strict=True)
    )

    # alone for longer: as many steps as it says
    (line,) = re.findall(r"`(longer = with_lora\(.*?)`", page)
    exec(line.replace("steps=4000", "steps=3"), given)
    assert [path.name for path in Path("runs/longer").glob("checkpoint-*")] == ["checkpoint-3"]

    # a teacher that is fine-tuned already: PEFT's model, of a folder of PEFT
    (line,) = re.findall(r"`(teacher = PeftModel.*?)`", page)
    given["whole"], given["PeftModel"] = lab.load_base("nano")[0], PeftModel
    exec(line.replace("adapters/mine", "adapters/law"), given)
    tuned, words = given["teacher"], len(given["tokenizer"])
    batch = {key: torch.as_tensor(given["rows"][:2][key]) for key in ("input_ids", "labels")}
    told = distillation.TeacherModel(student, tuned, words).log_probs(
        batch, distillation.DistillationConfig()
    )
    with torch.no_grad():
        logits = tuned(batch["input_ids"]).logits[:, :-1, :words]
    assert torch.allclose(told, logits.flatten(0, 1).log_softmax(-1), atol=1e-4)

    # the class on a plain Trainer, as it is called on the page
    cells = re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    written = [cell for cell in cells if cell.startswith(("def loss_by_hand", "class PlainDist"))]
    assert len(written) == 2
    plain = {
        "torch": torch, "F": torch.nn.functional, "Trainer": Trainer, "LoraConfig": LoraConfig,
        "rows": given["rows"], "tokenizer": given["tokenizer"], "large_model": tuned,
        "small_model": lab.load_base("nano")[0],
    }  # fmt: skip
    exec("\n".join(written), plain)
    exec(
        re.sub(r"max_steps=\d+", "max_steps=2", recipe("3_2_distillation", "Build it", "Several")),
        plain,
    )
    taught = {n: p for n, p in plain["small_model"].named_parameters() if "lora_B" in n}
    assert len(taught) == 28 and all(p.any() for p in taught.values())

    teachers = given["teachers"]
    assert teachers.names == ["law", "code"]
    assert torch.equal(teachers.weights, torch.eye(2).double())
    assert [next(iter(layers.values())).r for layers in teachers.layers] == [2, 3]
