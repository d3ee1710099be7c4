"""The recipe of each chapter ("Use it") runs as it stands, on a small model in place of the large one."""

import re
from pathlib import Path

import pytest

from lora_course import experts, lab
from lora_course.continual import load_results
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject, unload
from lora_course.states import concatenate, relative_error
from tests.models import config, randomize
from tools.run_chapters import ROOT

LARGE = '"Qwen/Qwen2.5-7B-Instruct"'


def recipe(stem: str) -> str:
    """The Python under "Use it" of a chapter's source."""
    source = (ROOT / "notebooks" / f"{stem}.md").read_text()
    section = source[source.index("\n## Use it") : source.index("\n## The idea")]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code


def small(code: str, steps: int) -> str:
    """The recipe with nano in place of the large model, and few steps."""
    shorter, count = re.subn(r"max_steps=\d+", f"max_steps={steps}", code)
    assert LARGE in code and count == 1
    return shorter.replace(LARGE, repr(str(lab.base_path("nano"))))


@pytest.mark.slow
def test_2_1_puts_three_folders_of_peft_under_a_router_and_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    for seed, name in enumerate(("law", "code", "support")):
        export_peft(randomize(inject(base, config(r=2 + seed)), seed), f"adapters/{name}")
        unload(base)
    given = {"mixed": lab.load_text("bible", "train")[:40]}
    exec(small(recipe("2_1_experts"), steps=2), given)
    model = given["model"]
    assert (tmp_path / "adapters" / "mixture" / "adapter.safetensors").is_file()
    assert experts.expert_state(model, 2).keys() and len(adapter_layers(model)) == 28
    routers = [layer.router for layer in adapter_layers(model).values() if hasattr(layer, "router")]
    assert len(routers) == 4
    # started at a size of 0.02; two steps of a rate of 0.05 move entries further than that
    assert all(router.abs().max() > 0.05 for router in routers)


@pytest.mark.slow
def test_3_3_learns_two_tasks_in_turn_and_merges_two_folders_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = lab.load_base("nano")[0]
    for seed, name in enumerate(("law", "code")):
        export_peft(randomize(inject(base, config(r=2 + seed)), seed), f"adapters/{name}")
        unload(base)
    domains = ("bible", "python")
    given = {
        "texts": {d: lab.excerpt(lab.load_text(d, "train"), 40_000) for d in domains},
        "held_out": {d: lab.excerpt(lab.load_text(d, "validation"), 6_000) for d in domains},
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
    assert relative_error(read_factors("adapters/both"), concatenate(parts, [0.5, 0.5])) < 1e-5
