"""A real server: SmolLM2-135M with the course's adapters, asked by name, its greedy answers held against `generate`.

    python -m tools.lanes.serve                            # makes an environment of its own: some minutes, 3 GB
    python -m tools.lanes.serve --python env/bin/python    # one that has the server

The server is vLLM (tools/lanes/server.py). One adapter is named on the command line, one is added while the server runs, and
one of too large a rank must be refused. It is served twice, with `--max-loras` one above the adapters and equal to them, since
this build answers the base's requests in a mixed batch with an adapter's update once every slot is taken. Then its tokens a
second are measured (tools/lanes/throughput.py). All goes to lora_course/data/served.json, which chapter 4.4 reads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from lora_course import inject, lab, unload
from lora_course.experiments.task_scores import task_rows_of
from lora_course.export import export_peft, load_peft
from lora_course.lab import study, tasks
from tools.lanes import server, throughput
from tools.lanes.places import Place
from tools.lanes.server import LIMIT, RECORD, ask

SERVED = 2  # adapters that are served at once
ADAPTERS = {
    "past": {"task": "past", "r": 8, "steps": 20, "length": 32},
    "plural": {"task": "plural", "r": 8, "steps": 20, "length": 40},
    "wide": {"task": "past", "r": 2 * LIMIT, "steps": 2, "length": 32},
}
BATCH, RATE, SEED, QUESTIONS, NEW_TOKENS = 12, 2e-3, 0, 8, 12


def train(folder: Path) -> dict[str, dict[str, Any]]:
    """Writes `folder/base` and a folder for each of `ADAPTERS`. Returns first and last loss (nats an answer token) by adapter."""
    model, tokenizer = lab.load_base("smol")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    losses = {}
    for name, how in ADAPTERS.items():
        config = LoraConfig(
            r=how["r"], lora_alpha=2 * how["r"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        torch.manual_seed(SEED)
        inject(model, config)
        rows = task_rows_of({"model": "smol", "batch": BATCH, **how}, how["task"], SEED)
        seen = study.fit(model, rows, RATE, SEED, how["steps"], BATCH, disable_tqdm=True)
        losses[name] = {**how, "losses": [round(seen[0], 3), round(seen[-1], 3)]}
        export_peft(
            model, folder / name, uniform=True, base_model_name_or_path=lab.base_path("smol")
        )
        unload(model)
    return losses


def questions(name: str) -> list[str]:
    """What is asked of the base ("base") or of an adapter: the first words of its task's test split."""
    task = "past" if name == "base" else ADAPTERS[name]["task"]
    return tasks.load_task(task, "test")["question"][:QUESTIONS]


def generated(folder: Path) -> dict[str, list[str]]:
    """The answers of base and adapters by `generate`, from the folders that the server reads, in fp32."""
    model, tokenizer = lab.load_base(str(folder / "base"))
    answers = {"base": tasks.write_answers(model, tokenizer, "past", questions("base"), max_new_tokens=NEW_TOKENS)}  # fmt: skip
    for name in ("past", "plural"):
        load_peft(model, folder / name)
        answers[name] = tasks.write_answers(
            model, tokenizer, ADAPTERS[name]["task"], questions(name), max_new_tokens=NEW_TOKENS
        )
        unload(model)
    return answers


def listed(address: str) -> list[str]:
    return [model["id"] for model in json.loads(ask(address, "/v1/models")[1])["data"]]


def chat(address: str, name: str, question: str) -> str:
    """One greedy answer of the model or adapter `name` to a chat of two messages."""
    task = tasks.task("past" if name == "base" else ADAPTERS[name]["task"])
    messages = [
        {"role": "system", "content": task.instruction},
        {"role": "user", "content": question},
    ]
    body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS}
    status, text = ask(address, "/v1/chat/completions", body)
    if status != 200:
        raise RuntimeError(f"{name} was asked {question!r} and the server said {status}: {text}")
    return json.loads(text)["choices"][0]["message"]["content"].strip()


def run(python: Path, folder: Path) -> dict[str, Any]:
    """All that the record holds."""
    record: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "versions": server.versions(python),
    }
    record["adapters"] = train(folder)
    by_generate = generated(folder)
    for name, slots in (("a slot to spare", SERVED + 1), ("every slot taken", SERVED)):
        record[name] = exchange(python, folder, slots, by_generate)
    return record


def exchange(
    python: Path, folder: Path, slots: int, by_generate: dict[str, list[str]]
) -> dict[str, Any]:
    """What a server with so many slots for adapters says."""
    arguments, log = server.arguments("base", slots, ["past"]), folder / "server.log"
    allow = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with server.serving(python, folder, arguments, log, **allow) as (address, seconds, _):
        seen: dict[str, Any] = {
            "arguments": arguments,
            "seconds until it answered": round(seconds),
        }
        seen["listed"] = listed(address)
        add = {"lora_name": "plural", "lora_path": str(folder / "plural")}
        seen["added"] = ask(address, "/v1/load_lora_adapter", add)
        seen["listed after"] = listed(address)
        wide = {"lora_name": "wide", "lora_path": str(folder / "wide")}
        status, text = ask(address, "/v1/load_lora_adapter", wide)
        seen["refused"] = [status, json.loads(text)["error"]["message"]]
        asked = [(name, question) for name in by_generate for question in questions(name)]
        with ThreadPoolExecutor(len(asked)) as pool:  # all at once, so that batches are mixed
            said = list(pool.map(lambda pair: chat(address, *pair), asked))
        seen["base by itself"] = [chat(address, "base", question) for question in questions("base")]
        seen["removed"] = ask(address, "/v1/unload_lora_adapter", {"lora_name": "plural"})
    expected = [answer for answers in by_generate.values() for answer in answers]
    seen["answers"] = [
        {"model": name, "question": question, "server": served, "generate": alone}
        for (name, question), served, alone in zip(asked, said, expected, strict=True)
    ]
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, help="of an environment that has the server")
    parser.add_argument("--keep", type=Path, help="a folder for models and the server's log")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        folder = given.keep or Path(passing)
        folder.mkdir(parents=True, exist_ok=True)
        python = given.python or server.install(Place(folder, beside=False))
        record = run(python, folder.resolve())
        record["throughput"] = throughput.measure(python, folder.resolve())
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for name in ("a slot to spare", "every slot taken"):
        answers = record[name]["answers"]
        alike = sum(answer["server"] == answer["generate"] for answer in answers)
        print(f"{name}: {alike} of {len(answers)} answers are those of generate")
    print(throughput.report(record["throughput"]))


if __name__ == "__main__":
    main()
