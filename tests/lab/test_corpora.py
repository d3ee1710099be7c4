"""The course's text and bits per byte."""

import math

import datasets
import pytest
import torch
from torch.nn import functional as F

from lora_course.lab import corpora
from lora_course.lab.corpora import (
    DOMAINS,
    SPLITS,
    bits_per_byte,
    blocks,
    describe,
    excerpt,
    load_documents,
    load_text,
)
from lora_course.lab.models import load_base

TEXTS = [
    "Blessed are the meek: for they shall inherit the earth.",
    "é",
    "",
    "def area(r):\n    return 3.14 * r**2\n" * 4,
]


@pytest.fixture(scope="module")
def nano():
    return load_base("nano")


class Uniform(torch.nn.Module):
    """A model that finds every token equally likely."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": vocabulary})()
        self.embedding = torch.nn.Embedding(1, 1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        return type(
            "Output", (), {"logits": torch.zeros(*input_ids.shape, self.config.vocab_size)}
        )()


def by_hand(model, tokenizer, texts: list[str], context: int) -> float:
    """One token after the other, one document at a time."""
    bits = 0.0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        for i in range(1, len(ids)):
            first = (i - 1) // context * context  # the input of this token's window
            with torch.no_grad():
                logits = model(torch.tensor([ids[first:i]])).logits[0, -1]
            bits -= F.log_softmax(logits.double(), -1)[ids[i]].item() / math.log(2)
    return bits / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("context", [5, 16, 256])
def test_bits_per_byte_scores_every_token_once_in_its_window(nano, context) -> None:
    model, tokenizer = nano
    assert bits_per_byte(model, tokenizer, TEXTS, context) == pytest.approx(
        by_hand(model, tokenizer, TEXTS, context), rel=1e-5
    )


def test_a_uniform_model_needs_log2_of_the_vocabulary_a_token(nano) -> None:
    tokenizer = nano[1]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    expected = math.log2(4096) * tokens / sum(len(text.encode()) for text in TEXTS)
    assert bits_per_byte(Uniform(4096), tokenizer, TEXTS, 7) == pytest.approx(expected, rel=1e-6)


def test_batching_and_padding_do_not_matter(nano, monkeypatch) -> None:
    model, tokenizer = nano
    texts = load_text("milton", "test")[0][:3000].split("\n\n")
    together = bits_per_byte(model, tokenizer, texts, 32)
    monkeypatch.setattr(corpora, "LOGITS_AT_ONCE", 1)  # one window at a time
    assert bits_per_byte(model, tokenizer, texts, 32) == pytest.approx(together, rel=1e-5)


def test_the_order_of_documents_does_not_matter_but_their_text_does(nano) -> None:
    model, tokenizer = nano
    forward = bits_per_byte(model, tokenizer, TEXTS, 16)
    assert bits_per_byte(model, tokenizer, TEXTS[::-1], 16) == pytest.approx(forward, rel=1e-5)
    assert bits_per_byte(model, tokenizer, ["zq xj " * 30], 16) > 1.5 * bits_per_byte(
        model, tokenizer, ["of the " * 30], 16
    )


def test_the_mode_of_every_module_is_left_and_dropout_is_off(nano) -> None:
    model, tokenizer = nano
    model.train()
    model.model.layers[1].eval()
    seen = []
    hook = model.model.layers[0].register_forward_hook(
        lambda module, *_: seen.append(module.training)
    )
    bits_per_byte(model, tokenizer, TEXTS)
    hook.remove()
    assert not any(seen) and seen
    assert (
        model.training
        and model.model.layers[0].mlp.training
        and not model.model.layers[1].mlp.training
    )
    model.eval()


def test_no_text_is_refused(nano) -> None:
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="no byte"):
            bits_per_byte(*nano, texts)


def test_an_excerpt_is_even_deterministic_and_cut_between_characters() -> None:
    texts = [f"{i:02d}" + "é" * 50 for i in range(30)]  # 102 bytes each
    taken = excerpt(texts, 100, piece=25)
    assert taken == [
        f"{i:02d}" + "é" * 11 for i in (0, 7, 15, 22)
    ]  # 25 bytes would cut a character: 24
    assert sum(len(text.encode()) for text in taken) <= 100
    assert excerpt(texts, 10**6) == texts
    assert excerpt(["abc"], 2) == ["ab"]


def test_max_bytes_counts_the_bytes_that_are_scored(nano) -> None:
    model, tokenizer = nano
    texts = load_text("bible", "validation")
    part = bits_per_byte(model, tokenizer, texts, max_bytes=3000)
    assert part == bits_per_byte(model, tokenizer, excerpt(texts, 3000))


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_split_of_every_domain_has_documents_of_its_own(domain) -> None:
    sources = {split: set(load_documents(domain, split)["source"]) for split in SPLITS}
    assert all(sources.values())
    assert not sources["train"] & (sources["validation"] | sources["test"])
    assert load_text(domain, "test") == load_documents(domain, "test")["text"][:]
    assert all(isinstance(text, str) and text for text in load_text(domain, "test"))


def test_unknown_domains_and_splits_are_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="'dante'.*glosses, bible, shakespeare, milton, python"):
        load_text("dante", "train")
    with pytest.raises(ValueError, match="'dev' of bible.*train, validation, test"):
        load_text("bible", "dev")


def test_reading_text_writes_no_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    load_text("milton", "test")
    assert list(tmp_path.iterdir()) == []


def test_the_overview_counts_bytes_and_documents() -> None:
    table = describe()
    assert list(table.index) == list(DOMAINS)
    texts = load_text("python", "test")
    assert table.loc["python", "test: documents"] == len(texts)
    assert table.loc["python", "test: kB"] == round(
        sum(len(text.encode()) for text in texts) / 1000
    )


def test_blocks_join_documents_after_a_start_token_and_drop_only_the_rest(nano) -> None:
    tokenizer = nano[1]
    stream = []
    for text in TEXTS:
        stream += [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    dataset = blocks(tokenizer, TEXTS, 10)
    assert dataset["input_ids"][:].shape == (len(stream) // 10, 10)
    assert dataset["input_ids"][:].flatten().tolist() == stream[: len(stream) // 10 * 10]
    assert torch.equal(dataset["input_ids"][:], dataset["labels"][:])
    assert dataset["input_ids"][:].dtype == torch.int64


def test_too_little_text_for_a_block_is_refused(nano) -> None:
    with pytest.raises(ValueError, match="fewer than one block of length=512"):
        blocks(nano[1], ["short"], 512)
