"""Studies: many short trainings whose results are kept, and the one training they are all made of."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import itertools
import json
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_course.arguments import training_arguments
from lora_course.training import AdapterTrainer

STUDIES = Path(__file__).resolve().parents[1] / "data" / "studies"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def fit(
    model: nn.Module,
    rows: datasets.Dataset,
    learning_rate: float,
    seed: int,
    steps: int,
    batch: int,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    auxiliary_loss: Callable[[nn.Module], Tensor] | None = None,
    **overrides: Any,
) -> list[float]:
    """Trains the adapter of `model` in place and returns the loss (nats a token) at each step. Nothing is kept on disk.

    One recipe for every method of the course: AdamW, 10% warm-up, then linearly to zero; the seed sets the order of the
    rows, so that two methods with one seed see the same batches. callbacks, auxiliary_loss: what a method adds to the
    training, as in `AdapterTrainer`; the losses then contain it. overrides: fields of `TrainingArguments`.
    """
    settings = {
        "learning_rate": learning_rate, "seed": seed, "max_steps": steps, "per_device_train_batch_size": batch,
        "warmup_steps": 0.1, "save_strategy": "no", "lr_scheduler_type": "linear",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(folder, **settings | overrides)
        trainer = AdapterTrainer(
            model,
            arguments,
            train_dataset=rows,
            callbacks=list(callbacks),
            auxiliary_loss=auxiliary_loss,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.history]


class Study:
    """Results by key in one JSON file, written after each run: a study that is killed goes on where it was.

    path: the file. sources: the files whose text makes the results; their hash is stored with them, and results of
    other sources are not mixed in. Raises ValueError where the file holds results of other sources or settings.
    """

    def __init__(self, path: Path, sources: list[Path], settings: dict[str, Any]) -> None:
        self.path = path
        self.record: dict[str, Any] = {
            "script": sources[0].name,
            "source_sha256": source_hash(sources),
            "settings": settings,
            "versions": {
                "python": platform.python_version(),
                **{p: importlib.metadata.version(p) for p in PACKAGES},
            },
            "runs": {},
        }
        if path.exists():
            old = json.loads(path.read_text())
            for key in ("source_sha256", "settings"):
                if old[key] != self.record[key]:
                    raise ValueError(
                        f"{path} holds results of another {key}: move it away to start the study anew."
                    )
            self.record = old

    def run(self, key: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The recorded result of `key`; computed and written first if there is none yet."""
        if key not in self.record["runs"]:
            self.record["runs"][key] = function()
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.record, indent=1) + "\n")
            part.replace(self.path)
        return self.record["runs"][key]


def load_study(name: str) -> dict[str, Any]:
    """A committed study: `script`, `source_sha256`, `settings`, `versions` and `runs` (results by key)."""
    return json.loads((STUDIES / f"{name}.json").read_text())


def source_hash(sources: list[Path]) -> str:
    """SHA-256 over files, or the Python files of folders, in the order given: of data its bytes, of Python its syntax tree, so that an edited comment,
    docstring or line break is no other source."""
    digest = hashlib.sha256()
    files = [sorted(path.glob("*.py")) if path.is_dir() else [path] for path in sources]
    for path in itertools.chain(*files):
        digest.update(
            _code(path.read_text()).encode() if path.suffix == ".py" else path.read_bytes()
        )
    return digest.hexdigest()


def _code(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
