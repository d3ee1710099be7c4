"""What adapters cost a server: the tokens a processor second that vLLM writes, with and without LoRA, on this machine's CPU.

    python -m tools.lanes.serve                                                # this too, at the end
    python -m tools.lanes.throughput --python env/bin/python --folder FOLDER   # this alone: what serve left with --keep FOLDER

Three servers run side by side: the base without LoRA, the base with an adapter merged into it, and the base with LoRA and a
slot more than adapters. In each round each arm sends the same requests at once, to one of them, while the others idle. All
requests write equally many tokens, whatever their model would say, from a prompt of one word: it is writing that is timed, in
processor seconds of the one thread that computes, which other programs disturb less than a clock on the wall. Ratios are of arms
within a round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lora_course import lab, merge, unload
from lora_course.experiments.timing import processors, race
from lora_course.export import load_peft
from lora_course.lab import tasks
from tools.lanes import server

REQUESTS, NEW_TOKENS, ROUNDS = 16, 24, 7
THREADS = 1  # more would wait for each other, in a loop that counts as processor time
ADAPTERS = ("past", "plural")
FIXED = "--no-enable-prefix-caching"  # else a later arm may find an earlier one's prompts computed
SERVERS = {
    "plain": [*server.arguments("base"), FIXED],
    "merged": [*server.arguments("merged"), FIXED],
    "LoRA": [*server.arguments("base", len(ADAPTERS) + 1, ADAPTERS), FIXED],
}
ARMS = {
    "no LoRA": ("plain", ("base",)),
    "merged": ("merged", ("merged",)),
    "base": ("LoRA", ("base",)),
    "one adapter": ("LoRA", ADAPTERS[:1]),
    "two adapters": ("LoRA", ADAPTERS),
}
"""Arm → the server that is asked, and the models that its requests name in turn."""


def save_merged(folder: Path) -> None:
    """Writes `folder/merged`, the base with the first adapter merged into it, from folders that `serve.train` wrote."""
    model, tokenizer = lab.load_base(str(folder / "base"))
    unload(merge(load_peft(model, folder / ADAPTERS[0]))).save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")


def burst(address: str, models: Sequence[str]) -> list[str]:
    """All requests at once, of `models` in turn: a word each, to be gone on from. What was written."""
    words = tasks.load_task("past", "test")["question"][:REQUESTS]
    how = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}

    def one(i: int) -> dict[str, Any]:
        body = {"model": models[i % len(models)], "prompt": words[i], **how}
        status, text = server.ask(address, "/v1/completions", body)
        if status != 200:
            raise RuntimeError(f"{body} was asked and the server said {status}: {text}")
        return json.loads(text)

    with ThreadPoolExecutor(REQUESTS) as pool:
        replies = list(pool.map(one, range(REQUESTS)))
    written = [reply["usage"]["completion_tokens"] for reply in replies]
    if written != [NEW_TOKENS] * REQUESTS:
        raise RuntimeError(f"{NEW_TOKENS} tokens were asked of each request, and {written} came")
    return [reply["choices"][0]["text"] for reply in replies]


def rates(seconds: Mapping[str, Sequence[float]], tokens: int) -> dict[str, list[float]]:
    """From the seconds of each arm in each round, in which it wrote `tokens` tokens."""
    return {name: [round(tokens / s, 2) for s in times] for name, times in seconds.items()}


def against(
    found: Mapping[str, Sequence[float]], over: str
) -> dict[str, tuple[float, float, float]]:
    """Arm → median, least and most of its rates over those of the arm `over` in the same rounds."""
    ratios = {
        name: [a / b for a, b in zip(own, found[over], strict=True)] for name, own in found.items()
    }
    return {name: (statistics.median(r), min(r), max(r)) for name, r in ratios.items()}


def measure(python: Path, folder: Path) -> dict[str, Any]:
    """The record's part, from the folders that `serve.train` wrote."""
    save_merged(folder)
    names = processors()
    found: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "versions": server.versions(python),
        "machine": {
            "processor": names[0] if names else "unknown",
            "cores": os.cpu_count(),
            "threads": THREADS,
        },
        "servers": SERVERS,
        "requests": REQUESTS,
        "new tokens": NEW_TOKENS,
    }
    said: dict[str, list[str]] = {}
    with ExitStack() as stack:
        running = {}
        for name, arguments in SERVERS.items():
            log = folder / f"server-{name}.log"
            started = server.serving(python, folder, arguments, log, OMP_NUM_THREADS=str(THREADS))
            running[name] = stack.enter_context(started)

        def clock() -> float:
            """Of all servers; those that are not asked do nothing."""
            return sum(server.processor_seconds(one.process) for one in running.values())

        def arm(name: str) -> None:
            asked, models = ARMS[name]
            said[name] = burst(running[asked].address, models)

        seconds = race({name: partial(arm, name) for name in ARMS}, ROUNDS, clock)
    found["tokens a processor second"] = rates(seconds, REQUESTS * NEW_TOKENS)
    for one, other in (("no LoRA", "base"), ("merged", "one adapter")):
        alike = sum(a == b for a, b in zip(said[one], said[other], strict=True))
        found[f"answers of {one} and {other} that are equal"] = alike
    return found


def report(found: Mapping[str, Any]) -> str:
    lines = [
        f"{name:12} {middle:.2f} of a server without LoRA ({least:.2f} to {most:.2f})"
        for name, (middle, least, most) in against(
            found["tokens a processor second"], "no LoRA"
        ).items()
    ]
    return "\n".join(["tokens a processor second, median (range) of the rounds' ratios", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--python", type=Path, required=True, help="of an environment that has the server"
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="what tools.lanes.serve left with --keep"
    )
    given = parser.parse_args()
    record = json.loads(server.RECORD.read_text())
    record["throughput"] = measure(given.python, given.folder.resolve())
    server.RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(report(record["throughput"]))


if __name__ == "__main__":
    main()
