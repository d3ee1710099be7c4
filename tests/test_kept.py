"""What a training sets on a model object is given back, whatever happens in between."""

import pytest
import torch

from lora_course.injection import adapter_layers, inject
from lora_course.kept import kept_as_it_is, kept_factors, set_use_cache, uses_cache
from lora_course.states import adapter_state
from tests.models import config, qwen, randomize


def test_forward_and_cache_are_what_they_were_also_after_an_error() -> None:
    model = qwen()
    model.config.use_cache = True
    with pytest.raises(RuntimeError, match="stop"), kept_as_it_is(model):
        model.forward = lambda: "wrapped"
        set_use_cache(model, False)
        assert uses_cache(model) is False
        raise RuntimeError("stop")
    assert "forward" not in vars(model) and uses_cache(model) is True


def test_a_wrapper_that_was_there_before_stays() -> None:
    model = qwen()
    mine = lambda: "mine"  # noqa: E731
    model.forward = mine
    with kept_as_it_is(model):
        model.forward = lambda: "wrapped"
        model._is_accelerate_prepared = True
    assert model.forward is mine and "_is_accelerate_prepared" not in vars(model)


def test_what_is_trained_keeps_its_type_and_its_numbers() -> None:
    """TRL casts the factors over a 4-bit base to bf16 while a trainer is made."""
    model = randomize(inject(qwen(), config()))
    before = adapter_state(model)
    with kept_factors(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        assert next(iter(adapter_layers(model).values())).A.dtype == torch.bfloat16
    after = adapter_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(layer.A.dtype == torch.float32 for layer in adapter_layers(model).values())
