"""What the chapters' central claims come to on SmolLM2-135M: each was stated here before its arms had run.

The model learns a task with right answers (the past of English verbs, or that and the plural of German nouns), and a claim compares two arms of
the record by bits an answer token on test words, seed by seed. 0.05 bits, where a rule has a margin, is a tenth of what LoRA had
left on validation words when its rate was searched. Three seeds make observations.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_course.lab.chat_rules import RULES_OF, at_the_edge, right, rule_right, runs_of
from lora_course.lab.chat_words import compared, held_against
from lora_course.lab.claims import AnswerTable, Claims
from lora_course.lab.evidence import differences
from lora_course.lab.study import STUDIES, chosen_rate, load_study

LEVELS = {"bits_per_token": "bits an answer token", "own_text": "bits a byte of other English"}
BYTES_OF = {"delta": 8, "factors-2bit": 2 / 8 + 4 / 64}
"""Of a number of an adapter on disk, where it isn't fp32 alone: with its place; in 2 bits, with a scale for each 64."""


@dataclass(frozen=True)
class Question:
    """A claim on the chat model, and the claim on nano whose verdict it is held against.

    arms: for each name in `rule` the values that it stands for, as "arm" or "arm/field/key" within a run; several are averaged
    seed by seed. first, second: the two that the row at a chapter's head speaks of, in words. there: what nano's claim compared,
    where that is another pair. refuted: whether nano's claim, though it holds in its chapter, fails with other seeds.
    """

    nano: str
    study: str
    statement: str
    arms: Mapping[str, Sequence[str]]
    rule: str
    first: str
    second: str
    there: str = ""
    refuted: bool = False


def _lower(a: str, b: str) -> str:
    return f"all(x < y for x, y in zip({a}, {b}))"


PAST, SEVERAL = "smol_past", "smol_several"
LEARNT = {
    PAST: "the past of English verbs",
    SEVERAL: "the past of English verbs and the plural of German nouns",
}
UNSEEN = {PAST: "verbs", SEVERAL: "words"}
SMALLER = (1, 2, 4)
QUESTIONS: dict[str, Question] = {
    "0.1-s": Question(
        "0.1-b", PAST, "Rank 2 ends at most 0.05 bits an answer token behind rank 8, with every seed.",
        {"r2": ["lora-2"], "r8": ["lora"]}, "all(a - b < 0.05 for a, b in zip(r2, r8))", "rank 2", "rank 8", "rank 8 against 64",
    ),
    "1.1-s": Question(
        "1.1-b", PAST, "LoRA on the base in NF4 ends within 0.05 bits an answer token of LoRA on the base as it is, with every seed.",
        {"qlora": ["qlora"], "lora": ["lora"]}, "all(abs(q - l) < 0.05 for q, l in zip(qlora, lora))", "QLoRA", "LoRA",
    ),
    "1.2-s": Question(
        "1.2-a", PAST, "At the same final budget and scale AdaLoRA ends lower than LoRA, with every seed.",
        {"adalora": ["adalora"], "lora": ["lora"]}, _lower("adalora", "lora"), "AdaLoRA", "LoRA",
    ),
    "2.1-s": Question(
        "2.1-a", SEVERAL, "A router over two frozen specialists beats the average of the same specialists, with every seed.",
        {"router": ["router"], "average": ["average"]}, _lower("router", "average"), "router", "average",
    ),
    "2.1-t": Question(
        "2.1-h", SEVERAL, "One LoRA of as many parameters as two specialists beats each on its own task, with every seed.",
        {"lora": ["joint"], "specialists": ["specialists"]}, _lower("lora", "specialists"), "one LoRA", "specialists",
    ),
    "2.2-s": Question(
        "2.2-b", PAST, "One LoRA of rank 8 beats two stages of rank 4 with as many steps in all, with every seed.",
        {"lora": ["lora"], "stages": ["progressive"]}, _lower("lora", "stages"), "one LoRA of rank 8", "two stages of rank 4",
    ),
    "3.1-s": Question(
        "3.1-g", PAST, "Grown ranks end lower than uniform ones of equal sum, with every seed.",
        {"grown": ["adaptive"], "uniform": ["lora"]}, _lower("grown", "uniform"), "grown ranks", "rank 8",
    ),
    "3.2-s": Question(
        "3.2-b", SEVERAL, "A student taught by the specialists ends lower than one trained on the same rows alone, with every seed.",
        {"taught": ["distilled"], "alone": ["student"]}, _lower("taught", "alone"), "taught by two adapters (more text)", "alone",
    ),
    "3.3-s": Question(
        "3.3-e", SEVERAL, "After two tasks in a row replay ends with a better mean than training on and on, with every seed.",
        {"replay": ["replay"], "sequential": ["sequential"]}, _lower("replay", "sequential"), "replay", "training on without it",
    ),
    "4.1-s": Question(
        "4.1-a", PAST, "At equal numbers of trained parameters a mask on the update ends lower than LoRA, with every seed.",
        {"update": ["delta"], "lora": ["lora"]}, _lower("update", "lora"), "mask on the update", "LoRA",
    ),
    "4.1-t": Question(
        "4.1-f", PAST, "Gates that close a third of rank 12 end lower than LoRA of rank 8, with every seed.",
        {"gates": ["gates"], "lora": ["lora"]}, _lower("gates", "lora"), "gates (rank 12, a third closed)", "LoRA of rank 8",
        "from rank 8, half of it closed: ahead with five seeds and not with five others; from rank 12 not (5.1-e)", refuted=True,
    ),
    "4.2-s": Question(
        "4.2-c", PAST, "At ranks 1, 2 and 4 on average the cuts of a nested adapter (Matryoshka) are lower than SVD cuts of plain LoRA, with every seed.",
        {"nested": [f"nested/cut/{b}" for b in SMALLER], "svd": [f"lora/cut/{b}" for b in SMALLER]},
        _lower("nested", "svd"), "nested (Matryoshka)", "SVD cuts of LoRA", "by truncation",
    ),
    "4.3-s": Question(
        "4.3-d", PAST, "Rounding LoRA to 4 bits after training changes the bits an answer token by less than LoRA's own seeds differ, with every seed.",
        {"lora": ["lora"], "bits4": ["lora/rounded/4"]}, "all(abs(b - l) < max(lora) - min(lora) for b, l in zip(bits4, lora))",
        "4 bits", "as trained",
    ),
    "4.3-t": Question(
        "4.3-i", PAST, "At 2 bits training with the rounding is lower than rounding afterwards, with every seed.",
        {"trained": ["factors-2bit"], "after": ["lora/rounded/2"]}, _lower("trained", "after"), "trained in 2 bits", "rounded to 2",
    ),
    "5.1-s": Question(
        "5.1-c", PAST, "DoRA ends lower than LoRA, with every seed.",
        {"dora": ["dora"], "lora": ["lora"]}, _lower("dora", "lora"), "DoRA", "LoRA",
    ),
}  # fmt: skip


