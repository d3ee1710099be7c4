"""The numbers in the texts of book/_data/projects.yml, by chapter, each read from the studies' records."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import correlation, fmean, median
from typing import Any

from lora_course.lab import study
from lora_course.lab.evidence import differences, interval, verdict

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two arms of a record, seed by seed: the first less the second, in the unit of `unit`."""

    first: Sequence[float]
    second: Sequence[float]
    unit: str = "bits a byte"

    @property
    def differences(self) -> list[float]:
        return differences(self.first, self.second)

    @property
    def verdict(self) -> str:
        return verdict(self.differences)

    @property
    def half(self) -> float:
        """Half the width of the 95% interval: a smaller difference is not seen with these seeds."""
        mean, _, high = interval(self.differences)
        return high - mean

    def __str__(self) -> str:
        mean, low, high = interval(self.differences)
        return f"{mean:+.3f} {self.unit} (95% interval {low:+.3f} to {high:+.3f}, {self.verdict})"


def pair(record: Record, first: str, second: str, rank: str = "") -> Pair:
    """Bits a byte of two arms on test text. rank: of the arms that have a value for each rank."""
    values = [study.series(record, arm) for arm in (first, second)]
    return Pair(*([of_seed[rank] for of_seed in series] if rank else series for series in values))


def across(run: Record, first: str, chapter: Record, second: str, rank: str = "") -> Pair:
    """A project's arm less an arm of another record, at each one's own rate, on the project's seeds. rank: as in `pair`."""
    values = []
    for record, arm in ((run, first), (chapter, second)):
        rate = study.chosen_rate(record, arm)
        runs = [record["runs"][f"{arm}/{rate:g}/{seed}/test"] for seed in run["settings"]["seeds"]]
        found = [of_seed["bits_per_byte"] for of_seed in runs]
        values.append([of_rank[rank] for of_rank in found] if rank else found)
    return Pair(*values)


def seeds(record: Record, prefix: str, suffix: str = "/test") -> list[dict[str, Any]]:
    """The runs of an arm that has no learning rate in its keys, in the order of the seeds."""
    return [record["runs"][f"{prefix}/{seed}{suffix}"] for seed in record["settings"]["seeds"]]


# ------------------------------------------------------------ by chapter: what its project's text takes from its records


def other_zero() -> dict[str, Any]:
    record, run = (study.load_study(name) for name in ("0_1_lora", "0_1_project"))
    rates = {
        "rate": study.chosen_rate(run, "A = 0"),
        "usual_rate": study.chosen_rate(record, "lora"),
    }
    return {
        "half": f"{pair(record, 'mlp', 'lora').half:.3f}", "zero": across(run, "A = 0", record, "lora"),
        **{name: f"{rate:g}" for name, rate in rates.items()},
    }  # fmt: skip


def codebook() -> dict[str, Any]:
    runs, run = (study.load_study(name)["runs"] for name in ("1_1_formats", "1_1_project"))
    error = {kind: runs[f"{kind}/all"]["error"] for kind in ("int4", "fp4", "nf4")}
    lost = {kind: {text: fmean(differences(losses, runs["base"]["loss"][text])) for text, losses in runs[f"{kind}/all"]["loss"].items()}
            for kind in error}  # fmt: skip
    said = {f"error_{kind}": f"{100 * value:.2f}%" for kind, value in error.items()}
    said["lost_nf4"] = f"{fmean(lost['nf4'].values()):.3f}"
    ahead = [text for text in lost["fp4"] if lost["fp4"][text] < lost["int4"][text]]
    before, after = run["fit/nf4"]["others"]
    windows = [Pair(losses, runs["nf4/all"]["loss"][text][: len(losses)], "nats a token")
               for text, losses in run["fitted"]["loss"].items()]  # fmt: skip
    mean = Pair(*([fmean(values) for values in side] for side in ([w.first for w in windows], [w.second for w in windows])),
                "nats a token")  # fmt: skip
    verdicts = [of_text.verdict for of_text in windows]
    return {
        **said, "ahead": len(ahead), "texts": len(windows), "mean": mean, "windows": len(windows[0].first),
        "lower": verdicts.count("lower"), "higher": verdicts.count("higher"),
        "before": f"{100 * before:.3f}%", "after": f"{100 * after:.3f}%", "gone": f"{100 * (1 - after / before):.1f}%",
        "other_start": f"{100 * run['fit/int4']['others'][1]:.3f}%",
    }  # fmt: skip


