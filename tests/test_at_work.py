"""The page for work: its Python runs from top to bottom on nano, and does what the text around it says."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from lora_course import cli, lab
from lora_course.injection import adapter_layers
from tests.recipes import opening
from tests.talks import TALKS, TEMPLATE
from tools.chapters import ROOT

pytest.importorskip("trl", reason="TRL is not installed: pip install --no-deps trl")
PAGE = (ROOT / "book" / "at-work.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TRAIN, RATES, CHATS, SAVE, PEFT, SERVE, MERGE = BLOCKS


def small(code: str, name: str) -> str:
    """A block with nano in place of the large model and three steps on short rows; SFTConfig wants a GPU unless it is told."""
    code = re.sub(r"max_steps=\d+", "max_steps=3", code).replace("Qwen/Qwen2.5-7B-Instruct", name)
    code = code.replace("length=512", "length=64")
    return code.replace("trl.SFTConfig(", "trl.SFTConfig(use_cpu=True, bf16=False, output_dir=")


@pytest.mark.slow
def test_the_page_runs_from_training_to_a_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(chatty(tmp_path / "nano"))
    talks = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TALKS * 4
    ]
    given: dict[str, Any] = {
        "texts": lab.load_text("bible", "train")[:40],
        "unseen_texts": opening(lab.load_text("bible", "test")[:20]),
        "chats": datasets.Dataset.from_dict({"messages": talks}),
    }

    def run(block: str) -> nn.Module:
        exec(small(block, name), given)
        return given["model"]

    base = logits(lab.load_base("nano")[0])
    start = logits(run(TRAIN))
    assert not torch.equal(start, base)
    assert given["how"].train_batch_size * 500 == 4000  # as the page counts the rows

    found = logits(run(RATES))
    assert len(set(given["losses"].values())) == 3 and not torch.equal(found, base)
    assert len(list((tmp_path / "runs").glob("support-*/checkpoint-3"))) == 3
    losses = given["losses"]
    assert torch.equal(logits(run(RATES)), found) and given["losses"] == losses  # taken over

    talked = logits(run(CHATS))
    assert not torch.equal(talked, found)

    assert torch.equal(logits(run(SAVE)), talked)
    model = run(PEFT)
    assert (logits(model) - talked).abs().max() < 1e-4  # two changes of wrapper, in fp32
    assert len(adapter_layers(model)) == 28

    run(SERVE)
    served = json.loads((tmp_path / "adapters" / "served" / "adapter_config.json").read_text())
    assert served["base_model_name_or_path"] == name and not served["rank_pattern"]
    assert cli.main(["convert", "adapters/support", "adapters/converted", "--base", name]) == 0
    assert (tmp_path / "adapters" / "converted" / "adapter_config.json").is_file()

    run(MERGE)
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert not adapter_layers_of(merged) and (logits(merged) - talked).abs().max() < 1e-3


def chatty(folder: Path) -> Path:
    """nano in a folder of its own, whose tokenizer has a chat template."""
    model, _ = lab.load_base("nano")
    tokenizer = AutoTokenizer.from_pretrained(lab.base_path("nano"))
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter_layers_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if "base_layer" in name]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(40, 72)[None]
    return model.eval()(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits


def test_every_chapter_that_the_page_sends_to_exists() -> None:
    linked = set(re.findall(r"\.\./notebooks/(\w+)\.ipynb", PAGE))
    chapters = {path.stem for path in (ROOT / "notebooks").glob("*.md")}
    assert linked == chapters