def series(record: Mapping[str, Any], paths: Sequence[str]) -> list[float]:
    """The mean of what the paths name, one value a seed. Raises KeyError for an arm that has not run with every seed."""
    columns = []
    for path in paths:
        arm, *inside = path.split("/")
        rate = chosen_rate(record, arm)
        column = []
        for seed in record["settings"]["seeds"]:
            value = record["runs"][f"{arm}/{rate:g}/{seed}/test"]
            for key in inside or ["bits_per_token"]:
                value = value[key]
            column.append(value)
        columns.append(column)
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def arms_run(record: Mapping[str, Any]) -> list[str]:
    """The arms that have run with every seed at their chosen rate, in the record's order; the base is none."""
    arms = dict.fromkeys(key.split("/")[0] for key in record["runs"] if key.count("/") == 3)
    return [arm for arm in arms if _has_run(record, arm)]


def _has_run(record: Mapping[str, Any], arm: str) -> bool:
    try:
        series(record, [arm])
    except KeyError:
        return False
    return True


def results(record: Mapping[str, Any], names: Mapping[str, str]) -> AnswerTable:
    """What the arms made of the past of English verbs, and how far from LoRA, seed by seed (mean; least to most), the
    lowest first in bits an answer token; last the size of the adapter on disk, without the file's header.

    names: the names of arms that are not to be called as the record calls them.
    """

    def behind(arm: str) -> float:
        return statistics.fmean(_gaps(record, arm, "bits_per_token"))

    rows = []
    for arm in sorted(arms_run(record), key=behind):
        runs = runs_of(record, arm)
        every, rare = (statistics.fmean(run[of] for run in runs) for of in ("exact", "irregular"))
        row = [html.escape(names.get(arm, arm)), f"{every:.1%} ({rare:.1%})"]
        for key in LEVELS:
            gaps = _gaps(record, arm, key)
            apart = f"{statistics.fmean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})"
            own = f"{statistics.fmean(run[key] for run in runs):.3f} itself"
            row.append(own if arm == "lora" else apart)
        row.append(f"{adapter_bytes(record, arm) / 1e6:.1f}")
        rows.append(tuple(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row))
    levels = (f"{of} minus LoRA's" for of in LEVELS.values())
    head = ("method", "exactly right (irregular)", *levels, "adapter, MB")
    return AnswerTable(head, rows, named=1)


