"""The studies of chapter 5.1 beside the comparison: neighbours, LoRA turned down, other ranks and batches, longer trainings."""

import math
from pathlib import Path
from typing import Any

import pytest

from lora_course.experiments import comparison, longer, neighbours
from lora_course.experiments.neighbours import NEIGHBOURS, SETTINGS, best_neighbour
from lora_course.lab import study


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Nothing is trained: quality is a parabola in the exponent of the rate, OFT's the lowest, and calls are kept."""
    calls: list[tuple[Any, ...]] = []

    def train(settings: Any, method: Any, domain: str, rate: float, seed: int) -> tuple[Any, ...]:
        calls.append((settings["r"], settings["batch"], settings["steps"], method.title, domain, rate, seed))  # fmt: skip
        return method.title, rate, seed

    def score(domain: str, trained: tuple[Any, ...], split: str) -> dict[str, Any]:
        title, rate, seed = trained
        lost = 0.01 * math.log2(rate / 8e-3) ** 2
        return {"bits_per_byte": 2 + lost + 0.001 * seed - 0.1 * (title == "OFT"), "own_domain": 1}

    monkeypatch.setattr(comparison, "train_measured", train)
    monkeypatch.setattr(comparison, "score", score)
    monkeypatch.setattr(neighbours, "turned_down", lambda domain, seed: {"strengths": {}})
    return calls


