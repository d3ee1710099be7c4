"""What stands beside the chat model's scores: a rule's on the same words, how many words they rest on, the end of a grid."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from lora_course.lab.study import chosen_rate, load_study
from lora_course.lab.tasks import load_task

RULES = {"past": "three-line rule", "plural": "suffix table"}
"""For each task what `tasks_nano` has beside the models: a rule, or a table learnt from the training words."""
RULES_OF = {"smol_past": "a rule of three lines", "smol_several": "a rule and a table"}


def runs_of(record: Mapping[str, Any], arm: str) -> list[dict[str, Any]]:
    """An arm's test runs at its chosen rate, seed by seed."""
    rate = chosen_rate(record, arm)
    return [record["runs"][f"{arm}/{rate:g}/{seed}/test"] for seed in record["settings"]["seeds"]]


def right(record: Mapping[str, Any], path: str) -> str:
    """ "71%": the mean share of test words that an arm answers exactly; "" for what was scored by bits alone."""
    if "/" in path:
        return ""
    runs = runs_of(record, path)
    asked = [list(run["tasks"].values()) if "tasks" in run else [run] for run in runs]
    return f"{statistics.fmean(one['exact'] for run in asked for one in run):.0%}"


def rule_right(record: Mapping[str, Any]) -> float:
    """The share of a record's test words that a rule or a table (`RULES`) answers exactly, the mean of the tasks.

    `tasks_nano` has their answers to all test words, in order, and a record's test words are the first of these.
    """
    settings, rules = record["settings"], load_study("tasks_nano")["runs"]
    tasks, count = settings.get("tasks") or [settings["task"]], settings["words"]["test"]
    answered = [rules[f"baselines/{task}"][RULES[task]]["right"][:count] for task in tasks]
    return statistics.fmean(statistics.fmean(map(int, marks)) for marks in answered)


def irregular_verbs(record: Mapping[str, Any]) -> int:
    """How many of a record's test verbs are irregular: what its runs' "irregular" is a share of."""
    return load_task("past", "test")["regular"][: record["settings"]["words"]["test"]].count(False)


def at_the_edge(record: Mapping[str, Any], arm: str) -> str:
    """What a claim on an arm is to say where the best of the values tried (a rate, or a weight) is the lowest or the
    highest of them; "" where it lies between, or only one was tried."""
    keys = [key.split("/") for key in record["runs"]]
    tried = sorted({float(key[1]) for key in keys if key[0] == arm and key[-1] == "validation"})
    if len(tried) < 2 or tried[0] < chosen_rate(record, arm) < tried[-1]:
        return ""
    end, beyond = (
        ("lowest", "lower") if chosen_rate(record, arm) == tried[0] else ("highest", "higher")
    )
    return f" {chosen_rate(record, arm):g} for {arm} is the {end} value tried; a {beyond} one may be better."
