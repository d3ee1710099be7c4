"""The families of graded problems, two or more a chapter, one file a chapter."""

import importlib
import pkgutil
from functools import cache

from lora_course.classroom.families.family import Choices, Family

__all__ = ["Choices", "Family", "families", "find", "of_chapter"]


@cache
def families() -> dict[str, Family]:
    """Every family by id, in the order of the chapters."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("chapter_"))
    found = [
        family
        for name in names
        for family in importlib.import_module(f"{__name__}.{name}").FAMILIES
    ]
    return {family.id: family for family in found}


def of_chapter(chapter: str) -> list[Family]:
    """The families of a chapter such as "2.1". Raises ValueError for a chapter that has none."""
    found = [family for family in families().values() if family.chapter == chapter]
    if not found:
        known = ", ".join(dict.fromkeys(family.chapter for family in families().values()))
        raise ValueError(f"chapter {chapter!r} has no graded problems; there are {known}")
    return found


def find(id: str) -> Family:
    """A family by its id. Raises ValueError where there is none."""
    if id not in families():
        raise ValueError(f"no family {id!r}; there are {', '.join(families())}")
    return families()[id]
