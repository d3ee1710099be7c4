"""The recipe of chapter 0.1."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_course import lab, load_adapter
from tests.recipes import opening, recipe, small

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW = 128  # tokens: holds a chat below, and not one that is to be too long
OURS = "from lora_course import AdapterTrainer"
PEFT, PLAIN = "from peft import PeftModel, get_peft_model", "from lora_course import lab\n"
RUNS = "[(16, 1e-4, 0), (16, 2e-4, 0), (16, 4e-4, 0)]"  # rank, rate, seed
MIDDLE = "[(16, 2e-4, 0)]"
SMALL_GPU = re.compile(r"^( +)# ((?:[a-z_]+=\w+,\s?){2})$", re.MULTILINE)


def parts(steps: int) -> tuple[str, str, str, str]:
    """The rows of chats, the training with PEFT alone, the training with the package, the rows of plain text."""
    code = small(recipe("0_1_lora"), steps, ROW).replace(str(lab.base_path("nano")), "nano")
    chats, rest = code.split(PEFT)
    alone, rest = rest.split(OURS)
    ours, plain = rest.split(PLAIN)
    return chats, PEFT + alone, OURS + ours, PLAIN + plain


def on_cpu(code: str) -> str:
    """What `Trainer` wants to be told on a CPU, in fp32, with a warm-up of the two steps' length."""
    told = code.replace("bf16=True", "use_cpu=True").replace("warmup_steps=10", "warmup_steps=1")
    assert "use_cpu" in told and "warmup_steps=1," in told
    return told


def for_a_small_gpu(code: str) -> str:
    """The same lines at the middle rate, with the arguments for a small GPU, which stand there as comments."""
    uncommented, count = SMALL_GPU.subn(r"\1\2", code.replace(RUNS, MIDDLE))
    assert count == 2 and MIDDLE in uncommented
    return re.sub('"(runs|adapters|merged)', r'"small/\1', uncommented)


def apart(first: str, second: str) -> float:
    """How far two saved adapters are apart, relative to the first one's factors B."""
    one, two = (load_file(next(Path(folder).glob("*.safetensors"))) for folder in (first, second))
    names = [name for name in one if re.search(r"\bB$|lora_B", name)]
    assert len(names) == 28 and one.keys() == two.keys()
    apart = sum((one[name] - two[name]).square().sum() for name in names)
    return float((apart / sum(one[name].square().sum() for name in names)).sqrt())


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
    chats, _, ours, plain = parts(steps=2)
    tokenizer = AutoTokenizer.from_pretrained("nano")
    texts = opening(lab.excerpt(lab.load_text("shakespeare", "train"), 90_000))
    given = {"texts": texts, "pairs": pairs(2)}  # two pairs: one to ask, and no rows
    exec(chats + plain, given)
    assert len(given["rows"]) > 16
    code = chats + plain + ours
    exec(ours, given)
    losses = given["losses"]
    assert len(set(losses.values())) == 3  # each rate trained from the base, on its own
    kept_runs = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}
    more = code.replace(
        "(16, 4e-4, 0)", "(16, 4e-4, 0), (16, 8e-4, 0), (16, 2e-4, 1), (64, 1e-4, 0)"
    )
    exec(more, given)  # a rate, a seed and a rank more, as the text says
    added = [f"resumed-{run}" for run in ("r16-0.0008-0", "r16-0.0002-1", "r64-0.0001-0")]
    assert given["losses"] == losses | {run: given["losses"][run] for run in added}
    assert len(set(given["losses"].values())) == 6
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
    with pytest.raises(NameError, match="'model'"):  # it is merged: a run on it is none on the base
        exec(ours, given)


def pairs(count: int) -> list[tuple[str, str]]:
    """Prompts and answers of different lengths, every tenth longer than a row."""
    said = ["Ay, my lord." * (1 + i % 7) for i in range(count)]
    return [(f"Number {i}?", text * (100 if i % 10 == 9 else 1)) for i, text in enumerate(said)]


def test_0_1_chat_rows_are_the_template_and_count_the_answer_alone(
    base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained("nano")
    given = {"pairs": pairs(30)}
    exec(parts(steps=2)[0], given)
    assert "3 of 30 left out" in capsys.readouterr().out
    assert (len(given["held_out"]), len(given["rows"])) == (20, 7)
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
    tokenizer.save_pretrained("nano")
    with pytest.raises(AssertionError, match="rewrites a prompt"):
        exec(parts(steps=2)[0], {"pairs": pairs(30)})


@pytest.mark.slow
def test_0_1_trains_on_chats_with_peft_alone_and_with_runs_that_go_on(
    base: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One step of Adam is the gradient's signs, of which bf16 turns some on some CPUs: what is compared is in fp32. With
    # one row a step instead of eight the two would be 0.4 apart.
    monkeypatch.setenv("LORA_COURSE_CPU_DTYPE", "float32")
    chats, alone, ours_lines, _ = parts(steps=2)
    given = {"pairs": pairs(50)}
    exec(chats + on_cpu(alone), given)
    losses, best = given["losses"], given["best"]
    assert len(set(losses.values())) == 3 and losses[best] == min(losses.values())
    assert "<user>Number 0?" in capsys.readouterr().out  # the question, in the template
    assert apart(f"adapters/{best}", "adapters/mine") == 0
    theirs = json.loads(Path("adapters/mine/adapter_config.json").read_text())
    ids = torch.tensor([given["rows"][0]["input_ids"][:16]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), "adapters/mine")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained("merged")(input_ids=ids).logits
    assert (adapted - before).abs().max() > 2e-3  # twenty times what is allowed below
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    with pytest.raises(NameError, match="'model'"):  # it is merged: a run on it is none on the base
        exec(on_cpu(alone), dict(given))

    more = alone.replace(RUNS, "[(16, 2e-4, 1)]").replace("losses = {}\n", "")
    exec(chats + on_cpu(more), given)  # one run more, as the text says
    assert given["losses"] == losses | {"r16-0.0002-1": given["losses"]["r16-0.0002-1"]}
    assert len(set(given["losses"].values())) == 4
    exec(chats + for_a_small_gpu(on_cpu(alone)), given)
    assert apart("adapters/r16-0.0002-0", "small/adapters/r16-0.0002-0") < 0.1  # the same steps

    given = {"pairs": pairs(50)}
    exec(chats + ours_lines, given)
    assert len(set(given["losses"].values())) == 3
    ours = json.loads(Path("adapters/mine/adapter_config.json").read_text())
    for field in ("r", "lora_alpha", "task_type"):
        assert ours[field] == theirs[field]
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    exec(chats + for_a_small_gpu(ours_lines), given)
    middle = "adapters/resumed-r16-0.0002-0"
    assert apart(middle, f"small/{middle}") < 0.1  # the same steps
