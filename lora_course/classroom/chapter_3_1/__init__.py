"""Checks of the exercises in chapter 3.1, ranks that grow."""

from lora_course.classroom.chapter_3_1.both import check_grow_both
from lora_course.classroom.chapter_3_1.introducing import check_introduce
from lora_course.classroom.chapter_3_1.moves import check_move_ranks
from lora_course.classroom.chapter_3_1.parts import check_without_parts

__all__ = ["check_grow_both", "check_introduce", "check_move_ranks", "check_without_parts"]
