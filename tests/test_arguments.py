"""`lora_course.arguments`: defaults that suit an adapter, and a user's own that win."""

from pathlib import Path

from lora_course.arguments import training_arguments


def test_a_field_that_is_given_wins(tmp_path: Path) -> None:
    made = training_arguments(tmp_path, device="cpu", learning_rate=1e-3, save_total_limit=None)
    assert made.learning_rate == 1e-3 and made.save_total_limit is None
    assert made.use_cpu and made.report_to == [] and not made.fp16
