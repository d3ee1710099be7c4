"""Whether the order of the methods that take time changes with it: `comparison`'s rule, on one text, in longer trainings.

Each length has its own schedule (growth and pruning move with it) and its own search for the rate. The runs of 32 steps are
those of `comparison`. An arm is "method/steps". What `CLAIMS` states was stated before any of these runs; they are
observations, as the longest trainings have one seed.
"""

from __future__ import annotations

import functools
from typing import Any

from lora_course.experiments import Kept, Runs, Study, Witness, compete
from lora_course.experiments import comparison as rule
from lora_course.experiments import methods as own
from lora_course.experiments.methods import Method
from lora_course.experiments.neighbours import MARGIN, Stated

SETTINGS: dict[str, Any] = rule.SETTINGS | {
    "domain": "shakespeare", "lengths": [100, 320], "seeds_at": {"100": [0, 1, 2], "320": [0]}, "gate_threshold": 0.32,
    "first_of": {"adalora": [1.6e-2, 3.2e-2, 6.4e-2]},
}  # fmt: skip
# with this threshold 32 steps at rate 0.008 have the penalty 2.5 that the comparison has
METHODS: dict[str, Method] = {
    name: rule.METHODS[name] for name in ("lora", "adalora", "adaptive", "progressive")
} | {"gates": Method("gates", own.gates, "4_1_sparse", rule.METHODS["gates"].note)}
CLAIMS: dict[str, Stated] = {
    "5.1-aa": Stated(
        f"At 320 steps none of AdaLoRA, gates, growth and stages is ahead of LoRA by more than {MARGIN} bits a byte.",
        "this course, after 32 steps", f"at most {MARGIN}", " and ".join(f"{name}[0] >= -{MARGIN}" for name in METHODS if name != "lora"),
    ),
    "5.1-ab": Stated(
        "AdaLoRA, growth and stages lose less against LoRA at 320 steps than at 32.",
        "this course: 32 steps leave little time after the last choice", "less",
        " and ".join(f"{name}_320[0] < {name}_32[0]" for name in ("adalora", "adaptive", "progressive")),
    ),
}  # fmt: skip


def body(runs: Runs) -> None:
    arms = runs.arms([f"{name}/{steps}" for steps in SETTINGS["lengths"] for name in METHODS])
    domain, asked = SETTINGS["domain"], SETTINGS["search_seeds"]
    runs.expect(sum(3 + len(SETTINGS["seeds_at"][arm.split("/")[1]]) for arm in arms))
    for arm in arms:
        name, steps = arm.split("/")
        settings = SETTINGS | {"steps": int(steps)}
        train = Kept(rule.train_measured, settings, METHODS[name], domain)
        first = SETTINGS["first_of"].get(name, SETTINGS["first"])
        scored, seeds = functools.partial(rule.score, domain), SETTINGS["seeds_at"][steps]
        compete(runs, arm, train, scored, first, asked, seeds=seeds)


WITNESS = Witness(("lora/100/0.008/0/validation",), {"bits_per_byte": 0.005})
STUDY = Study("5_1_longer", SETTINGS, body, WITNESS)
