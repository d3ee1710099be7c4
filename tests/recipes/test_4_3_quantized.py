"""The recipe of chapter 4.3."""

import re
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lora_course import lab
from lora_course.export import export_peft, load_peft
from lora_course.injection import adapter_layers, inject, merge, unload
from lora_course.quantized import (
    QuantizedLoRALinear,
    fake_quantize,
    load_quantized,
    quantize_after_training,
)
from tests.models import config, randomize, relative
from tests.recipes import LARGE, recipe
from tools.chapters import ROOT


def test_4_3_packs_a_folder_of_peft_and_gives_a_server_the_rounded_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(lab.base_path("nano"))
    # in bf16, as the recipe loads it
    base = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = base(ids).logits
        trained = randomize(inject(base, config(r=8)), 1)(ids).logits
    export_peft(base, "adapters/law")
    peft_file = tmp_path / "adapters/law/adapter_model.safetensors"
    fp32 = peft_file.stat().st_size
    unload(base)

    code, apart = recipe("4_3_quantized").split("from lora_course import qlora\n")
    code, _, in_int4 = code.split("import torch\n")  # the middle one is for chats
    assert LARGE in code
    given: dict = {"held_out": lab.load_text("shakespeare", "validation")[:1]}
    exec(code.replace(LARGE, repr(name)), given)
    with torch.no_grad():
        logits = given["model"](ids).logits
        stored = load_quantized(base, "store/law")(ids).logits
        served = load_peft(unload(base), "served/law")(ids).logits
        halved = PeftModel.from_pretrained(unload(base), "adapters/law-16")(ids).logits
    torch.testing.assert_close(stored, logits)
    # factors in fp32, activations in bf16: 2^-8 of each
    assert relative(served, logits) < 0.01
    # 4 bits: an error of a seventh of ΔW, which is far from none of it, and from all
    assert 0.01 < relative(logits, trained) < 0.5 * relative(plain, trained)
    # 4.5 bits a number of 32, beside a header that a small model's file cannot hide
    assert given["file"].stat().st_size < 0.3 * fp32
    # the copy in 16 bits: half the bytes beside a header, the same adapter to PEFT, and the original as it was
    halved_file = tmp_path / "adapters/law-16/adapter_model.safetensors"
    assert halved_file.stat().st_size < 0.52 * fp32 and peft_file.stat().st_size == fp32
    assert relative(halved, trained) < 0.01

    # 4 bits move the score of a random adapter, and less than it moved the base's
    assert 0 < abs(given["rounded"] - given["trained"]) < abs(given["plain"] - given["trained"])

    exec("import torch\n" + in_int4, given)
    fresh = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    merged = given["round_base"](merge(load_peft(fresh, "adapters/law")))
    for rounded in (given["model"], merged):
        for layer in adapter_layers(rounded).values():
            weight = layer.base_layer.weight
            assert all(len(group.unique()) <= 15 for group in weight[:2].reshape(-1, 32))
            # the step of each group is kept to the 8 bits of bf16
            again = fake_quantize(weight.float(), 4, group_size=32)
            assert relative(again, weight.float()) < 0.01
        with torch.no_grad():
            few_bits = rounded(ids).logits.float()
        # what has no adapter is rounded as well, and the head is not
        others = given["round_base"](AutoModelForCausalLM.from_pretrained(name, dtype="auto"))
        down = others.get_submodule("model.layers.0.mlp.down_proj").weight
        assert all(len(group.unique()) <= 15 for group in down[:2].reshape(-1, 32))
        assert len(others.get_output_embeddings().weight[0, :32].unique()) > 15
        # the weights, or their sum, are off by a tenth: near what was trained, and not the same
        assert 0.01 < relative(few_bits, trained) < 0.5 * relative(plain, trained)
    assert given["beside"] != given["trained"] and abs(given["beside"] / given["trained"] - 1) < 0.1

    exec("from lora_course import qlora\n" + apart, given)
    assert "model" not in given, "one base after the other"
    with torch.no_grad():
        few_bits = given["served"](ids).logits.float()
    # the same adapter on the base in NF4, whose weights are off by a tenth: near, and not the same
    assert type(next(iter(adapter_layers(given["served"]).values())).base_layer) is Linear4bit
    assert 0.01 < relative(few_bits, trained) < 0.5 * relative(plain, trained)
    assert given["few"] != given["trained"] and abs(given["few"] / given["trained"] - 1) < 0.1


def use_it() -> str:
    source = (ROOT / "notebooks" / "4_3_quantized.md").read_text()
    return source[source.index("\n## Use it") : source.index("\n## The idea")]


def test_4_3_chats_are_scored_by_the_loss_of_their_answers(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(import torch\n\ndef score.*?)^```", use_it(), re.MULTILINE | re.DOTALL)  # fmt: skip
    rows = [
        {"input_ids": ids, "attention_mask": [1] * 6 + [0] * 2, "labels": [-100] * 3 + ids[3:6] + [-100] * 2}
        for ids in torch.arange(16).reshape(2, 8).tolist()
    ]  # fmt: skip
    plain = lab.load_base("nano", device="cpu")[0]
    model = randomize(inject(plain, config(r=2, lora_dropout=0.5))).train()
    given: dict = {"held_out": rows}
    exec(block, given)
    # as chapter 0.1's rows and trainer have it, row by row
    how = TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, use_cpu=True, report_to=[])
    of_trainer = Trainer(model, how, eval_dataset=rows).evaluate()["eval_loss"]
    assert given["score"](model) == pytest.approx(of_trainer, rel=1e-5)
    for row in rows:
        row["labels"] = row["input_ids"]  # with the prompts it is another number
    assert given["score"](model) != pytest.approx(of_trainer, rel=1e-3)


def test_4_3_the_line_that_clips_rounds_to_half_of_the_largest() -> None:
    (line,) = re.findall(r"`(quantize_after_training\(.+?\))`", use_it())
    model = randomize(inject(lab.load_base("nano")[0], config(r=2)))
    before = {name: layer.A.clone() for name, layer in adapter_layers(model).items()}
    exec(line, {"model": model, "quantize_after_training": quantize_after_training})
    for name, layer in adapter_layers(model).items():
        group, given = layer.factors()[0][0, :64], before[name][0, :64]
        torch.testing.assert_close(group.abs().max(), given.abs().max() / 2)


def test_4_3_the_line_that_trains_with_the_rounding_does() -> None:
    section = use_it()
    (line,) = re.findall(r"`(inject\(.+?\))`", section)
    model = lab.load_base("nano")[0]
    given = {"inject": inject, "model": model, "config": config(r=2)}
    exec(line, given | {"QuantizedLoRALinear": QuantizedLoRALinear})
    randomize(model)
    for layer in adapter_layers(model).values():
        A, B, _ = layer.factors()
        assert layer.bits_A == layer.bits_B == 2
        assert all(len(row.abs().unique()) <= 2 for row in A[:, :64])  # zero, and one size
        assert not torch.equal(A, layer.A) and not torch.equal(B, layer.B)