def test_ranks_and_batches_come_last_for_lora_dora_and_the_best_neighbour(
    quick: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    arms = [name for name in NEIGHBOURS if name != "beft"]
    record = neighbours.STUDY.run(path, arms=[*arms, "elsewhere"], progress=str)
    assert best_neighbour(record) is None and not any("=" in key for key in record["runs"])
    count = len(quick)
    record = neighbours.STUDY.run(path, progress=str)
    assert best_neighbour(record) == "oft"
    tested = [key for key in record["runs"] if "=" in key and key.endswith("/test")]
    where = [f"{name}={value}" for name, value in (("r", 4), ("r", 16), ("batch", 2), ("batch", 8))]
    assert [key.split("/", 1)[0] for key in tested] == [
        f"{name} {other}" for name in ("lora", "dora", "oft") for other in where for _ in SETTINGS["seeds"]
    ]  # fmt: skip
    assert {call[:2] for call in quick[count:] if call[3] == "DoRA (PEFT)"} == {(4, 4), (16, 4), (8, 2), (8, 8)}  # fmt: skip
    elsewhere = {call[4:5] + call[6:] for call in quick[count:] if call[3] != "BEFT"}
    assert elsewhere == {("python", seed) for seed in SETTINGS["seeds"]}
    assert sum(key.startswith("turned down/") for key in record["runs"]) == 2 * 6
    more = neighbours.STUDY.run(path, seeds=[9], progress=str)["runs"]
    added = {key.split("/", 1)[0] for key in more if "/9" in key}
    assert {"lora r=4", "oft batch=8", "turned down", "pissa"} <= added


def test_a_longer_training_has_its_own_steps_search_and_seeds(
    quick: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    record = longer.STUDY.run(tmp_path / "r.json", progress=str)
    assert {call[2] for call in quick} == {100, 320}
    assert study.tried_rates(record, "adalora/320")[-1] == 6.4e-2
    for name in longer.METHODS:
        tested = [key for key in record["runs"] if key.startswith(f"{name}/") and key.endswith("/test")]  # fmt: skip
        assert [key.split("/")[1:4:2] for key in tested] == [["100", str(s)] for s in (0, 1, 2)] + [["320", "0"]]  # fmt: skip


def test_at_strength_one_it_is_lora_and_at_zero_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in (comparison.SETTINGS, SETTINGS):
        monkeypatch.setitem(settings, "steps", 4)
        monkeypatch.setitem(settings, "length", 32)
        monkeypatch.setitem(settings, "train_bytes", 60_000)
    monkeypatch.setitem(comparison.SETTINGS, "score_bytes", dict.fromkeys(("test", "own_domain"), 500))  # fmt: skip
    monkeypatch.setitem(SETTINGS, "strengths", [1.0, 0.5, 0.0])
    found = neighbours.turned_down("python", 2)["strengths"]
    trained = comparison.train("lora", "python", 8e-3, 2)[0].model
    base = comparison.base_of(SETTINGS)
    for strength, model in (("1", trained), ("0", base)):
        for field, domain in (("bits_per_byte", "python"), ("own_domain", "glosses")):
            bits = comparison.bits_per_byte(model, domain, "test")
            assert found[strength][field] == pytest.approx(bits, abs=1e-5)
    assert len({run["bits_per_byte"] for run in found.values()}) == 3


def made(values: dict[str, Any]) -> dict[str, Any]:
    """A record of PiSSA, whose seed s has 2 + s / 10 bits a byte, and of a LoRA whose curve is a parabola."""
    runs: dict[str, Any] = {}
    for domain in comparison.DOMAINS:
        for seed in SETTINGS["seeds"]:
            runs[f"pissa/{domain}/0.004/{seed}/test"] = {"bits_per_byte": 2 + seed / 10, "own_domain": 1.5}  # fmt: skip
            strengths = {
                f"{s:g}": {"bits_per_byte": 2.0 + (1 - s) ** 2, "own_domain": 1.4 + s**2}
                for s in SETTINGS["strengths"]
            }
            runs[f"turned down/{domain}/{seed}"] = {"strengths": strengths}
    return {"study": "s", "settings": SETTINGS, "runs": runs | values}


def test_a_neighbour_is_paired_with_the_comparisons_lora_by_seed_over_both_texts() -> None:
    record, lora = made({}), study.load_study("5_1_comparison")
    record["runs"]["pissa/python/0.004/9/test"] = {}  # of another seed than the record speaks of
    assert neighbours.measured(record) == ["pissa"]
    record["runs"].pop("pissa/python/0.004/4/test")
    assert neighbours.measured(record) == []
    found = neighbours.less_loras(made({}), "pissa")
    there = [comparison.series(lora, "lora", domain) for domain in comparison.DOMAINS]
    for seed, gap in enumerate(found):
        assert gap == pytest.approx(2 + seed / 10 - (there[0][seed] + there[1][seed]) / 2)


def test_a_method_is_held_against_the_strength_that_forgets_as_much() -> None:
    record, lora = made({}), study.load_study("5_1_comparison")
    assert [point[0] for point in neighbours.curve(record, "python", 0)] == sorted(SETTINGS["strengths"])  # fmt: skip
    with pytest.raises(ValueError, match=r"adalora on \w+ forgets 1\.\d+, and no strength"):
        neighbours.ahead_of_curve(record, "adalora")
    # a line through what AdaLoRA forgets: at equal forgetting the curve has as many bits as it has, less 0.25
    for domain in comparison.DOMAINS:
        kept, bits = (comparison.series(lora, "adalora", domain, q) for q in ("own_domain", "bits_per_byte"))  # fmt: skip
        for seed in SETTINGS["seeds"]:
            record["runs"][f"turned down/{domain}/{seed}"]["strengths"] = {
                f"{s:g}": {"own_domain": kept[seed] + x, "bits_per_byte": bits[seed] - 0.25 + x}
                for s, x in ((0.5, -0.1), (0.7, -0.05), (1.0, 0.1))
            }
    assert neighbours.ahead_of_curve(record, "adalora") == pytest.approx([0.25] * 5)


RECORDS = [path.stem for path in sorted(study.STUDIES.glob("5_1_*.json")) if path.stem not in ("5_1_comparison", "5_1_costs")]  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_no_chosen_rate_of_the_committed_record_lies_at_an_edge(name: str) -> None:
    record = study.load_study(name)
    arms = {key.rsplit("/", 3)[0] for key in record["runs"] if key.endswith("/test")}
    assert arms
    for arm in arms:
        tried = study.tried_rates(record, arm)
        assert min(tried) < study.chosen_rate(record, arm) < max(tried)
