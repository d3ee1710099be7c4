"""The recipe of chapter 0.1."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_course import lab, load_adapter
from tests.recipes import opening, recipe, small

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW = 128  # tokens: holds a chat below, and not one that is to be too long
CHATS, PEFT = "def chat_row", "from peft import LoraConfig, PeftModel, get_peft_model"


def parts(steps: int) -> tuple[str, str, str]:
    """The script, the rows of chats, the script with PEFT alone."""
    code = small(recipe("0_1_lora"), steps, ROW).replace(str(lab.base_path("nano")), "nano")
    script, chats = code.split(CHATS)
    chats, alone = chats.split(PEFT)
    return script, CHATS + chats, PEFT + alone


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """nano under the folder "nano" of the current folder, with a chat template."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = lab.load_base("nano")
    model.save_pretrained("nano")  # in fp32, so that the merge is exact; its own file is in 16 bits
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("nano")
    return model


@pytest.mark.slow
def test_0_1_trains_an_adapter_that_peft_loads_and_merges_it_into_a_plain_model(base: Any) -> None:
    code, tokenizer = parts(steps=2)[0], AutoTokenizer.from_pretrained("nano")
    given = {"texts": opening(lab.excerpt(lab.load_text("shakespeare", "train"), 90_000))}
    exec(code, given)
    losses = given["losses"]
    assert len(set(losses.values())) == 3  # each rate trained from the base, on its own
    kept_runs = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}
    exec(code.replace("4e-4)", "4e-4, 8e-4)"), given)  # one more rate, as the text says
    assert given["losses"] == losses | {8e-4: given["losses"][8e-4]}
    assert all(path.stat().st_mtime_ns == before for path, before in kept_runs.items())
    losses = given["losses"]
    ids = lab.blocks(tokenizer, lab.load_text("glosses", "test"), 32)[:4]["input_ids"]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        chosen = load_adapter(copy.deepcopy(base), f"adapters/{min(losses, key=losses.get)}")
        kept = chosen(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, "adapters/mine")(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained("merged")(input_ids=ids).logits
    torch.testing.assert_close(kept, adapted, atol=1e-4, rtol=1e-4)  # of the best rate
    # two steps move the logits a hundred times as far as fp32 rounds them
    assert (adapted - before).abs().max() > 0.01
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)


def pairs(count: int) -> list[tuple[str, str]]:
    """Prompts and answers of different lengths, every tenth longer than a row."""
    said = ["Ay, my lord." * (1 + i % 7) for i in range(count)]
    return [(f"Number {i}?", text * (100 if i % 10 == 9 else 1)) for i, text in enumerate(said)]


def test_0_1_chat_rows_are_the_template_and_count_the_answer_alone(base: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained("nano")
    given = {"tokenizer": tokenizer, "pairs": pairs(30)}
    exec(parts(steps=2)[1], given)
    assert (len(given["held_out"]), len(given["rows"])) == (20, 7)  # 3 of 30 are too long
    for i, row in enumerate(given["held_out"][:9]):
        prompt, answer = given["pairs"][i]
        read = tokenizer.decode([t for t, m in zip(row["input_ids"], row["attention_mask"]) if m])
        assert read == f"<user>{prompt}\n<assistant>{answer}<|endoftext|>\n"
        counted = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert counted == f"{answer}<|endoftext|>\n"
        assert {len(values) for values in row.values()} == {ROW}


def test_0_1_a_template_that_rewrites_its_prompt_is_refused(base: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained("nano")
    tokenizer.chat_template = TEMPLATE.replace("<assistant>", "<assistant><think>")
    with pytest.raises(AssertionError, match="rewrites a prompt"):
        exec(parts(steps=2)[1], {"tokenizer": tokenizer, "pairs": pairs(30)})


@pytest.mark.slow
def test_0_1_trains_on_chats_here_and_with_peft_alone(base: Any) -> None:
    script, chats, alone = parts(steps=2)
    blocks = [line for line in script.splitlines() if "lab.blocks(" in line]
    assert len(blocks) == 2 and script.count("\n".join(blocks)) == 1
    given = {"pairs": pairs(50)}
    exec(script.replace("\n".join(blocks), chats), given)
    assert len(set(given["losses"].values())) == 3
    ours = json.loads(Path("adapters/mine/adapter_config.json").read_text())

    on_cpu = alone.replace("bf16=True", "bf16=True, use_cpu=True")  # Trainer wants to be told
    exec(on_cpu.replace("warmup_steps=10", "warmup_steps=1"), given)  # of two steps
    assert len(set(given["losses"].values())) == 3
    theirs = json.loads(Path(f"adapters/peft-{given['best']}/adapter_config.json").read_text())
    for field in ("r", "lora_alpha", "task_type"):
        assert ours[field] == theirs[field]
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    ids = torch.tensor([given["rows"][0]["input_ids"][:16]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, f"adapters/peft-{given['best']}")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained("merged-peft")(input_ids=ids).logits
    assert (adapted - before).abs().max() > 2e-3  # twenty times what is allowed below
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
