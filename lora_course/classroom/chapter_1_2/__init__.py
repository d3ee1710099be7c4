"""Checks of the exercises in chapter 1.2, AdaLoRA."""

from lora_course.classroom.chapter_1_2.allocation import check_allocation_floor
from lora_course.classroom.chapter_1_2.budget import check_budget_up
from lora_course.classroom.chapter_1_2.folding import check_fold

__all__ = ["check_allocation_floor", "check_budget_up", "check_fold"]
