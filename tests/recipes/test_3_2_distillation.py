"""The recipes of chapter 3.2."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import Trainer

from lora_course import continual, distillation, lab, qlora
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject, unload
from lora_course.states import factor_state
from tests.models import config, randomize
from tests.recipes import opening, recipe, small
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
    unread = {
        name: opening(lab.load_text(domain, "validation")[:2]) for name, domain in domains.items()
    }
    given = {"texts": read["law"], "held_out": unread["law"], "read": read, "unread": unread}
    both = recipe("3_2_distillation") + recipe("3_2_distillation", "Several adapters", "The sketch")
    code = small(both, steps=2)
    assert SMALL_STUDENT in code
    assert "range(5)" in code
    code = code.replace("range(5)", "range(2)")  # two seeds differ as five do
    exec(code.replace(SMALL_STUDENT, repr(str(lab.base_path("nano")))), given)

    teacher, alone, student, one = (
        given[name] for name in ("teacher", "alone", "student", "model")
    )
    said = capsys.readouterr().out
    bits = r"\d\.\d{3} bits a byte"
    assert len(re.findall(rf"^teacher {bits}$", said, re.MULTILINE)) == 1
    line = rf"^seed (\d): alone {bits}, student {bits}$"
    assert re.findall(line, said, re.MULTILINE) == ["0", "1"]
    assert (
        len(re.findall(r"^(?:law|code): student \d\.\d{3}, teacher \d+\.\d{3}", said, re.MULTILINE))
        == 2
    )
    last = {"teacher": teacher, "alone-1": alone, "student-1": student, "one": one}
    for name, model in last.items():
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
    assert given["taught_by"].teacher is teacher
    assert given["taught_by"].tokens == len(given["tokenizer"])
    # another seed has other factors
    page = (ROOT / "notebooks" / "3_2_distillation.md").read_text()
    first, second = (read_factors(f"adapters/alone-{seed}") for seed in range(2))
    assert not any(torch.equal(first[k], second[k]) for k in first if k.endswith(".A"))

    # chats are scored by their answers alone
    (line,) = re.findall(r"`(continual\.mean_loss\(.*?)`", page)
    unseen = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, -100]}]
    scored = eval(line, given | {"continual": continual, "unseen": unseen})
    with torch.no_grad():
        logits = given["model"](torch.tensor([[3, 4, 5, 6]])).logits[0, 1].float()
    assert scored == pytest.approx(-logits.log_softmax(-1)[5].item(), abs=1e-4)

    # alone for longer: as many steps as it says
    (line,) = re.findall(r"`(longer = with_lora\(.*?)`", page)
    assert "steps=11_000" in line
    exec(line.replace("11_000", "3"), given)
    assert [path.name for path in Path("runs/longer").glob("checkpoint-*")] == ["checkpoint-3"]

    # a teacher in 4 bits, with an adapter to train
    (line,) = re.findall(r"`(teacher = inject\(qlora.*?)`", page)
    exec(line, given | {"qlora": qlora}, four := {})
    assert len(adapter_layers(four["teacher"])) == 28

    # a teacher that is fine-tuned already: a whole model, and PEFT's, of a folder of PEFT
    (line,) = re.findall(r"`(teacher = AutoModel.*?)`", page)
    exec(line.replace('"my-7b"', "large"), given)
    (line,) = re.findall(r"`(teacher = PeftModel.*?)`", page)
    given["PeftModel"] = PeftModel
    exec(line.replace("adapters/mine", "adapters/law"), given)
    tuned, words = given["teacher"], len(given["tokenizer"])
    batch = {key: torch.as_tensor(given["rows"][:2][key]) for key in ("input_ids", "labels")}
    told = distillation.TeacherModel(student, tuned, words).log_probs(
        batch, distillation.DistillationConfig()
    )
    with torch.no_grad():
        logits = tuned(batch["input_ids"]).logits[:, :-1, :words].float()
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
