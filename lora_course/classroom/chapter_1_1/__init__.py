"""Checks of the exercises in chapter 1.1, QLoRA."""

from lora_course.classroom.chapter_1_1.conv1d import check_conv1d
from lora_course.classroom.chapter_1_1.quantizer import check_quantizer
from lora_course.classroom.chapter_1_1.storage import check_storage

__all__ = ["check_conv1d", "check_quantizer", "check_storage"]