def parameters_kept() -> dict[str, Any]:
    record, run = (study.load_study(name) for name in ("1_2_adalora", "1_2_project"))
    count = {arm: study.series(record, arm, "parameters") for arm in ("lora", "adalora")}
    half = pair(record, "adalora", "lora").half
    most, least = max(count["adalora"]), min(count["adalora"])
    kept = fmean(sum(ranks.values()) for ranks in study.series(run, "charged", "ranks"))
    return {
        "half": f"{half:.3f}", "parameters": f"{count['lora'][0]:,}", "most": f"{most:,}", "least": f"{least:,}",
        "charged": across(run, "charged", record, "adalora"), "charged_lora": across(run, "charged", record, "lora"),
        "lot": pair(run, "by lot", "charged"), "used": f"{fmean(study.series(run, 'charged', 'parameters')):,.0f}",
        "triplets": f"{kept:.0f}", "narrow": in_attention(run, "charged", run),
        "narrow_adalora": in_attention(record, "adalora", run),
    }  # fmt: skip


def in_attention(record: Record, arm: str, like: Record) -> str:
    """The share of an arm's triplets that attention's matrices, the narrow ones, keep; the mean over the seeds of `like`."""
    ranks = study.series(record, arm, "ranks")[: len(like["settings"]["seeds"])]
    shares = [sum(r for name, r in of_seed.items() if "self_attn" in name) / sum(of_seed.values())
              for of_seed in ranks]  # fmt: skip
    return f"{100 * fmean(shares):.0f}%"


def fifth_domain() -> dict[str, Any]:
    record, run = (study.load_study(name) for name in ("2_1_experts", "2_1_project"))
    runs = seeds(record, "separate")
    names = list(runs[0]["bits_per_byte"])
    milton = names.index("milton")
    others = [min(e["milton"] for i, e in enumerate(run["each"]) if i != milton) for run in runs]
    own = [run["each"][milton]["milton"] for run in runs]
    blocks = [block for run in runs for block in run["usage"]["gates"][milton]]
    said = {f"gate_{names[e]}": f"{100 * fmean(block[e] for block in blocks):.0f}%" for e in (names.index("shakespeare"), milton)}  # fmt: skip
    known, arms = (
        run["settings"]["known"],
        {arm: study.series(run, arm) for arm in run["settings"]["arms"]},
    )
    mixed = {arm: [of_seed["milton"] for of_seed in values] for arm, values in arms.items()}
    singles = [run["runs"][f"singles/{seed}"] for seed in run["settings"]["seeds"]]
    places = [
        min(range(len(known)), key=single["each on validation"].__getitem__) for single in singles
    ]
    best = [single["each on test"][place] for single, place in zip(singles, places, strict=True)]
    asked = [block for of_seed in study.series(run, "token", "gates") for block in of_seed]
    return said | {
        "others": Pair(others, own), "best": " and ".join(dict.fromkeys(known[place].capitalize() for place in places)),
        "token": Pair(mixed["token"], best), "longer": Pair(mixed["longer"], mixed["token"]),
        "sequence": Pair(mixed["sequence"], mixed["token"]), "ceiling": Pair(mixed["token"], own[: len(best)]),
        **{f"three_{name}": f"{100 * fmean(block[i] for block in asked):.0f}%" for i, name in enumerate(known)},
    }  # fmt: skip


def stages() -> dict[str, Any]:
    record, run = (study.load_study(name) for name in ("2_2_progressive", "2_2_project"))
    against = pair(record, "stack", "large")
    whole, *left_out = (study.series(run, "full rates", field)
                        for field in ("bits_per_byte", "without first", "without last"))  # fmt: skip
    first, last = (Pair(values, whole) for values in left_out)
    return {
        "stack": against, "half": f"{against.half:.3f}", "restarts": pair(record, "restarts", "small"),
        "tried": len(study.tried_rates(record, "large")), "first": first, "last": last,
        "full": across(run, "full rates", record, "stack"), "full_large": across(run, "full rates", record, "large"),
        "unequal": across(run, "unequal", record, "large"),
    }  # fmt: skip


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
        "alone": Pair(alone, taught[: len(alone)]), "merged": Pair(fresh, study.series(merged, "cut")[: len(fresh)]),
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


NUMBERS: dict[str, Callable[[], dict[str, Any]]] = {
    "0.1": other_zero, "1.1": codebook, "1.2": parameters_kept, "2.1": fifth_domain, "2.2": stages, "3.1": chance,
    "3.2": labels, "3.3": scale, "4.1": gates, "4.2": last_block, "4.3": components, "4.4": fused_more,
}  # fmt: skip
