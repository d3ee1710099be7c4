"""`lora_course.instead`: an injected model's own methods that would do something else than they say."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lora_course.injection import inject, unload
from lora_course.instead import REPLACED
from tests.models import batch, config, qwen, randomize


def test_what_would_upload_freeze_or_drop_an_adapter_raises_before_it_does() -> None:
    model = randomize(inject(qwen(), config(target_modules=["q_proj", "lm_head"])))
    before = model(**batch()).logits
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match="export_peft"):
            copied.push_to_hub("somebody/something")
        with pytest.raises(RuntimeError, match="unload"):
            copied.add_adapter(config())
        with pytest.raises(RuntimeError, match="load_peft"):
            copied.load_adapter("somebody/something")
        with pytest.raises(RuntimeError, match=r"resize_token_embeddings first"):
            copied.resize_token_embeddings(120)
        assert copied.get_input_embeddings().num_embeddings == 97
        torch.testing.assert_close(copied(**batch()).logits, before, atol=0, rtol=0)
    plain = unload(model)
    assert not any(name in vars(plain) for name in REPLACED)
    plain.resize_token_embeddings(120)
    assert plain(**batch()).logits.shape[-1] == 120


def test_a_vocabulary_grows_under_an_adapter_that_is_not_on_the_head() -> None:
    model = randomize(inject(qwen(), config()))
    before = model(**batch()).logits
    model.resize_token_embeddings(120)
    torch.testing.assert_close(model(**batch()).logits[..., :97], before, atol=0, rtol=0)
