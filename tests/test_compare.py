"""`lora_course.compare`: one rule for all methods, runs that are kept by what made them, and honest arithmetic on them."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from scipy import stats

from lora_course import compare
from lora_course.compare import METHODS, SETTINGS, interval, paired, pareto, series, verdict
from lora_course.injection import adapter_layers, trainable_parameters
from lora_course.lab import study

SMALL = {
    "steps": 20,
    "batch": 2,
    "length": 32,
    "train_bytes": 60_000,
    "score_bytes": {"validation": 500, "test": 500, "own_domain": 500},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    for name, value in SMALL.items():
        monkeypatch.setitem(SETTINGS, name, value)
    compare.rows_of.cache_clear()
    yield
    compare.rows_of.cache_clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Nothing is trained: quality is a parabola in the exponent of the rate, best where the test says, and calls are counted."""
    calls, best = [], {"lora": 8e-3, "dora": 6.4e-2}

    def train(method: str, domain: str, rate: float, seed: int) -> dict:
        calls.append((method, domain, rate, seed))
        return {"method": method, "rate": rate, "seed": seed}

    def score(trained: dict, domain: str, split: str) -> dict:
        quality = (
            2
            + 0.01 * math.log2(trained["rate"] / best[trained["method"]]) ** 2
            + 0.001 * trained["seed"]
        )
        return {
            "bits_per_byte": quality,
            "own_domain": 1.5,
            "parameters": 10,
            "file_bytes": 1,
            "model_bytes": 1,
            "step_bytes": 1,
            "seconds": 1.0,
        }

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "score", score)
    monkeypatch.setattr(compare, "base_model", lambda: None)
    monkeypatch.setattr(
        compare, "bits_per_byte", lambda model, domain, split: 1.3 if domain == "glosses" else 3.0
    )
    # the hash of the sources that are here, faked functions left out
    monkeypatch.setattr(compare, "source_hash", lambda method, domain: f"{method}-1")
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_each_method_ends_with_about_as_many_parameters_as_lora_and_at_its_scale(
    small, method: str
) -> None:
    trained = compare.train(method, "python", 4e-3, 0)
    found = compare.score(trained, "python", "test")
    plain = compare.make_lora(0)
    # a tenth, since what moves ranks between layers has a budget of ranks, and they cost less in small layers; gates have none
    assert abs(found["parameters"] / trainable_parameters(plain.model) - 1) < (
        0.5 if method == "gates" else 0.1
    )
    assert len(trained["losses"]) == SMALL["steps"] and all(
        math.isfinite(loss) for loss in trained["losses"]
    )
    assert 1 < found["bits_per_byte"] < 5 and found["file_bytes"] > 0 and found["step_bytes"] > 1e6
    assert found["bits_per_byte"] != compare.bits_per_byte(compare.base_model(), "python", "test")
    if not METHODS[method].title.endswith("(PEFT)"):
        assert {round(layer.scaling, 6) for layer in adapter_layers(trained["model"]).values()} == {
            SETTINGS["scaling"]
        }


