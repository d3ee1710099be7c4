"""What the texts of the projects of chapters 0.1 to 1.2 take from the studies' records."""

from statistics import fmean
from typing import Any

from lora_course.lab import study
from lora_course.lab.evidence import differences
from tools.project_numbers.pairs import Pair, Record, across, pair


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
