"""What the open projects' texts take from the studies' records: by chapter, the numbers that their {names} stand for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
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


def across(
    run: Record, first: str, chapter: Record, second: str, field: str = "bits_per_byte"
) -> Pair:
    """A project's arm less an arm of another record, at each one's own rate, on the project's seeds."""
    by_arm = ((run, first), (chapter, second))
    rates = [study.chosen_rate(record, arm) for record, arm in by_arm]
    return Pair(*([record["runs"][f"{arm}/{rate:g}/{seed}/test"][field] for seed in run["settings"]["seeds"]]
                  for (record, arm), rate in zip(by_arm, rates, strict=True)))  # fmt: skip


def seeds(record: Record, prefix: str, suffix: str = "/test") -> list[dict[str, Any]]:
    """The runs of an arm that has no learning rate in its keys, in the order of the seeds."""
    return [record["runs"][f"{prefix}/{seed}{suffix}"] for seed in record["settings"]["seeds"]]


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
    runs = seeds(study.load_study("2_1_experts"), "separate")
    names = list(runs[0]["bits_per_byte"])
    milton = names.index("milton")
    others = [min(e["milton"] for i, e in enumerate(run["each"]) if i != milton) for run in runs]
    own = [run["each"][milton]["milton"] for run in runs]
    mixed = [run["bits_per_byte"]["milton"] for run in runs]
    blocks = [block for run in runs for block in run["usage"]["gates"][milton]]
    gates = [fmean(of_expert) for of_expert in zip(*blocks, strict=True)]
    said = {f"gate_{name}": f"{100 * gate:.0f}%" for name, gate in zip(names, gates, strict=True)}
    return said | {"mixed": Pair(mixed, own), "others": Pair(others, own)}


def stages() -> dict[str, Any]:
    record = study.load_study("2_2_progressive")
    against = pair(record, "stack", "large")
    return {"stack": against, "half": f"{against.half:.3f}", "restarts": pair(record, "restarts", "small"),
            "tried": len(study.tried_rates(record, "large"))}  # fmt: skip


def chance() -> dict[str, Any]:
    record, controls = (study.load_study(name) for name in ("3_1_adaptive", "3_1_controls"))
    arms = {arm: study.series(controls, arm) for arm in ("random", "small")}
    grown, uniform = (study.series(record, arm) for arm in ("grown", "uniform"))
    spread = {arm: fmean(max(ranks.values()) for ranks in study.series(source, arm, "ranks"))
              for arm, source in (("grown", record), ("random", controls))}  # fmt: skip
    random = Pair(arms["random"], grown)
    return {
        "random": random, "small": Pair(grown, arms["small"]), "uniform": Pair(arms["random"], uniform),
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
    runs = seeds(study.load_study("3_3_continual"), "isolated/order 0", "")
    by = {name: [run["merges"][f"{name}/4"]["ACC"] for run in runs]
          for name in ("mean", "sum", "TIES", "mean, cut to r", "sum, cut to r")}  # fmt: skip
    return {
        "ties": Pair(by["TIES"], by["mean, cut to r"]), "whole": Pair(by["TIES"], by["mean"]),
        "summed": Pair(by["sum, cut to r"], by["mean, cut to r"]),
    }  # fmt: skip


def gates() -> dict[str, Any]:
    record = study.load_study("4_1_sparse")
    open_gates = {
        p: fmean(run[-1] for run in study.series(record, f"gates/{p}", "opened")) for p in (1, 2, 4)
    }
    ranks = study.series(record, "gates/2", "ranks")[0]
    against = pair(record, "gates/2", "lora/4")
    return {
        "gates": against, "half": f"{against.half:.3f}", "all": 8 * len(ranks),
        **{f"open_{p}": f"{value:.0f}" for p, value in open_gates.items()},
    }  # fmt: skip


def last_block() -> dict[str, Any]:
    record = study.load_study("4_2_hierarchical")
    own = {b: pair(record, "truncation/cut", f"lora-{b}/whole", b) for b in ("1", "8")}
    small = pair(record, "truncation/cut", "matryoshka/cut", "1")
    return {
        "own_1": own["1"],
        "own_8": own["8"],
        "half": f"{own['1'].half:.3f}",
        "matryoshka": small,
    }


def components() -> dict[str, Any]:
    record = study.load_study("4_3_quantized")
    by = {bits: pair(record, f"after {bits} group", "lora") for bits in (2, 3, 4)}
    size = {bits: fmean(study.series(record, f"after {bits} group", "bytes")) for bits in by}
    said = {f"bits_{bits}": value for bits, value in by.items()}
    return said | {f"bytes_{bits}": f"{value / 1000:.1f} kB" for bits, value in size.items()} | {"middle": f"{(size[2] + size[4]) / 2000:.1f} kB"}  # fmt: skip


def fused_more() -> dict[str, Any]:
    runs = study.load_study("4_4_fused")["runs"]
    kept = {(how, kind): runs[f"memory/{how}/16/{kind}"]["saved"] / 1e6
            for how in ("fp32", "dropout") for kind in ("plain", "fused")}  # fmt: skip
    return {f"{how}_{kind}": f"{value:.1f} MB" for (how, kind), value in kept.items()} | {
        "saved": f"{100 * (1 - kept['fp32', 'fused'] / kept['fp32', 'plain']):.1f}%"
    }


NUMBERS: dict[str, Callable[[], dict[str, Any]]] = {
    "0.1": other_zero, "1.1": codebook, "1.2": parameters_kept, "2.1": fifth_domain, "2.2": stages, "3.1": chance,
    "3.2": labels, "3.3": scale, "4.1": gates, "4.2": last_block, "4.3": components, "4.4": fused_more,
}  # fmt: skip
