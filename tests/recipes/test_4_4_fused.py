"""The recipes of chapter 4.4: merged, served and checked, in one call, written once more, trained fused."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_course import lab
from lora_course.export import export_peft
from lora_course.injection import disabled, inject, unload
from lora_course.serving import row_adapters
from tests.models import config, randomize, relative
from tests.recipes import opening, small
from tools.chapters import ROOT

TEMPLATE = "<|endoftext|>{% for message in messages %}{{ message['content'] }}{% endfor %}"


USE_IT, FUSED = (
    ("\n## Use it", "\n## The idea"),
    ("\n## A fused training step", "\n### The backward"),
)


def blocks(language: str, *sections: tuple[str, str]) -> list[str]:
    """Fenced blocks of sections of the chapter's source, each from one heading to another."""
    source = (ROOT / "notebooks" / "4_4_fused.md").read_text()
    found = []
    for head, end in sections:
        section = source[source.index(head) : source.index(end)]
        found += re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with nano that has a chat template and two adapters that change its answers.

    `adapters` are as PEFT mostly writes them, and `trained` have two ranks and two scales each.
    """
    monkeypatch.chdir(tmp_path)
    model, tokenizer = lab.load_base("nano")
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained("nano")
    tokenizer.save_pretrained("nano")
    for seed, (tenant, rank) in enumerate({"law": 4, "code": 2}.items()):
        one = config(r=rank, lora_alpha=3 * rank)
        two = config(r=rank, lora_alpha=3 * rank, rank_pattern={"q_proj": 1})
        for folder, given in {"adapters": one, "trained": two}.items():
            export_peft(randomize(inject(model, given), seed), f"{folder}/{tenant}")
            unload(model)
    return tmp_path


class Server(ThreadingHTTPServer):
    """Chat completions as PEFT loads the adapters; `confused` answers everybody as the base."""

    confused = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = AutoTokenizer.from_pretrained("nano")
        self.one_at_a_time = threading.Lock()  # loading a model is not for several threads

    def answer(self, body: dict[str, Any]) -> str:
        assert body["temperature"] == 0
        model = AutoModelForCausalLM.from_pretrained("nano")
        folder = Path("adapters") / body["model"]
        if folder.exists() and not self.confused:
            model = PeftModel.from_pretrained(model, str(folder))
        ids = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False)[0]
        return self.tokenizer.decode(tokens[ids["input_ids"].shape[1] :], skip_special_tokens=True)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.one_at_a_time:
            reply = {"choices": [{"message": {"content": self.server.answer(body)}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(place: Path) -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def verdicts(printed: str) -> list[bool]:
    return [line == "True" for line in printed.splitlines() if line in ("True", "False")]


def test_4_4_folders_are_served_checked_merged_batched_and_trained_on(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    written = blocks("python", USE_IT, FUSED)
    code = small("\n".join(written), steps=2).replace(repr(str(lab.base_path("nano"))), "'nano'")
    assert code.count("=60") == 2 and code.count(": 60") == 1
    code = code.replace("=60", "=8").replace(": 60", ": 8")
    code = code.replace("localhost:8000", f"127.0.0.1:{server.server_port}")
    merge, check, batch, rewrite, train = split_as(code, written)
    given: dict[str, Any] = {
        "texts": lab.load_text("bible", "train")[:40],
        "held_out": opening(lab.load_text("bible", "test")[:2]),
    }
    exec(merge, given)
    # nano is in fp32: its merge moves no score, and random factors make a ΔW of some size
    assert given["after"] == pytest.approx(given["before"], abs=1e-4)
    assert 0.01 < min(given["sizes"]) <= max(given["sizes"]) < 10
    ids = torch.arange(12)[None]
    plain = AutoModelForCausalLM.from_pretrained("merged")
    assert not any("lora" in parameter for parameter, _ in plain.named_parameters())
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("nano"), "adapters/law")
    # the merged weights are rounded once more, 6e-8 of each; logits are of the order of ten
    torch.testing.assert_close(plain(ids).logits, beside(ids).logits, atol=1e-4, rtol=1e-4)

    exec(check, given)
    assert verdicts(capsys.readouterr().out) == [True, True, True]
    server.confused = True
    exec(check, given)
    assert verdicts(capsys.readouterr().out) == [True, False, False]

    exec(batch, given)
    model, rows = given["model"], given["batch"]
    with torch.no_grad():
        with row_adapters(model, ["law", "code", None]):
            logits = model(**rows).logits[:, -1]
        with disabled(model):
            without = model(**rows).logits[:, -1]
    assert relative(logits[0], without[0]) > 0.05 and relative(logits[1], without[1]) > 0.05
    torch.testing.assert_close(logits[2], without[2])

    exec(rewrite, given)
    for tenant, rank in {"law": 4, "code": 2}.items():
        read, wrote = (
            json.loads(Path(folder, tenant, "adapter_config.json").read_text())
            for folder in ("trained", "adapters")
        )
        assert read["rank_pattern"] and wrote["r"] == rank
        assert not wrote["rank_pattern"] and not wrote["alpha_pattern"]
        was, now = (
            PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained("nano"), f"{folder}/{tenant}"
            )(ids).logits
            for folder in ("trained", "adapters")
        )
        torch.testing.assert_close(now, was, atol=1e-4, rtol=1e-4)

    exec(train, given)
    fused = json.loads(Path("trained/law/adapter_config.json").read_text())
    assert fused["r"] == 16, "the last block trained and wrote a new one"


def split_as(code: str, written: list[str]) -> list[str]:
    """The recipe in its blocks again, after it was made small."""
    found, start = [], 0
    for block in written:
        length = block.count("\n") + 1
        found.append("\n".join(code.split("\n")[start : start + length]))
        start += length
    assert "\n".join(found) == code
    return found


def test_4_4_the_server_is_told_what_the_recipe_made() -> None:
    (start, asked, resolver), (trained,) = blocks("bash", USE_IT), blocks("python", FUSED)
    code = "\n".join(blocks("python", USE_IT))
    assert re.findall(r"--max-lora-rank (\d+)", start) == re.findall(r"\br=(\d+)", trained)
    tenants = re.search(r"for tenant in \((.+?)\):", code)[1]
    assert re.findall(r"--lora-modules (\S+)", start) == ["law=adapters/law"] and '"law"' in tenants
    chat, added, removed = (
        json.loads(body) for body in re.findall(r"-d '(.*?)'", asked, re.DOTALL)
    )
    assert added == {"lora_name": "code", "lora_path": "adapters/code"} and '"code"' in tenants
    assert removed == {"lora_name": added["lora_name"]}
    assert "CACHE_DIR=adapters\n" in resolver and start.split("=")[0] in resolver
    assert chat.pop("model") == "law"
    given: dict[str, Any] = {}
    exec(re.search(r"^question = .*\nhow = .*\n", code, re.MULTILINE)[0], given)
    assert given["how"] == chat, "curl and the check ask the same"
    addresses = re.findall(r"localhost:8000/\S+", asked + code)
    assert {a.strip('",') for a in addresses} == {
        "localhost:8000/v1/models", "localhost:8000/v1/chat/completions", "localhost:8000/v1/load_lora_adapter",
        "localhost:8000/v1/unload_lora_adapter",
    }  # fmt: skip
