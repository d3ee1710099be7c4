"""Checks of the exercises in chapter 4.1, sparse LoRA."""

from lora_course.classroom.chapter_4_1.density import check_density
from lora_course.classroom.chapter_4_1.price import check_price_step
from lora_course.classroom.chapter_4_1.switching import check_switch
from lora_course.classroom.chapter_4_1.texts import check_text_norms

__all__ = ["check_density", "check_price_step", "check_switch", "check_text_norms"]
