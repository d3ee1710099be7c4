"""`lora_course.descriptions`: what differs between two ways of injecting."""

from lora_course.descriptions import UNKNOWN, describe_adapter, differences
from lora_course.injection import inject
from tests.models import config, qwen


def test_a_difference_is_named_with_both_values_and_descriptive_fields_are_passed_over() -> None:
    one = describe_adapter(inject(qwen(), config(r=3, task_type="CAUSAL_LM")))
    other = describe_adapter(inject(qwen(), config(r=5)))
    assert differences(one, other) == ["config.r is 3 there and 5 here"]
    assert differences(one, one) == []


def test_what_is_unknown_differs_from_nothing_and_what_is_missing_from_all() -> None:
    assert differences({"rows": UNKNOWN}, {"rows": "a"}) == []
    assert differences({}, {"rows": "a"}) == ["rows is None there and 'a' here"]
