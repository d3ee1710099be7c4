"""`lora_course.machine.convert`: what it refuses before any work; what it writes is tried in `tests/test_cli.py`."""

from pathlib import Path

import pytest

from lora_course.machine.convert import convert


@pytest.mark.parametrize(("files", "words"), [((), "neither"), (("adapter.json", "adapter_config.json"), "both")])  # fmt: skip
def test_a_source_of_no_one_format_is_refused(
    tmp_path: Path, files: tuple[str, ...], words: str
) -> None:
    (tmp_path / "source").mkdir()
    for name in files:
        (tmp_path / "source" / name).write_text("{}")
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "source", tmp_path / "target", "nano")
    assert not (tmp_path / "target").exists()


def test_a_target_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "adapter.json").write_text("{}")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        convert(tmp_path / "source", tmp_path, "nano")
