"""What a training sets on a model object is given back, whatever happens in between."""

import pytest

from lora_course.kept import kept_as_it_is, set_use_cache, uses_cache
from tests.models import qwen


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
