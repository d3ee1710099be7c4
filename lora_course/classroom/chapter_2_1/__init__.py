"""Checks of the exercises in chapter 2.1, multi-expert LoRA."""

from lora_course.classroom.chapter_2_1.balance import check_balance_over
from lora_course.classroom.chapter_2_1.gates import check_spread_rest
from lora_course.classroom.chapter_2_1.sequence import check_sequence_gates

__all__ = ["check_balance_over", "check_sequence_gates", "check_spread_rest"]
