"""Checks of the exercises in chapter 5.1, the comparison."""

from lora_course.classroom.chapter_5_1.fairness import check_fair_differences
from lora_course.classroom.chapter_5_1.front import check_sure_front
from lora_course.classroom.chapter_5_1.ranks import check_equal_rank
from lora_course.classroom.chapter_5_1.seeds import check_seeds_needed

__all__ = ["check_equal_rank", "check_fair_differences", "check_seeds_needed", "check_sure_front"]
