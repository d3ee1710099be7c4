"""Checks of the exercises in chapter 4.3, quantised LoRA."""

from lora_course.classroom.chapter_4_3.affine import check_affine
from lora_course.classroom.chapter_4_3.packing import check_pack_blocks
from lora_course.classroom.chapter_4_3.through import check_straight_through

__all__ = ["check_affine", "check_pack_blocks", "check_straight_through"]
