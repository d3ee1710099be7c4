"""Checks of the exercises in chapter 3.2, distillation."""

from lora_course.classroom.chapter_3_2.certainty import check_mix_by_certainty
from lora_course.classroom.chapter_3_2.jensen_shannon import check_jsd_loss
from lora_course.classroom.chapter_3_2.repair import check_a_token
from lora_course.classroom.chapter_3_2.reverse import check_reverse_gradient

__all__ = ["check_a_token", "check_jsd_loss", "check_mix_by_certainty", "check_reverse_gradient"]
