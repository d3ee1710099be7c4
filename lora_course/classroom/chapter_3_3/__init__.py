"""Checks of the exercises in chapter 3.3, continual learning and merging."""

from lora_course.classroom.chapter_3_3.losses import check_losses_of_a_run
from lora_course.classroom.chapter_3_3.mixture import check_best_weights
from lora_course.classroom.chapter_3_3.span import check_out_of_span
from lora_course.classroom.chapter_3_3.weighted import check_offer

__all__ = ["check_best_weights", "check_losses_of_a_run", "check_offer", "check_out_of_span"]
