"""The shipped data: texts, splits, licences, and that nano is what its card says."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.nano.measuring import SLICE
from tools.nano.scores import bits_per_byte, order_n_bits
from tools.nano.text import excerpt, read

ROOT = Path(__file__).resolve().parent.parent
TEXT, NANO = ROOT / "lora_course/data/text", ROOT / "lora_course/data/nano"
DOMAINS = ("glosses", "bible", "shakespeare", "milton", "python")
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def text() -> dict[str, list[dict[str, str]]]:
    """All rows of each domain, read as a chapter reads them."""
    return {
        name: Dataset.from_parquet(str(TEXT / f"{name}.parquet"), keep_in_memory=True).to_list()
        for name in DOMAINS
    }


@pytest.fixture(scope="module")
def provenance() -> dict:
    return json.loads((NANO / "provenance.json").read_text())


@pytest.fixture(scope="module")
def nano() -> tuple:
    return AutoModelForCausalLM.from_pretrained(
        NANO, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(NANO)


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_has_three_splits_of_a_useful_size(text, name):
    rows = text[name]
    assert set(rows[0]) == {"split", "source", "text"}
    assert {row["split"] for row in rows} == set(SPLITS)
    assert len({row["source"] for row in rows}) == len(rows)
    for split in SPLITS[1:]:
        assert sum(len(row["text"].encode()) for row in rows if row["split"] == split) >= 100_000


@pytest.mark.parametrize("name", DOMAINS)
def test_a_work_is_in_one_split_only(text, name):
    """A play, a book of the Bible, a Python module; a section of glosses and a book of Milton are works of their own."""
    work = {
        "glosses": lambda source: source,
        "bible": lambda source: source.rsplit(" ", 1)[0],
        "shakespeare": lambda source: source.split("/")[0],
        "milton": lambda source: source,
        "python": lambda source: source.split("/")[0],
    }[name]
    splits: dict[str, set[str]] = {}
    for row in text[name]:
        splits.setdefault(work(row["source"]), set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values()), {
        k: v for k, v in splits.items() if len(v) > 1
    }


@pytest.mark.parametrize("name", DOMAINS)
def test_held_out_text_does_not_repeat_train(text, name):
    """Fewer than one in 200 of the held-out runs of four lines stands in train, and no document does."""

    def runs(split: str) -> set[tuple[str, ...]]:
        found = set()
        for row in text[name]:
            if row["split"] == split:
                lines = [line.strip() for line in row["text"].splitlines() if line.strip()]
                found |= {tuple(lines[i : i + 4]) for i in range(len(lines) - 3)}
        return found

    documents = {
        split: {row["text"] for row in text[name] if row["split"] == split} for split in SPLITS
    }
    train = runs("train")
    for split in SPLITS[1:]:
        held = runs(split)
        assert len(held & train) < len(held) / 200
        assert not documents[split] & documents["train"]
    assert not documents["validation"] & documents["test"]


def test_no_gutenberg_header_and_no_control_characters(text):
    for name, rows in text.items():
        joined = "".join(row["text"] for row in rows)
        assert "Project Gutenberg" not in joined, name
        assert not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", joined.replace("\x0c", "")), name


def test_the_card_names_each_domain_with_its_licence_and_size(text):
    card = (TEXT / "README.md").read_text()
    for name, rows in text.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert (
            "licence" in row.lower() or "public domain" in row.lower() or "license" in row.lower()
        )
        size = sum(len(r["text"].encode()) for r in rows if r["split"] == "train")
        assert f"{size:,} in" in card
    assert (
        "Princeton University" in card and "Permission to use, copy, modify and distribute" in card
    )


def test_sizes():
    assert sum(path.stat().st_size for path in TEXT.iterdir()) <= 8_000_000
    assert sum(path.stat().st_size for path in NANO.iterdir()) <= 12_000_000


def test_nano_is_a_qwen2_with_shapes_that_quantise(nano):
    model, tokenizer = nano
    assert model.config.model_type == "qwen2" and model.config.tie_word_embeddings
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert all(size % 64 == 0 for size in module.weight.shape), name
    assert json.loads((NANO / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize(
    "sample",
    [
        "dog, domestic dog (n.): a member",
        "  def f(x):\n\treturn x  \n\n",
        "naïve 中文 🙂 \x00\r\n",
        "",
        "a  b   c .",
        "<|endoftext|",
    ],
)
def test_the_tokenizer_loses_nothing(nano, sample):
    tokenizer = nano[1]
    ids = tokenizer(sample)["input_ids"]
    assert tokenizer.decode(ids) == sample
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


def test_the_tokenizer_round_trips_every_domain(nano, text):
    tokenizer = nano[1]
    for rows in text.values():
        sample = max((row["text"] for row in rows if row["split"] == "validation"), key=len)[
            :20_000
        ]
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample


def test_nano_has_the_bits_per_byte_that_its_card_says(nano, provenance):
    """Recomputed on the first documents of each test split, and the card's table against the recorded figures."""
    measured = provenance["measured"]
    card = (NANO / "README.md").read_text()
    for name in DOMAINS:
        recorded = measured["domains"][name]
        first = excerpt(read(name, "test"), SLICE)
        assert bits_per_byte(*nano, first) == pytest.approx(recorded["slice"], abs=2e-3)
        assert f"| {name} | {recorded['bytes a token']:.2f} | {recorded['nano']:.2f} |" in card


def test_nano_knows_its_own_domain(provenance):
    """Better than xz and an order-5 byte model that were given the same glosses, and than the project's target of 1.65."""
    measured = provenance["measured"]
    assert measured["domains"]["glosses"]["nano"] < min(measured["baselines"]["glosses"].values())
    assert measured["domains"]["glosses"]["validation"] <= 1.65


@pytest.mark.parametrize("name", DOMAINS[1:])
def test_a_plain_lora_cuts_an_unseen_domain_by_a_quarter(provenance, name):
    row = provenance["measured"]["domains"][name]
    assert row["lora"]["test"] <= 0.75 * row["nano"]


def test_provenance_matches_the_files(provenance):
    assert (
        provenance["measured"]["weights"]
        == hashlib.sha256((NANO / "model.safetensors").read_bytes()).hexdigest()
    )
    for name, digest in provenance["text"].items():
        assert hashlib.sha256((TEXT / name).read_bytes()).hexdigest() == digest


def test_the_order_5_model_is_a_probability_distribution():
    """Summed over all next bytes its probabilities are 1, and on text without structure it can't beat 8 bits."""
    train = b"abracadabra, abracadabra! " * 3
    probabilities = []
    for byte in range(256):
        whole = order_n_bits(train, b"abra" + bytes([byte])) * 5
        probabilities.append(2 ** -(whole - order_n_bits(train, b"abra") * 4))
    assert sum(probabilities) == pytest.approx(1, abs=1e-9)
    noise = (
        torch.randint(
            0, 256, (20_000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        .numpy()
        .tobytes()
    )
    assert order_n_bits(noise[:10_000], noise[10_000:]) > 7.9
