"""`benchmarks`: arms that are compared do the same work on the same weights; a run goes on where it was; the page says what it holds."""

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import aims, bench, groups, measuring, report
from benchmarks.arms import make
from benchmarks.bases import NATIVE_BF16, base
from benchmarks.step import Arm
from lora_course import lora
from lora_course.injection import trainable_parameters
from tools import pages

GROUPS = groups.groups(quick=True)
ARMS = {
    (name, tuple(more.items())) for group in GROUPS.values() for name, more in group.arms.values()
}


def logits(arm: Arm) -> torch.Tensor:
    with torch.no_grad():
        return arm.model.eval()(input_ids=arm.ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "more"), sorted(ARMS), ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_arm_runs_and_a_step_moves_what_it_trains(name: str, more: tuple) -> None:
    before = {key: value.clone() for key, value in base("quick", "fp32").state_dict().items()}
    arm = make(name, "quick", **dict(more))
    trained = [p for p in arm.model.parameters() if p.requires_grad] if arm.training else []
    start = [p.detach().clone() for p in trained]
    for _ in range(2):
        arm.run()
    assert arm.training == bool(trained) or name == "frozen base"
    assert not trained or any(not torch.equal(a, b) for a, b in zip(start, trained))
    assert all(
        torch.equal(value, before[key]) for key, value in base("quick", "fp32").state_dict().items()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "4bit"])
def test_ours_and_pefts_train_as_many_numbers_on_the_same_weights(precision: str) -> None:
    ours, theirs = (make(name, "quick", precision) for name in ("LoRA", "PEFT LoRA"))
    assert trainable_parameters(ours.model) == trainable_parameters(theirs.model) > 0
    torch.testing.assert_close(
        logits(ours), logits(theirs), atol=0, rtol=0
    )  # both start as the base
    weight = base("quick", precision).model.layers[0].mlp.up_proj.weight
    assert all(any(weight is p for p in arm.model.parameters()) for arm in (ours, theirs))
    assert ours.autocast == theirs.autocast == (precision != "fp32" and NATIVE_BF16)
    assert (
        ours.ids.numel()
        == theirs.ids.numel()
        == (16 if precision == "bf16" and not NATIVE_BF16 else 32)
    )


def test_merged_arms_compute_what_the_adapter_does_without_touching_the_base() -> None:
    unmerged, merged, unloaded, base = (
        make(name, "quick") for name in ("unmerged", "merged", "merged and unloaded", "base")
    )
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(unloaded), logits(merged), atol=0, rtol=0)
    assert (logits(base) - logits(merged)).abs().max() > 1e-3
    assert not any(isinstance(module, lora.LoRALinear) for module in unloaded.model.modules())


def test_a_stopped_run_goes_on_and_another_machine_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    measured = []

    def measure(group: groups.Group) -> dict:
        measured.append(group)
        return {
            "size": group.size,
            "precision": group.precision,
            "seconds": {label: [1.0, 2.0] for label in group.arms},
        }

    monkeypatch.setattr(bench, "measure", measure)
    first = bench.run(tmp_path / "r.json", quick=True)
    next(first), next(first)
    first.close()
    assert [name for name, _ in bench.run(tmp_path / "r.json", quick=True)] == list(GROUPS)[
        2:
    ] and len(measured) == len(GROUPS)
    assert list(bench.run(tmp_path / "r.json", quick=True)) == []
    here = bench.provenance()
    monkeypatch.setattr(bench, "provenance", lambda: here | {"processor": "another"})
    assert len(list(bench.run(tmp_path / "r.json", quick=True))) == len(GROUPS)
    assert "is of another processor: everything is measured again" in capsys.readouterr().out
    with pytest.raises(ValueError, match="There is no group 'lora'; there are lora nano fp32"):
        next(bench.run(tmp_path / "r.json", quick=True, only=["lora"]))


@pytest.mark.slow
def test_a_quick_measurement_has_every_round_and_a_peak_of_each_process() -> None:
    result = measuring.measure(GROUPS["lora nano fp32"])
    assert {label: len(times) for label, times in result["seconds"].items()} == {
        "PEFT LoRA": 2,
        "LoRA": 2,
        "frozen base": 2,
    }
    assert all(peak > 1e5 for peak in result["peak_bytes"].values())


