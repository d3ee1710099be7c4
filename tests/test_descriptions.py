"""`lora_course.descriptions`: what differs between two ways of injecting."""

import warnings
from pathlib import Path

import torch

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.descriptions import UNKNOWN, describe_adapter, differences
from lora_course.injection import inject
from lora_course.progressive import begin_stage
from tests.models import config, logits, qwen
from tests.progressive.models import STAGES, fill, stacked


def test_a_difference_is_named_with_both_values_and_descriptive_fields_are_passed_over() -> None:
    one = describe_adapter(inject(qwen(), config(r=3, task_type="CAUSAL_LM")))
    other = describe_adapter(inject(qwen(), config(r=5)))
    assert differences(one, other) == ["config.r is 3 there and 5 here"]
    assert differences(one, one) == []


def test_what_is_unknown_differs_from_nothing_and_what_is_missing_from_all() -> None:
    assert differences({"rows": UNKNOWN}, {"rows": "a"}) == []
    assert differences({}, {"rows": "a"}) == ["rows is None there and 'a' here"]


def test_a_base_that_holds_earlier_stages_is_not_taken_for_another_one(tmp_path: Path) -> None:
    model = begin_stage(stacked(mode="merge"), STAGES[0])
    fill(model, 9)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_adapter(qwen(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
