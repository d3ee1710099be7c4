"""What the texts of the projects of chapters 2.1 and 2.2 take from the studies' records."""

from statistics import fmean
from typing import Any

from lora_course.lab import study
from tools.project_numbers.pairs import Pair, across, pair, seeds


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
