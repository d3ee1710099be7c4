"""Checks of the exercises in chapter 4.4, fused LoRA."""

from lora_course.classroom.chapter_4_4.backward import check_gated_backward
from lora_course.classroom.chapter_4_4.merging import check_merge_rounded, check_times_merged
from lora_course.classroom.chapter_4_4.tokens import check_flat_updates

__all__ = [
    "check_flat_updates",
    "check_gated_backward",
    "check_merge_rounded",
    "check_times_merged",
]
