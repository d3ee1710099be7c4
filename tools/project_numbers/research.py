"""What the texts of the projects of chapters 3.1 to 3.3 take from the studies' records."""

from statistics import fmean
from typing import Any

from lora_course.lab import study
from tools.project_numbers.pairs import Pair, pair, seeds


def chance() -> dict[str, Any]:
    record, controls, run = (study.load_study(name) for name in ("3_1_adaptive", "3_1_controls", "3_1_project"))  # fmt: skip
    grown = study.series(record, "grown")
    spread = {arm: fmean(max(ranks.values()) for ranks in study.series(source, name, "ranks"))
              for arm, (source, name) in {"grown": (record, "grown"), "random": (controls, "random"), "anew": (run, "score")}.items()}  # fmt: skip
    return {
        "random": Pair(study.series(controls, "random"), grown), "anew": pair(run, "chance", "score"),
        "capped": pair(run, "score, max 10", "score"), "level": pair(run, "chance", "score, max 10"),
        "capped_chance": pair(run, "chance, max 10", "chance"),
        **{f"size_{name}": f"{max(study.series(run, arm, 'parameters')):,}"
           for name, arm in (("capped", "score, max 10"), ("anew", "score"))},
        **{f"largest_{arm}": f"{value:.1f}" for arm, value in spread.items()},
    }  # fmt: skip


def labels() -> dict[str, Any]:
    record, own = study.load_study("3_2_distillation"), study.load_study("3_2_project")
    half_taught, merged = pair(record, "by domain", "data alone"), study.load_study("3_2_merge")
    data, taught = (study.series(record, arm) for arm in ("data alone", "by domain"))
    fresh, alone = (study.series(own, arm) for arm in ("fresh", "alpha 1"))
    check = own["runs"]["alpha 0/0.016/0/test"]["bits_per_byte"] - data[0]
    return {
        "taught": half_taught, "half": f"{half_taught.half:.3f}", "data": f"{fmean(data):.3f}",
        "new": pair(own, "fresh", "fresh labels"), "text": Pair(fresh, alone),
        "alone": Pair(alone, taught[: len(alone)]),
        **{name: Pair(study.series(own, arm), taught[: len(alone)])
           for name, arm in (("quarter", "alpha 0.25"), ("three_quarters", "alpha 0.75"))},
        "merged": Pair(fresh, study.series(merged, "cut")[: len(fresh)]),
        "check": f"{abs(check):.4f}",
    }  # fmt: skip


def scale() -> dict[str, Any]:
    record, run = (study.load_study(name) for name in ("3_3_continual", "3_3_project"))
    runs = seeds(record, "isolated/order 0", "")
    by = {name: [run["merges"][f"{name}/4"]["ACC"] for run in runs]
          for name in ("TIES", "mean, cut to r", "sum, cut to r")}  # fmt: skip
    scales = {arm: f"{study.chosen_rate(run, arm):g}" for arm in ("mean", "TIES 0.2", "TIES 1")}
    return {
        "ties": Pair(by["TIES"], by["mean, cut to r"]), "summed": Pair(by["sum, cut to r"], by["mean, cut to r"]),
        "tuned": pair(run, "TIES 0.2", "mean"), "untrimmed": pair(run, "TIES 1", "mean"),
        "scale_mean": scales["mean"], "scale_ties": scales["TIES 0.2"], "scale_untrimmed": scales["TIES 1"],
    }  # fmt: skip
