"""Checks of the exercises in chapter 2.2, progressive LoRA."""

from lora_course.classroom.chapter_2_2.restart import check_restart
from lora_course.classroom.chapter_2_2.schedule import check_jagged_cosine
from lora_course.classroom.chapter_2_2.stages import check_given_scaling

__all__ = ["check_given_scaling", "check_jagged_cosine", "check_restart"]
