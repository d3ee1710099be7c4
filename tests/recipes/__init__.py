"""The recipe of each chapter ("Use it") runs as it stands, on a small model in place of the large one."""

import re

from lora_course import lab
from tools.chapters import ROOT

LARGE = '"Qwen/Qwen2.5-7B-Instruct"'


def recipe(stem: str, start: str = "Use it", end: str = "The idea") -> str:
    """The Python under "Use it" of a chapter's source, or between two other headings, all blocks in order."""
    source = (ROOT / "notebooks" / f"{stem}.md").read_text()
    section = source[source.index(f"\n## {start}") : source.index(f"\n## {end}")]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert blocks
    return "\n".join(blocks)


def small(code: str, steps: int, length: int = 64) -> str:
    """The recipe with nano in place of the large model, and few steps on short rows."""
    code, counted = re.subn(r"\b((?:max_)?steps)=\d+", rf"\1={steps}", code)
    code, rows = re.subn(r"\b512\b", str(length), code)
    assert LARGE in code and counted and rows
    return code.replace(LARGE, repr(str(lab.base_path("nano"))))


def opening(texts: list[str]) -> list[str]:
    """The first 400 characters of each text: most of what a recipe on whole ones takes is the scoring of the held out."""
    return [text[:400] for text in texts]


def chats(
    texts: list[str], count: int, asked: int = 40, length: int = 64
) -> list[dict[str, list[int]]]:
    """Rows of nano's tokens as `chat_row` of chapter 0.1 makes them: the first `asked` are a question, and don't count."""
    ids = lab.blocks(lab.load_base("nano")[1], texts, length)[:count]["input_ids"].tolist()
    return [
        {"input_ids": row, "attention_mask": [1] * length, "labels": [-100] * asked + row[asked:]}
        for row in ids
    ]
