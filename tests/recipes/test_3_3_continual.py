"""The recipe of chapter 3.3."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from lora_course import lab
from lora_course.continual import Reservoir, Task, load_results
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import inject, unload
from lora_course.states import concatenate, relative_error
from tests.models import config, randomize
from tests.recipes import recipe, small


@pytest.mark.slow
def test_3_3_learns_two_tasks_in_turn_and_merges_two_folders_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    for seed, name in enumerate(("law", "code")):
        export_peft(randomize(inject(base, config(r=2 + seed)), seed), f"adapters/{name}")
        unload(base)
    wanted = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    export_peft(randomize(inject(base, wanted), 2), "adapters/in-service")
    unload(base)
    tokenizer = lab.load_base("nano")[1]
    milton = lab.blocks(tokenizer, lab.excerpt(lab.load_text("milton", "train"), 40_000), 512)
    shakespeare = lab.blocks(
        tokenizer, lab.excerpt(lab.load_text("shakespeare", "train"), 40_000), 512
    )
    domains = ("bible", "python")
    given = {
        "texts": {d: lab.excerpt(lab.load_text(d, "train"), 40_000) for d in domains},
        "held_out": {d: lab.excerpt(lab.load_text(d, "validation"), 6_000) for d in domains},
        "old_rows": milton,
        "old_test": milton.select(range(2)),
        "new": Task("shakespeare", shakespeare, shakespeare.select(range(2))),
    }
    exec(small(recipe("3_3_continual"), steps=2), given)
    matrix = load_results("runs/tasks").matrix
    assert matrix.shape == (3, 2) and matrix.isfinite().all()
    assert matrix[1, 0] < matrix[0, 0]  # two steps on the Bible, and it is read a little better
    assert (tmp_path / "runs" / "tasks" / "stage-2" / "memory.safetensors").is_file()
    learnt = read_factors("adapters/all-tasks")
    assert any(tensor.any() for key, tensor in learnt.items() if key.endswith(".B"))
    # rank 16 holds the ranks 2 and 3 whole, so the cut loses nothing; fp32 rounds at 1e-7
    parts = [read_factors(f"adapters/{name}") for name in ("law", "code")]
    for weight in (0.25, 0.5, 1.0):
        expected = concatenate(parts, [weight, weight])
        assert relative_error(read_factors(f"adapters/both-{weight}"), expected) < 1e-5
    # the run goes on from the adapter in service, and its memory starts with the old rows
    start = load_file("runs/law-then-new/stage-0/adapter.safetensors")
    served = read_factors("adapters/in-service")
    assert all(
        torch.allclose(start[key], served[key].float()) for key in start if key[-2:] in (".A", ".B")
    )
    assert any(key[-2:] in (".A", ".B") for key in start)
    memory = Reservoir(2**24)
    memory.load(tmp_path / "runs" / "law-then-new" / "stage-0" / "memory.safetensors")
    assert memory.seen == len(milton) and len(memory.rows) == len(milton)
