"""`lora_course.lab.study`: a study goes on where it stopped, and does not mix results of other code; `fit` is paired by seed."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from lora_course.injection import inject
from lora_course.lab import blocks, load_base, load_text
from lora_course.lab.study import STUDIES, Study, fit, load_study, source_hash

ROOT = Path(__file__).resolve().parents[2]


def test_a_study_runs_what_is_missing_only_and_refuses_other_sources_and_settings(
    tmp_path: Path,
) -> None:
    source, ran = tmp_path / "script.py", []
    source.write_text("1")

    def result(value: int) -> dict[str, int]:
        ran.append(value)
        return {"value": value}

    Study(tmp_path / "s.json", [source], {"steps": 3}).run("a", lambda: result(1))
    again = Study(tmp_path / "s.json", [source], {"steps": 3})
    assert again.run("a", lambda: result(9)) == {"value": 1}
    assert again.run("b", lambda: result(2)) == {"value": 2}
    assert ran == [1, 2]
    assert json.loads((tmp_path / "s.json").read_text())["runs"] == {
        "a": {"value": 1},
        "b": {"value": 2},
    }
    with pytest.raises(ValueError, match="another settings"):
        Study(tmp_path / "s.json", [source], {"steps": 4})
    source.write_text("3")
    with pytest.raises(ValueError, match="another source_sha256"):
        Study(tmp_path / "s.json", [source], {"steps": 3})


def test_fit_repeats_itself_and_the_seed_orders_the_rows() -> None:
    def train(seed: int) -> list[float]:
        model, tokenizer = load_base("nano")
        rows = blocks(tokenizer, load_text("bible", "validation")[:6], 32)
        torch.manual_seed(0)
        inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
        return fit(model, rows, 1e-2, seed=seed, steps=4, batch=2, disable_tqdm=True)

    first = train(1)
    assert len(first) == 4
    assert train(1) == first
    assert train(2) != first


def test_fit_takes_what_a_method_adds_to_the_training() -> None:
    class Counter(TrainerCallback):
        seen: list[int] = []

        def on_optimizer_step(self, args, state, control, **_) -> None:
            self.seen.append(state.global_step + 1)

    model, tokenizer = load_base("nano")
    rows = blocks(tokenizer, load_text("bible", "validation")[:6], 32)
    inject(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    losses = fit(
        model,
        rows,
        1e-2,
        0,
        2,
        2,
        callbacks=[Counter()],
        auxiliary_loss=lambda m: torch.tensor(100.0),
        disable_tqdm=True,
    )
    assert Counter.seen == [1, 2] and min(losses) > 100


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_committed_studies_carry_their_script_seeds_versions_and_source(path: Path) -> None:
    record = load_study(path.stem)
    settings = record["settings"]
    assert len(settings["seeds"]) >= 3 if "seeds" in settings else settings["draws"] >= 3
    assert record["runs"]
    if (
        "command" in record
    ):  # the comparison keeps sources by run and versions by method, as methods are computed apart
        assert record["command"] == "lora-course compare"
        assert {key.split("/")[0] for key in record["runs"]} == set(record["methods"])
        assert all(re.fullmatch("[0-9a-f]{16}", run["source"]) for run in record["runs"].values())
        assert all(
            method["versions"]["torch"] and method["date"] for method in record["methods"].values()
        )
        return
    scripts = list((ROOT / "tools" / "studies").glob(record["script"]))
    assert len(scripts) == 1
    assert record["versions"]["torch"] and len(record["source_sha256"]) == 64


def test_source_hash_depends_on_the_code_and_data_of_every_file_and_not_on_comments(
    tmp_path: Path,
) -> None:
    a, b = tmp_path / "a.py", tmp_path / "b.parquet"
    a.write_text("def f(x):\n    return x + 1\n"), b.write_text("y")
    first = source_hash([a, b])
    a.write_text('def f(x):\n    """Adds one."""\n    return x + 1  # really\n')
    assert source_hash([a, b]) == first
    a.write_text("def f(x):\n    return x + 2\n")
    second = source_hash([a, b])
    b.write_text("z")
    assert len({first, second, source_hash([a, b])}) == 3
