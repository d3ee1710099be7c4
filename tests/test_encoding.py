"""What the package reads and writes is UTF-8 on every system: Windows' code page knows no Δ."""

import ast
import re
from pathlib import Path

import pytest

from tools.chapters import ROOT

FILES = sorted((ROOT / "lora_course").rglob("*.py"))
NO_FILES = ("os", "Image")  # their `open` gives a number, or a picture


def left_to_the_system(source: str) -> list[int]:
    """The lines that read or write text in whatever encoding the system prefers."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        owner = getattr(getattr(call.func, "value", None), "id", "")
        modes = [*call.args, *(key.value for key in call.keywords if key.arg == "mode")]
        texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
        opens = name == "open" and owner not in NO_FILES and not any("b" in str(t) for t in texts)
        reads = (
            name == "read_text" and not call.args
        )  # given by place; a distribution's takes a name, and is UTF-8
        if opens or reads or (name == "write_text" and len(call.args) < 2):
            found += [call.lineno] * all(key.arg != "encoding" for key in call.keywords)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_text_is_left_to_the_systems_encoding(path: Path) -> None:
    assert left_to_the_system(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.md")), ids=lambda p: p.stem)
def test_no_text_of_a_chapter_is_left_to_the_systems_encoding(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(
        r"^```(?:python|\{code-cell\}.*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    assert blocks
    for block in blocks:
        code = re.sub(r"^(?::tags:.*|%.*)$", "", block, flags=re.MULTILINE)
        assert left_to_the_system(code) == [], block


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("path.read_text()", 1),
        ("path.write_text('Δ')", 1),
        ("open(path, 'w')", 1),
        ("path.open('a')", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("path.open(mode='xb')", 0),
        ("open(path, 'rb')", 0),
        ("os.open(path, flags)", 0),
        ("distribution.read_text('METADATA')", 0),
    ],
)
def test_such_a_line_is_found(line: str, count: int) -> None:
    assert len(left_to_the_system(line)) == count