def adapter_bytes(record: Mapping[str, Any], arm: str) -> float:
    """Of the served adapter's numbers on disk, the mean over the seeds."""
    return BYTES_OF.get(arm, 4) * statistics.fmean(
        run["parameters"] for run in runs_of(record, arm)
    )


def one_sided(record: Mapping[str, Any], key: str) -> tuple[list[str], list[str]]:
    """The arms that are below, and those that are above LoRA with every seed in a level (`LEVELS`)."""
    gaps = {arm: _gaps(record, arm, key) for arm in arms_run(record)}
    below = [arm for arm, values in gaps.items() if max(values) < 0]
    return below, [arm for arm, values in gaps.items() if min(values) > 0]


def _gaps(record: Mapping[str, Any], arm: str, key: str) -> list[float]:
    """An arm less LoRA in one of `LEVELS`, seed by seed."""
    return differences(*([run[key] for run in runs_of(record, of)] for of in (arm, "lora")))


def missing(id: str) -> list[str]:
    """The arms that a question waits for, all of them where its study has no record; none once it can be answered."""
    question = QUESTIONS[id]
    arms = dict.fromkeys(path.split("/")[0] for paths in question.arms.values() for path in paths)
    if not (STUDIES / f"{question.study}.json").is_file():
        return list(arms)
    record = load_study(question.study)
    return [arm for arm in arms if not _has_run(record, arm)]


def answer(claims: Claims, *ids: str) -> list[tuple[str, str, str]]:
    """Adds the claims whose arms have run, and returns a row for each, as a chapter's table of answers has them.

    The claim on nano of each (`Question.nano`) is to be among `claims` already; its verdict is compared, not its amount.
    """
    rows = []
    for id in ids:
        question, waiting = QUESTIONS[id], missing(id)
        asked = (
            f"On SmolLM2, a chat model of 135M that learns {LEARNT[question.study]}: "
            f"{html.escape(question.first)} or {html.escape(question.second)}?"
        )
        if waiting:
            rows.append((asked, "not measured yet", f"<code>{question.study}</code> still lacks {', '.join(waiting)}"))  # fmt: skip
            continue
        record = load_study(question.study)
        values = {name: series(record, paths) for name, paths in question.arms.items()}
        one, two = values.values()
        apart = [a - b for a, b in zip(one, two, strict=True)]
        low, high = min(apart), max(apart)
        mean, least, most = (f"{value:+.3f}" for value in (statistics.fmean(apart), low, high))
        nano = claims[question.nano]
        arms = dict.fromkeys(
            path.split("/")[0] for paths in question.arms.values() for path in paths
        )
        edges = "".join(at_the_edge(record, arm) for arm in arms)
        claims.add(
            id, question.statement, f"this course, as {question.nano} on nano", "stated before the runs", values,
            question.rule, f"On nano {question.nano}: {nano.verdict}.{edges}", kind="observation", evidence="smol",
            effect=f"{mean} bits an answer token ({least} to {most})",
        )  # fmt: skip
        names = [html.escape(name) for name in (question.first, question.second)]
        won = record["runs"]["base/test"]["bits_per_token"] - statistics.fmean(two)
        said = compared(names, apart, won)
        shares = [right(record, paths[0]) for paths in question.arms.values()]
        if all(shares):
            ruled = f"{RULES_OF[question.study]}: {rule_right(record):.0%}"
            said += (
                f" {' against '.join(shares)} of unseen {UNSEEN[question.study]} right ({ruled})."
            )
        same = held_against(
            names[0].split(" (")[0],
            question.rule,
            claims[id].holds,
            nano.holds and not question.refuted,
        )
        same += f"; there {question.there}" if question.there else ""
        rows.append((asked, said, f"{same} ({claims.link(question.nano)}; here {claims.link(id)})"))
    return rows
