"""The recipe of chapter 3.3."""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from lora_course import lab
from lora_course.continual import Reservoir, Task, load_results
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import disabled, inject, unload
from lora_course.merging import ties
from lora_course.states import concatenate, relative_error, truncate, use_adapter
from tests.models import config, qwen, randomize
from tests.recipes import recipe, small
from tools.chapters import ROOT

DOMAINS = {"law": "bible", "code": "python"}


@pytest.mark.slow
def test_3_3_learns_two_tasks_in_turn_and_merges_two_folders_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, tokenizer = lab.load_base("nano")
    base.save_pretrained("nano")  # in fp32, so that scores compare; its own file is in 16 bits
    tokenizer.save_pretrained("nano")
    for seed, name in enumerate(DOMAINS):
        export_peft(randomize(inject(base, config(r=2 + seed)), seed), f"adapters/{name}")
        unload(base)
    wanted = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    export_peft(randomize(inject(base, wanted), 2), "adapters/in-service")
    unload(base)
    milton, shakespeare = (
        lab.blocks(tokenizer, lab.excerpt(lab.load_text(domain, "train"), 20_000), 64)
        for domain in ("milton", "shakespeare")
    )
    given = {
        "texts": {t: lab.excerpt(lab.load_text(d, "train"), 20_000) for t, d in DOMAINS.items()},
        "held_out": {
            t: lab.excerpt(lab.load_text(d, "validation"), 1_500) for t, d in DOMAINS.items()
        },
        "old_rows": milton,
        "old_test": milton.select(range(2)),
        "new": Task("shakespeare", shakespeare, shakespeare.select(range(2))),
    }
    both = recipe("3_3_continual", "Part 2", "The sketch") + recipe("3_3_continual")
    code = small(both, steps=2).replace(str(lab.base_path("nano")), "nano")
    exec(code, given)
    matrix = load_results("runs/tasks").matrix
    assert matrix.shape == (3, 2) and matrix.isfinite().all()
    assert matrix[1, 0] < matrix[0, 0]  # two steps on the Bible, and it is read a little better
    assert (tmp_path / "runs" / "tasks" / "stage-2" / "memory.safetensors").is_file()
    learnt = read_factors("adapters/all-tasks")
    assert any(tensor.any() for key, tensor in learnt.items() if key.endswith(".B"))
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

    # rank 16 holds the ranks 2 and 3 whole, so the cut loses nothing; fp32 rounds at 1e-7
    parts = [read_factors(f"adapters/{name}") for name in DOMAINS]
    for weight in (0.25, 0.5, 1.0):
        expected = concatenate(parts, [weight, weight])
        assert relative_error(given["tried"][f"both-{weight}"], expected) < 1e-5
    half = concatenate(parts, [0.5, 0.5])
    assert relative_error(read_factors("adapters/both"), half) < 1e-5
    assert relative_error(read_factors("adapters/by-peft/both"), half) < 1e-5
    # rows are what their names say
    model, text = given["model"], given["held_out"]["code"]
    for row, state in {"code": parts[1], "both-0.25": concatenate(parts, [0.25, 0.25])}.items():
        scored = lab.bits_per_byte(use_adapter(model, state), tokenizer, text)
        assert given["bits"][row]["code"] == pytest.approx(scored, abs=1e-4)
    with disabled(model):
        scored = lab.bits_per_byte(model, tokenizer, text)
    assert given["bits"]["base"]["code"] == pytest.approx(scored, abs=1e-4)
    assert len({row["code"] for row in given["bits"].values()}) == len(given["bits"]) == 6

    # chats are scored by their answers alone
    page = (ROOT / "notebooks" / "3_3_continual.md").read_text()
    (line,) = re.findall(r"`(continual\.mean_loss\(model, unseen.*?)`", page)
    unseen = {"code": [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, -100]}]}
    scored = eval(line, given | {"unseen": unseen, "t": "code"})
    with torch.no_grad():
        logits = model(torch.tensor([[3, 4, 5, 6]])).logits[0, 1].float()
    assert scored == pytest.approx(-logits.log_softmax(-1)[5].item(), abs=1e-4)

    # the line for TIES: its weights are λ, its cut is to the recipe's rank
    (line,) = re.findall(r"`(tried\[f\"ties-.*?\.state)`", page)
    exec(line, given | {"ties": ties, "weight": 0.5})
    expected = ties(parts, 16, 0.2, [0.5, 0.5]).state
    assert relative_error(given["tried"]["ties-0.5"], expected) < 1e-6


