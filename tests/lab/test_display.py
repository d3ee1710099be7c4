"""`lora_course.lab.display`: an expected failure that does not happen fails the chapter; shown source is the real one."""

import inspect

import pytest

from lora_course.lab import display, fails, show_source


def test_fails_prints_kind_and_first_line_of_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    fails(int, "three\nfour")
    assert (
        capsys.readouterr().out
        == "ValueError: invalid literal for int() with base 10: 'three\\nfour'\n"
    )


def test_fails_raises_where_nothing_breaks() -> None:
    with pytest.raises(AssertionError, match="int was expected to fail"):
        fails(int, "3")


def test_shown_source_is_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(display, "display", lambda item: shown.append(item.data))
    show_source(fails, show_source)
    assert shown == [
        f"```python\n{inspect.getsource(fails).rstrip()}\n\n\n{inspect.getsource(show_source).rstrip()}\n```"
    ]


def test_a_long_message_is_folded_to_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ValueError("expected a matrix of some shape, got " + "another " * 30)

    fails(refuse)
    first, *others = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first.startswith("ValueError: expected a matrix") and len(others) >= 2
    assert all(len(line) <= 88 for line in (first, *others))
    assert all(line.startswith("    another") for line in others)