def test_pefts_layers_in_transformers_trainer_go_the_way_of_ours(
    small, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same function, start, rows, order and schedule: what differs between two methods is the method. fp32, since bf16
    # rounds at other places in the two implementations.
    monkeypatch.setattr("lora_course.training.compute_dtype", lambda device=None: torch.float32)
    alpha = SETTINGS["scaling"] * math.sqrt(SETTINGS["r"])
    losses = {}
    for name, make in {
        "ours": compare.make_lora,
        "peft": compare.make_peft,
        "rslora": lambda s: compare.make_peft(s, use_rslora=True, lora_alpha=alpha),
    }.items():
        monkeypatch.setitem(METHODS, name, compare.Method(name, make, (), "", ""))
        losses[name] = compare.train(name, "python", 8e-3, 3)["losses"]
    assert losses["ours"] == pytest.approx(losses["peft"], abs=2e-3) and losses[
        "ours"
    ] == pytest.approx(losses["rslora"], abs=2e-3)
    last = compare.rows_of("python", 3)[-SMALL["batch"] :]["input_ids"]
    with torch.no_grad():
        untrained = compare.base_model()(input_ids=last, labels=last).loss.item()
    assert abs(losses["ours"][-1] - untrained) > 0.1  # and it has gone somewhere


def test_the_search_goes_on_while_the_best_lies_at_the_edge_and_only_the_chosen_is_tested(
    quick, tmp_path: Path
) -> None:
    record = compare.compare(["lora", "dora"], ["python"], tmp_path / "r.json", lambda line: None)
    assert compare.tried_rates(record, "lora", "python") == [4e-3, 8e-3, 1.6e-2]
    assert compare.tried_rates(record, "dora", "python") == [
        4e-3,
        8e-3,
        1.6e-2,
        3.2e-2,
        6.4e-2,
        0.128,
    ]
    assert compare.chosen_rate(record, "dora", "python") == 6.4e-2
    assert sum(key.endswith("/test") for key in record["runs"]) == 2 * len(SETTINGS["seeds"])
    twice = [
        key for key in record["runs"] if key.endswith("/twice")
    ]  # of LoRA alone, at twice its rate, with every seed
    assert twice == [f"lora/python/0.016/{seed}/twice" for seed in SETTINGS["seeds"]]
    assert (
        len(quick) == len(set(quick)) == (3 + 6) * 1 + 2 * 4 + 4
    )  # what was searched is not trained again to be tested
    assert record["base"] == {"python": 3.0, "glosses": 1.3}
    assert (
        compare.methods_in(record, "python") == ["lora", "dora"]
        and compare.methods_in(record, "bible") == []
    )


def test_a_best_rate_at_the_end_of_the_grid_is_refused(
    quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "learning_rates", [4e-3, 8e-3, 1.6e-2, 3.2e-2])
    with pytest.raises(
        ValueError, match="dora on python: the best rate, 0.032, is the last of the grid"
    ):
        compare.compare(["dora"], ["python"], tmp_path / "r.json", lambda line: None)


def test_what_was_stopped_goes_on_and_nothing_is_computed_twice(quick, tmp_path: Path) -> None:
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.compare(["lora"], ["python"], tmp_path / "r.json", stop)
    assert len(quick) == 2 and "lora/python/0.008/0/validation" in lines[1]
    whole = compare.compare(["lora"], ["python"], tmp_path / "r.json", lambda line: None)
    assert (
        len(quick) == 2 + 1 + 5 + 4
    )  # the one that was left of the search; for the test, the chosen rate's model is gone
    count = len(quick)
    assert (
        compare.compare(["lora"], ["python"], tmp_path / "r.json", lambda line: None) == whole
        and len(quick) == count
    )
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_changed_method_loses_its_own_runs_and_no_others(
    quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = compare.compare(
        ["lora", "dora"], ["python", "bible"], tmp_path / "r.json", lambda line: None
    )
    assert compare.stale(before) == {}
    quick.clear()
    monkeypatch.setattr(
        compare, "source_hash", lambda method, domain: f"{method}-{2 if method == 'dora' else 1}"
    )
    assert compare.stale(before) == {"dora": ["python", "bible"]}
    after = compare.compare(["lora", "dora"], ["python"], tmp_path / "r.json", lambda line: None)
    assert {call[:2] for call in quick} == {("dora", "python")}
    assert {
        run["source"] for key, run in after["runs"].items() if key.startswith("dora/python/")
    } == {"dora-2"}
    assert compare.stale(after) == {"dora": ["bible"]}


def test_the_hash_is_of_the_methods_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lora_course"
    package.mkdir()
    for path in compare.PACKAGE.glob("*.py"):
        shutil.copy(path, package)
    for name in ("lab", "data"):
        (package / name).symlink_to(compare.PACKAGE / name)
    names = ["lora", "rslora", "adalora", "adaptive"]

    def hashes() -> list[str]:
        return [compare.source_hash(name, "python") for name in names]

    original = hashes()
    monkeypatch.setattr(compare, "PACKAGE", package)
    assert hashes() == original and len(set(original)) == 4
    adalora = package / "adalora.py"
    adalora.write_text(adalora.read_text().replace('"""AdaLoRA:', '"""A comment. AdaLoRA:'))
    assert hashes() == original
    adalora.write_text(adalora.read_text().replace("std=0.02", "std=0.03"))
    assert [a == b for a, b in zip(hashes(), original)] == [True, True, False, True]
    (package / "lora.py").write_text((package / "lora.py").read_text() + "\nMORE = 1\n")
    assert [a == b for a, b in zip(hashes(), original)] == [False] * 4
    assert compare.source_hash("lora", "python") != compare.source_hash("lora", "bible")


@pytest.mark.parametrize(("arguments", "message"), [
    ((["lora", "loar"], ["python"]), "method 'loar' is unknown; there are lora, rslora"),
    ((["lora"], ["glosses"]), "domain 'glosses' is unknown; there are bible, shakespeare"),
    (([], ["python"]), "No method is given"),
])  # fmt: skip
def test_what_is_unknown_is_refused_before_anything_runs(
    quick, tmp_path: Path, arguments: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare.compare(*arguments, tmp_path / "r.json")
    assert quick == [] and not list(tmp_path.iterdir())


def test_a_file_of_something_else_is_left_alone(
    quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("[1]", "no json"):
        (tmp_path / "other").write_text(text)
        with pytest.raises(ValueError, match="holds no comparison"):
            compare.compare(["lora"], ["python"], tmp_path / "other")
        assert (tmp_path / "other").read_text() == text
    compare.compare(["lora"], ["python"], tmp_path / "r.json", lambda line: None)
    monkeypatch.setitem(SETTINGS, "steps", 41)
    with pytest.raises(ValueError, match="other settings"):
        compare.compare(["lora"], ["python"], tmp_path / "r.json")


def record_of(values: dict[str, list[float]]) -> dict:
    seeds = list(range(5))
    runs = {
        f"{method}/python/{rate:g}/{seed}/{split}": {"bits_per_byte": value + (split == "validation"), "own_domain": 2 * value, "source": "x"}
        for method, series_ in values.items() for seed, value in enumerate(series_) for rate, split in ((0.004, "validation"), (0.008, "validation"), (0.008, "test"))
    }  # fmt: skip
    return {
        "settings": {"seeds": seeds, "own_domain": "glosses"},
        "base": {"glosses": 1.5},
        "runs": runs,
        "methods": {},
    }


def test_values_are_paired_by_seed_and_forgetting_is_what_the_base_lost() -> None:
    record = record_of({"lora": [2.0, 2.1, 2.2, 2.3, 2.4], "dora": [2.01, 2.12, 2.19, 2.33, 2.41]})
    assert series(record, "dora", "python") == [2.01, 2.12, 2.19, 2.33, 2.41]
    assert series(record, "lora", "python", "forgetting") == pytest.approx(
        [2.5, 2.7, 2.9, 3.1, 3.3]
    )
    assert paired(record, "dora", "python") == pytest.approx([0.01, 0.02, -0.01, 0.03, 0.01])
    assert paired(record, "dora", "python", "forgetting") == pytest.approx(
        [0.02, 0.04, -0.02, 0.06, 0.02]
    )
    with pytest.raises(KeyError, match="qlora on python: not in the record"):
        series(record, "qlora", "python")


@pytest.mark.parametrize(
    "values", [[0.01, 0.02, -0.01, 0.03, 0.01], [0.02, 0.021, 0.019, 0.02, 0.02], [-1.0, -2.0]]
)
def test_an_interval_is_students(values: list[float]) -> None:
    n = len(values)
    low, high = stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=stats.sem(values))
    assert interval(values) == pytest.approx(
        (sum(values) / n, low, high), rel=2e-4, abs=1e-5
    )  # t has three decimals
    assert verdict(values) == ("higher" if low > 0 else "lower" if high < 0 else "within noise")
    with pytest.raises(ValueError, match="1 values"):
        interval([1.0])


def test_verdicts_need_the_whole_interval_on_one_side() -> None:
    assert (
        verdict([0.02, 0.021, 0.019, 0.02, 0.02]) == "higher"
        and verdict([-0.02, -0.021, -0.019, -0.02, -0.02]) == "lower"
    )
    assert verdict([0.02, -0.021, 0.019, 0.02, 0.02]) == "within noise"


def test_the_front_holds_what_nothing_beats() -> None:
    points = {
        "a": (1.0, 5.0),
        "b": (2.0, 3.0),
        "c": (2.0, 4.0),
        "d": (3.0, 3.0),
        "e": (4.0, 1.0),
        "f": (4.5, 1.5),
        "twin": (2.0, 3.0),
    }
    assert pareto(points) == ["a", "b", "twin", "e"]


def test_the_table_says_what_the_record_holds(quick, tmp_path: Path) -> None:
    record = compare.compare(["lora", "dora"], ["python"], tmp_path / "r.json", lambda line: None)
    table = compare.table(record, "python")
    assert list(table.index) == ["LoRA", "DoRA (PEFT)"] and table.loc["LoRA", "minus LoRA's"] == ""
    assert (
        table.loc["DoRA (PEFT)", "forgetting"].startswith("0.200 ±")
        and table.loc["DoRA (PEFT)", "learning rate"] == "0.064"
    )
    assert list(compare.table(record, "python", ["dora"]).index) == ["DoRA (PEFT)"]
    alone = copy.deepcopy(record)
    alone["runs"] = {key: run for key, run in record["runs"].items() if not key.startswith("lora/")}
    assert compare.table(alone, "python").loc["DoRA (PEFT)", "minus LoRA's"] == ""


def test_two_commands_can_share_a_record(quick, tmp_path: Path) -> None:
    def other(line: str) -> None:
        if "lora/python/0.004/0/validation" in line:
            compare.compare(["dora"], ["python"], tmp_path / "r.json", lambda line: None)

    compare.compare(["lora"], ["python"], tmp_path / "r.json", other)
    assert compare.methods_in(json.loads((tmp_path / "r.json").read_text()), "python") == [
        "lora",
        "dora",
    ]


def test_the_committed_record_is_whole_and_made_by_the_code_that_is_here() -> None:
    record = compare.load()
    assert compare.RECORD.parent == study.STUDIES
    for domain in compare.DOMAINS:
        assert compare.methods_in(record, domain) == list(METHODS)
        for method in METHODS:
            tried = compare.tried_rates(record, method, domain)
            assert min(tried) < compare.chosen_rate(record, method, domain) < max(tried)
    assert compare.stale(record) == {}
