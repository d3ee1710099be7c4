"""What the texts of the projects of chapters 4.1 to 4.4 take from the studies' records."""

import itertools
from statistics import correlation, fmean, median
from typing import Any

from lora_course.lab import study
from tools.project_numbers.pairs import Pair, across, pair


def gates() -> dict[str, Any]:
    record, run = (study.load_study(name) for name in ("4_1_sparse", "4_1_project"))
    open_gates = {
        p: fmean(of_seed[-1] for of_seed in study.series(record, f"gates/{p}", "opened"))
        for p in (1, 2, 4)
    }
    against, own, asked = (
        pair(record, "gates/2", "lora/4"),
        run["settings"],
        run["settings"]["seeds"],
    )
    penalty = next(key.split("/")[1] for key in run["runs"] if key.startswith("fast gates/"))
    rates = {"fast gates": penalty, "as found": f"{own['rate']:g}", "shuffled": f"{own['rate']:g}"}
    runs = {
        arm: [run["runs"][f"{arm}/{rate}/{seed}/test"] for seed in asked]
        for arm, rate in rates.items()
    }
    bits = {arm: [of_seed["bits_per_byte"] for of_seed in of_arm] for arm, of_arm in runs.items()}
    lora = study.series(record, "lora/4")[: len(asked)]
    left = [list(of_seed["ranks"].values()) for of_seed in runs["fast gates"]]
    alike = [correlation(*two) for two in itertools.combinations(left, 2)]
    most = {
        arm: f"{max(of_seed['parameters'] for of_seed in of_arm):,}" for arm, of_arm in runs.items()
    }
    slow = [(float(key.split("/")[-1]), sum(of_key["ranks"].values())) for key, of_key in run["runs"].items()
            if key.startswith("penalty/gates/")]  # fmt: skip
    (low, many), (high, few) = min(slow), max(slow)
    return {
        "gates": against, "half": f"{against.half:.3f}", "all": own["r"] * len(left[0]),
        **{f"open_{p}": f"{value:.0f}" for p, value in open_gates.items()},
        "penalty": penalty, "left": " and ".join(str(n) for n in (min(map(sum, left)), max(map(sum, left)))),
        "low": f"{low:g}", "many": many, "high": f"{high:g}", "few": few,
        "alike": f"{min(alike):.2f} to {max(alike):.2f}",
        "fast": Pair(bits["fast gates"], lora), "found": Pair(bits["as found"], lora),
        "dealt": Pair(bits["shuffled"], lora), "places": Pair(bits["as found"], bits["shuffled"]),
        "anew": Pair(bits["fast gates"], bits["as found"]),
        "lora_size": f"{study.series(record, 'lora/4', 'parameters')[0]:,}", "found_size": most["as found"],
        "dealt_size": most["shuffled"],
    }  # fmt: skip


def last_block() -> dict[str, Any]:
    record, run = (study.load_study(name) for name in ("4_2_hierarchical", "4_2_project"))
    own = {b: pair(record, "truncation/cut", f"lora-{b}/whole", b) for b in ("1", "8")}
    last, scaled = "last block", "last block, α/b"
    return {
        "own_1": own["1"], "own_8": own["8"], "half": f"{own['1'].half:.3f}",
        "last_1": across(run, last, record, "truncation/cut", "1"), "last_8": across(run, last, record, "truncation/cut", "8"),
        "scaled_8": across(run, scaled, record, "truncation/cut", "8"), "scales_8": pair(run, scaled, last, "8"),
        "rate": f"{study.chosen_rate(run, last):g}", "rate_scaled": f"{study.chosen_rate(run, scaled):g}",
    }  # fmt: skip


def components() -> dict[str, Any]:
    record, run = (study.load_study(name) for name in ("4_3_quantized", "4_3_project"))
    by = {bits: pair(record, f"after {bits} group", "lora") for bits in (2, 3, 4)}
    size = {bits: fmean(study.series(record, f"after {bits} group", "bytes")) for bits in by}
    arms = {
        "3": "3 bits",
        "3_rotated": "3 bits, rotated",
        "mixed": "h = 4",
        "mixed_rotated": "h = 4, rotated",
    }
    error = {name: fmean(study.series(run, arm, "error")) for name, arm in arms.items()}
    two_files, one_file, payload = (study.series(run, arm, field)[0] for arm, field in (
        (arms["mixed_rotated"], "bytes"), (arms["3"], "bytes"), (arms["3"], "payload")))  # fmt: skip
    return {
        **{f"bytes_{bits}": f"{value / 1000:.1f} kB" for bits, value in size.items()},
        **{f"error_{name}": f"{100 * value:.0f}%" for name, value in error.items()},
        "bits_2": by[2], "bits_3": by[3], "middle": f"{(size[2] + size[4]) / 2000:.1f} kB",
        "mixed": pair(run, arms["mixed_rotated"], arms["3_rotated"]), "plain": pair(run, arms["mixed_rotated"], arms["3"]),
        "rotating": pair(run, arms["3_rotated"], arms["3"]), "payload": f"{payload / 1000:.1f} kB",
        "two_files": f"{two_files / 1000:.1f} kB", "one_file": f"{one_file / 1000:.1f} kB",
    }  # fmt: skip


def fused_more() -> dict[str, Any]:
    record, run = (study.load_study(name)["runs"] for name in ("4_4_fused", "4_4_project"))
    plain, fused = (record[f"memory/fp32/16/{kind}"]["saved"] / 1e6 for kind in ("plain", "fused"))
    kept = {
        kind: run[f"memory/0/16/{kind}"] for kind in ("plain", "fused", "whole MLP", "checkpointed")
    }
    steps = run["step"]
    ratio = {kind: median(a / b for a, b in zip(steps[kind], steps["fused"], strict=True))
             for kind in ("whole MLP", "checkpointed")}  # fmt: skip
    less = {(p, r): run[f"memory/{p}/{r}/fused"]["saved"] - run[f"memory/{p}/{r}/whole MLP"]["saved"]
            for p in ("0", "0.1") for r in (16, 64)}  # fmt: skip
    return {
        "fp32_plain": f"{plain:.1f} MB", "fp32_fused": f"{fused:.1f} MB", "saved": f"{100 * (1 - fused / plain):.1f}%",
        **{f"kept_{name}": f"{kept[kind]['saved'] / 1e6:.1f} MB"
           for name, kind in (("plain", "plain"), ("fused", "fused"), ("whole", "whole MLP"))},
        "counted": f"{kept['fused']['counted']:,}", "apart": max(abs(n - kept["fused"]["counted"]) for n in less.values()),
        "peak_whole": f"{kept['whole MLP']['peak'] / 1e6:.1f} MB", "peak_again": f"{kept['checkpointed']['peak'] / 1e6:.1f} MB",
        "time_whole": f"{ratio['whole MLP']:.2f}", "time_again": f"{ratio['checkpointed']:.2f}",
    }  # fmt: skip