def record() -> dict:
    """Every group of a full run: arm i takes i + 1 seconds, and one round is twice as slow for all."""
    made = {}
    for name, group in groups.groups().items():
        made[name] = {
            "size": group.size,
            "precision": group.precision,
            "date": "2026-01-02",
            "seconds": {
                label: [i + 1.0, 2 * (i + 1.0), i + 1.0] for i, label in enumerate(group.arms)
            },
        }
        if group.memory:
            made[name]["peak_bytes"] = {
                label: 2_000_000 - i * 500_000 for i, label in enumerate(group.arms)
            }
    source = {
        "machine": "M",
        "processor": "P",
        "cores": 2,
        "threads": 2,
        "native_bf16": True,
        "versions": {"torch": "2"},
        "commit": "x",
    }
    return {"provenance": source, "quick": False, "groups": made}


def test_a_ratio_is_of_the_same_round_and_aims_are_met_or_not() -> None:
    group = {"seconds": {"a": [1.0, 4.0, 1.0, 3.0], "b": [2.0, 4.0, 4.0, 3.0]}}
    assert aims.ratios(group, "a", "b") == (0.75, 0.4375, 1.0)
    found = {
        text: (ratio, memory, aim) for text, (ratio, _, _), memory, aim in aims.headlines(record())
    }
    assert found["LoRA against PEFT's, nano, fp32"] == (2.0, 0.75, 1.0)
    assert found["merged and unloaded against the base, smollm2"] == (2.0, None, 1.02)
    assert (
        len(found) == len(aims.HEADLINES) + 2 * (len(groups.VARIANTS) - 2)
        and "PEFT DoRA against LoRA, nano" not in found
    )
    better = copy.deepcopy(record())
    better["groups"]["lora nano fp32"]["seconds"]["LoRA"] = [0.9, 1.8, 0.9]
    rows = {row[0]: row for row in report.table_rows(better)}
    assert rows["LoRA against PEFT's, nano, fp32"][1:] == [
        "0.90 (0.90–0.90)",
        "0.75",
        "≤\N{NO-BREAK SPACE}1, both",
        "met",
    ]
    better["groups"]["lora nano fp32"]["peak_bytes"]["LoRA"] = 2_100_000
    assert {row[0]: row for row in report.table_rows(better)}["LoRA against PEFT's, nano, fp32"][
        2:
    ] == [
        "1.05",
        "≤\N{NO-BREAK SPACE}1, both",
        "memory not met",
    ]
    assert rows["8 experts against one LoRA, smollm2"][4] == "not met"


def test_what_the_base_takes_is_taken_off_both_and_a_miss_comes_with_its_reason(
    tmp_path: Path,
) -> None:
    made = record()
    assert aims.shares(made) == []  # a base that takes longer than PEFT's step says nothing
    made["groups"]["adalora nano"]["seconds"] = {
        "PEFT AdaLoRA": [2.0, 4.0, 2.0],
        "AdaLoRA": [1.75, 3.5, 1.75],
        "frozen base": [1.0, 2.0, 1.0],
    }
    assert aims.shares(made) == [("AdaLoRA, nano", 0.5, 0.75)]
    (tmp_path / "results.json").write_text(json.dumps(made))
    page = report.page(tmp_path / "results.json")
    assert "| AdaLoRA, nano | 0.50 | 0.75 |" in page
    assert (
        "- **AdaLoRA against PEFT's, nano**: the frozen base is most of" in page
        and "**fused LoRA against LoRA, nano**: not looked into." in page
    )


def test_the_page_shows_tables_and_figures_with_alt_text(tmp_path: Path) -> None:
    assert (
        pages.fill("<!-- generated: benchmarks -->", tmp_path, [])
        == "*Not measured yet: `make bench`.*"
    )
    kept = tmp_path / "lora_course" / "data" / "benchmarks.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(record()))
    page = pages.fill("<!-- generated: benchmarks -->", tmp_path, [])
    assert "Measured 2026-01-02 on M, P, 2 cores, 2 threads; torch 2." in page
    assert "This processor emulates" not in page
    other = record()
    other["provenance"]["native_bf16"] = False
    kept.write_text(json.dumps(other))
    assert "This processor emulates bf16" in pages.fill(
        "<!-- generated: benchmarks -->", tmp_path, []
    )
    assert page.count("<img alt=") == 4 and page.count("```{raw} html") == 4
    assert "| experts smollm2 | experts | 2000.0 (2000.0–3000.0) | 2 |" in page and "128 → " in page
