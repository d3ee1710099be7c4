"""What tests of the studies share: a base that costs a third of nano."""

import copy
import functools
from typing import Any

import pytest

from lora_course import lab

WHOLE = lab.load_base
BLOCKS = 1


@functools.cache
def first_blocks() -> tuple[Any, Any]:
    model, tokenizer = WHOLE("nano")
    inner: Any = model.model
    inner.layers = inner.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    return model, tokenizer


@pytest.fixture(autouse=True)
def small_nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a study loads nano, its first block stands for all four: every kind of layer is there, and a step costs a third."""

    def load_base(name: Any, *arguments: Any) -> tuple[Any, Any]:
        if name != "nano":
            return WHOLE(name, *arguments)
        model, tokenizer = first_blocks()
        return copy.deepcopy(model), tokenizer

    monkeypatch.setattr(lab, "load_base", load_base)