def by_peft(folder: Path, kind: str, **settings: float | bool) -> PeftModel:
    """Two adapters of rank 3 merged by PEFT under the name "both", with the weights 0.75 and 0.5."""
    model = PeftModel.from_pretrained(qwen(), folder / "law", adapter_name="law")
    model.load_adapter(folder / "code", adapter_name="code")
    model.add_weighted_adapter([*DOMAINS], [0.75, 0.5], "both", combination_type=kind, **settings)
    return model


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for seed, name in enumerate(DOMAINS):
        export_peft(randomize(inject(qwen(), config(r=3)), seed), tmp_path / name)
    return tmp_path


def off(model: PeftModel, folder: Path, r: int | None) -> float:
    """How far PEFT's merge is from the weighted sum of the updates, cut to rank r."""
    model.save_pretrained(folder / "merged", selected_adapters=["both"])
    exact = concatenate([read_factors(folder / name) for name in DOMAINS], [0.75, 0.5])
    return relative_error(
        read_factors(folder / "merged" / "both"), exact if r is None else truncate(exact, r)
    )


@pytest.mark.parametrize(
    ("kind", "settings", "r", "right"),
    [
        ("svd", {"svd_rank": 4, "svd_full_matrices": False}, 4, True),
        ("svd", {"svd_rank": 4}, 4, True),
        ("cat", {}, None, True),
        ("dare_linear_svd", {"svd_rank": 6, "density": 1.0}, None, True),  # drops nothing
        ("linear", {}, None, False),
        ("dare_linear", {"density": 1.0}, None, False),
        ("magnitude_prune", {"density": 1.0}, None, False),
    ],
)
def test_peft_merges_updates_by_svd_and_cat_and_mixes_factors_otherwise(
    two: Path, kind: str, settings: dict[str, float | bool], r: int | None, right: bool
) -> None:
    """Nothing is pruned, so each would be the weighted sum. Independent factors mixed at these weights are off by about 1."""
    found = off(by_peft(two, kind, **settings), two, r)
    assert found < 1e-5 if right else found > 0.5


@pytest.mark.parametrize("kind", ["ties", "dare_ties"])
def test_pefts_ties_of_factors_is_not_its_ties_of_updates(two: Path, kind: str) -> None:
    updates = [
        by_peft(two, f"{kind}{end}", density=1.0, **rank)
        for end, rank in (("", {}), ("_svd", {"svd_rank": 48}))
    ]
    deltas = []
    for model in updates:
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        deltas.append(layer.get_delta_weight("both").detach())
    assert (deltas[0] - deltas[1]).norm() > 0.5 * deltas[1].norm()


def test_peft_leaves_a_merge_as_it_is_under_a_name_that_is_taken(two: Path) -> None:
    model = by_peft(two, "svd", svd_rank=6)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = copy.deepcopy(layer.get_delta_weight("both"))
    model.add_weighted_adapter([*DOMAINS], [-1.0, 2.0], "both", combination_type="svd", svd_rank=6)
    assert torch.equal(layer.get_delta_weight("both"), before)


def test_peft_saves_nothing_where_another_adapter_is_called_as_a_part_of_a_layers_path(
    two: Path,
) -> None:
    """As "What goes wrong" says (issue 3584): every layer's name has `.0.` or `.1.` in it."""
    model = PeftModel.from_pretrained(qwen(), two / "law", adapter_name="0")
    model.load_adapter(two / "code", adapter_name="1")
    model.add_weighted_adapter(["0", "1"], [0.75, 0.5], "both", combination_type="cat")
    model.save_pretrained(two, selected_adapters=["both"])
    assert not load_file(two / "both" / "adapter_model.safetensors")
