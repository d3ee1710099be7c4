"""Scores what was written, on test text and held-out words."""

from __future__ import annotations

import functools
import json

from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_course import lab
from lora_course.injection import inject
from lora_course.lab.tasks import grade, load_task, write_answers
from lora_course.lora import AdapterState
from lora_course.merging import average_factors
from lora_course.states import concatenate, use_adapter
from tools.playpage.adapters import (
    config,
    quantized_base,
    quantized_state,
    read_adapter,
    routed,
    with_state,
)
from tools.playpage.record import CUT, DOMAINS, FOLDER, SAMPLE_BYTES, SCORED, SETTINGS, Record


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    return lab.load_base(SETTINGS["model"])[1]


@functools.cache
def texts(domain: str, split: str, max_bytes: int) -> list[str]:
    return lab.excerpt(lab.load_text(domain, split), max_bytes)


def score_domain(
    model: nn.Module, domain: str, split: str = "test", size: str = "test_bytes"
) -> float:
    """Bits a byte."""
    sample = texts(domain, split, SETTINGS[size])
    return round(lab.bits_per_byte(model, tokenizer(), sample), 4)


def scores(model: nn.Module) -> dict[str, float]:
    return {domain: score_domain(model, domain) for domain in SCORED}


def score_task(model: nn.Module, name: str) -> dict[str, float]:
    """Of held-out words the share that is answered right, and the share of units that is wrong."""
    examples = load_task(name, "test").select(range(SETTINGS["task_words"]))
    grades = grade(name, write_answers(model, tokenizer(), name, examples["question"]), examples)
    return {key: round(grades[key], 4) for key in ("exact", "error_rate")}


def score_all(record: Record) -> None:
    base, _ = lab.load_base(SETTINGS["model"])
    record.run("sample/base", score_samples)
    record.run("scores/base", lambda: scores(base))
    for name in (*DOMAINS, "nested"):
        record.run(f"scores/{name}", lambda n=name: scores(with_state(read_adapter(n))))
    record.run("scores/routed", lambda: scores(routed()))
    equal = [1 / len(DOMAINS)] * len(DOMAINS)
    record.run(
        "scores/all averaged",
        lambda: scores(with_state(concatenate([read_adapter(d) for d in DOMAINS], equal))),
    )
    for name in (CUT, f"{CUT}-as-trained", "nested"):
        for r in SETTINGS["cuts"]:
            record.run(f"rank/{name}/{r}", lambda n=name, r=r: curve(read_adapter(n, r), CUT))
    for scale in SETTINGS["scales"]:
        record.run(
            f"scale/{scale:g}", lambda s=scale: curve(concatenate([read_adapter(CUT)], [s]), CUT)
        )
    for granularity in ("tensor", "group"):
        for bits in SETTINGS["bits"]:
            record.run(
                f"bits/adapter/{granularity}/{bits}",
                lambda g=granularity, b=bits: curve(quantized_state(read_adapter(CUT), b, g), CUT),
            )
            record.run(
                f"bits/base/{granularity}/{bits}", lambda g=granularity, b=bits: quantized(b, g)
            )
    pair = [read_adapter(name) for name in SETTINGS["merged"]]
    for name, merge in (("updates", concatenate), ("factors", average_factors)):
        for domain in SETTINGS["merged"]:
            record.run(
                f"merge/{name}/{domain}", lambda m=merge, d=domain: curve(m(pair, [0.5, 0.5]), d)
            )


def score_samples() -> dict[str, float]:
    """nano alone on the samples: the mark that the page's bars carry."""
    model, _ = lab.load_base(SETTINGS["model"])
    samples = json.loads((FOLDER / "samples.json").read_text())
    return {
        domain: round(lab.bits_per_byte(model, tokenizer(), [text]), 4)
        for domain, text in samples.items()
    }


def write_samples() -> None:
    """A piece of each domain's test text, which the page scores while one watches: whole lines from a document's middle."""
    samples = {}
    for domain in SCORED:
        texts = [text for text in lab.load_text(domain, "test") if len(text) > 5_000]
        text = texts[len(texts) // 2]
        _, _, rest = text[len(text) // 2 :].partition("\n")
        piece = rest.encode()[:SAMPLE_BYTES].decode(errors="ignore")
        samples[domain] = piece[: piece.rindex("\n") + 1].lstrip("\n")
    (FOLDER / "samples.json").write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n")


def curve(state: AdapterState, domain: str) -> float:
    return score_domain(with_state(state), domain, size="curve_bytes")


def quantized(bits: int, granularity: str) -> float:
    model = inject(lab.load_base(SETTINGS["model"])[0], config(1, 1))
    use_adapter(quantized_base(model, bits, granularity), read_adapter(CUT))
    return score_domain(model, CUT, size="curve_bytes")
