"""book/architecture.md: the variant that it shows is one, and what it names is there."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor  # noqa: F401  # for the page's code

from lora_course.arguments import training_arguments
from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.injection import adapter_layers, inject, merge, unmerge
from lora_course.lora import LAYERS, LoRALinear, register  # noqa: F401  # for the page's code
from lora_course.training import AdapterTrainer
from tests.models import batch, config, qwen, randomize

PAGE = Path(__file__).parents[1] / "book" / "architecture.md"


def test_the_variant_that_the_page_shows_is_injected_trained_saved_and_loaded(
    tmp_path: Path,
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = dict(globals())
    exec(code, names)
    kind = names["HalvedLoRALinear"]
    try:
        model = inject(qwen(), config(), kind)
        torch.testing.assert_close(model(**batch()).logits, qwen()(**batch()).logits)
        randomize(model)
        ids = batch()["input_ids"].tolist()
        data = [{"input_ids": row, "labels": row} for row in ids]
        settings = {"max_steps": 2, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
        arguments = training_arguments(tmp_path, device="cpu", **settings)
        AdapterTrainer(model, arguments, train_dataset=data).train()
        again = load_adapter(qwen(), save_adapter(model, tmp_path / "saved")).eval()
        expected = model.eval()(**batch()).logits
        torch.testing.assert_close(again(**batch()).logits, expected)
        layer = next(iter(adapter_layers(model).values()))
        half = layer.scaling / 2 * layer.B @ layer.A
        torch.testing.assert_close(layer.delta_weight(), half, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(merge(model)(**batch()).logits, expected, atol=2e-5, rtol=1e-5)
        unmerge(model)
    finally:
        LAYERS.pop("HalvedLoRALinear", None)


def test_the_page_names_every_room() -> None:
    package = PAGE.parents[1] / "lora_course"
    rooms = {path.stem for path in package.glob("[a-z]*.py")} | {
        path.parent.name for path in package.glob("[a-z]*/__init__.py")
    }
    text = PAGE.read_text()
    assert not sorted(name for name in rooms if f"`{name}`" not in text)


@pytest.mark.parametrize("name", ["book/architecture.md", "CONTRIBUTING.md"])
def test_the_files_and_commands_that_a_guide_names_are_there(name: str) -> None:
    """But for what the reader is to write: `lora_course/mine.py`, chapter N_M, `<variant>`."""
    root = PAGE.parents[1]
    text = (root / name).read_text()
    paths = set(re.findall(r"`([\w.-]+/[\w./-]+)`", text))
    commands = set(re.findall(r"-m ((?:tools|tests|benchmarks)[\w.]*)", text))
    assert len(paths) > 5 and len(commands) > 1
    written = re.compile(r"mine|N_M|^build/|^\.venv/")
    there = [*paths, *(command.replace(".", "/") for command in commands)]
    missing = [
        path
        for path in there
        if not written.search(path)
        and not any((root / f"{path}{ending}").exists() for ending in ("", ".py"))
    ]
    assert not missing
