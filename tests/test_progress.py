"""`lora_course.progress`: what a training shows while it runs."""

from pathlib import Path

import pytest

from lora_course.training import AdapterTrainer
from tests.half_nano import arguments, injected, rows


def test_progress_goes_to_the_error_stream_with_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = AdapterTrainer(
        injected(), arguments(tmp_path, disable_tqdm=False), train_dataset=rows()
    )
    trainer.train()
    shown = capsys.readouterr()
    assert "6/6" in shown.err and "loss=" in shown.err
    assert shown.out == ""
