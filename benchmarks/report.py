"""What a benchmark's record says: a line a group, the headlines against their aims, tables and figures for the book."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from lora_course.lab import plots

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Headline:
    """A ratio that the course has an aim for. of, to: labels in a group."""

    text: str
    group: str
    of: str
    to: str
    aim: float


HEADLINES = [
    *(Headline(f"LoRA against PEFT's, {size}, {precision}", f"lora {size} {precision}", "LoRA", "PEFT LoRA", 1.0)
      for size in ("nano", "smollm2") for precision in ("fp32", "bf16", "4bit")),
    *(Headline(f"AdaLoRA against PEFT's, {size}", f"adalora {size}", "AdaLoRA", "PEFT AdaLoRA", 0.8) for size in ("nano", "smollm2")),
    Headline("8 experts against one LoRA, smollm2", "experts smollm2", "experts", "LoRA", 1.3),
    Headline("8 frozen experts against X-LoRA, smollm2", "xlora smollm2", "frozen experts", "X-LoRA", 0.5),
    Headline("merged and unloaded against the base, smollm2", "merged smollm2", "merged and unloaded", "base", 1.02),
]  # fmt: skip
VARIANT_AIM = 1.15
MEMORY_AIM = {"LoRA against PEFT's": 1.0}
"""Beginnings of headlines whose memory has an aim too."""


def ratios(group: Record, of: str, to: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the rounds' ratios of seconds."""
    pairs = [a / b for a, b in zip(group["seconds"][of], group["seconds"][to], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return middle, low, high


def memory_ratio(group: Record, of: str, to: str) -> float | None:
    peaks = group.get("peak_bytes")
    return peaks[of] / peaks[to] if peaks else None


def met(ratio: float, aim: float) -> bool:
    """To the two decimals that are shown."""
    return round(ratio, 2) <= aim


REASONS = {
    "LoRA against PEFT's, nano, bf16": "the update is computed in the base's type, PEFT's in fp32. That takes less memory, and more time on a processor "
    "that emulates bf16: in a trial with the update in fp32 the step took less time than PEFT's.",
    "LoRA against PEFT's, smollm2, 4bit": "it is the memory. The copies of Bᵀ that are kept are a small part of it; the rest was not found.",
    "progressive": "joining the pairs of all stages for each pass is a small part of it, by a profile; the rest was not found.",
    "AdaLoRA against PEFT's": "the frozen base is most of PEFT's step already, and can't become cheaper; the next section says what is left.",
    "ΔW mask": "its multiplications are as many as LoRA's, but scattered: each trained number has its own row of x transposed, where LoRA's are "
    "matrix products. In a profile of nano's step, copies that turn x and the gradient round were the largest part.",
}
"""What was found, on one machine, by the beginning of a headline."""


def reason(text: str) -> str:
    """Why a headline is not met; what was not looked into says so."""
    return next(
        (why for start, why in REASONS.items() if text.startswith(start)), "not looked into."
    )


def memory_aim(text: str) -> float | None:
    return next((aim for start, aim in MEMORY_AIM.items() if text.startswith(start)), None)


def verdict(text: str, ratio: float, memory: float | None, aim: float) -> str:
    """ "met", "not met", or which of time and memory is not."""
    limit = memory_aim(text)
    missed = [
        name
        for name, ok in (
            ("time", met(ratio, aim)),
            ("memory", not limit or not memory or met(memory, limit)),
        )
        if not ok
    ]
    return "met" if not missed else "not met" if not limit else f"{' and '.join(missed)} not met"


def line(group: Record) -> str:
    """Each arm's median, in ms."""
    return ", ".join(
        f"{label} {1000 * statistics.median(times):.0f} ms"
        for label, times in group["seconds"].items()
    )


def headlines(record: Record) -> list[tuple[str, tuple[float, float, float], float | None, float]]:
    """(text, ratio of seconds, ratio of memory, aim) of what has been measured; each layer variant among them."""
    groups = record["groups"]
    found = [
        (
            h.text,
            ratios(groups[h.group], h.of, h.to),
            memory_ratio(groups[h.group], h.of, h.to),
            h.aim,
        )
        for h in HEADLINES
        if h.group in groups
    ]
    for size in ("nano", "smollm2"):
        if group := groups.get(f"variants {size}"):
            found += [
                (f"{label} against LoRA, {size}", ratios(group, label, "LoRA"), memory_ratio(group, label, "LoRA"), VARIANT_AIM)
                for label in group["seconds"] if label != "LoRA" and not label.startswith("PEFT")
            ]  # fmt: skip
    return found


def table_rows(record: Record) -> list[list[str]]:
    return [
        [text, f"{ratio:.2f} ({low:.2f}–{high:.2f})", f"{memory:.2f}" if memory else "", f"≤\N{NO-BREAK SPACE}{aim:g}" + (", both" if memory_aim(text) else ""), verdict(text, ratio, memory, aim)]
        for text, (ratio, low, high), memory, aim in headlines(record)
    ]  # fmt: skip


SHARES = [
    ("LoRA, nano", "lora nano fp32", "LoRA"),
    ("LoRA, smollm2", "lora smollm2 fp32", "LoRA"),
    ("AdaLoRA, nano", "adalora nano", "AdaLoRA"),
    ("AdaLoRA, smollm2", "adalora smollm2", "AdaLoRA"),
]


def shares(record: Record) -> list[tuple[str, float, float]]:
    """(what, the frozen base's part of PEFT's step, what ours adds to the base over what PEFT's adds), medians of the rounds' ratios."""
    found = []
    for label, key, arm in SHARES:
        if group := record["groups"].get(key):
            rounds = zip(
                *(group["seconds"][name] for name in (arm, f"PEFT {arm}", "frozen base")),
                strict=True,
            )
            if added := [
                (ours - base) / (theirs - base) for ours, theirs, base in rounds if theirs > base
            ]:
                found.append(
                    (
                        label,
                        ratios(group, "frozen base", f"PEFT {arm}")[0],
                        statistics.median(added),
                    )
                )
    return found


HEAD = ["what", "time, median (quartiles)", "peak memory", "aim", ""]


def text(record: Record) -> str:
    """The headlines for a terminal."""
    table = [HEAD, *table_rows(record)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def picture(figure: plt.Figure, alt: str) -> str:
    """An `<img>` with alt text that needs no other file, for a page of the book."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200, facecolor="white")
    plt.close(figure)
    width = round(figure.get_figwidth() * 100)
    source = base64.b64encode(data.getvalue()).decode()
    return f'```{{raw}} html\n<img alt="{html.escape(alt, quote=True)}" width="{width}" style="max-width:100%;height:auto" src="data:image/png;base64,{source}">\n```'


def headline_figure(record: Record) -> str:
    found = headlines(record)
    figure, ax = plots.figure(height=0.6 + 0.26 * len(found))
    for y, (_, (ratio, low, high), _, aim) in enumerate(found):
        color, marker = (plots.PALETTE[0], "o") if met(ratio, aim) else (plots.PALETTE[1], "s")
        ax.plot([low, high], [y, y], color=color, linestyle="-", marker="", linewidth=3)
        ax.plot(ratio, y, color=color, marker=marker, linestyle="")
        ax.plot(aim, y, color="black", marker="|", markersize=12, linestyle="")
    ax.axvline(1, color="#888888", linewidth=1, linestyle="-", marker="")
    ax.set_yticks(range(len(found)), [name for name, *_ in found], fontsize=9)
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel("ratio of step times; | is the aim")
    return picture(
        figure,
        "Ratios of seconds with their quartiles and aims: "
        + "; ".join(f"{name} {ratio:.2f}" for name, (ratio, _, _), _, _ in found)
        + ".",
    )


CURVES = {
    "rank": ("curve rank", "rank r", "a training step"),
    "experts": ("curve experts", "experts of rank 8", "a training step"),
    "tasks": ("curve tasks", "tasks in a batch of 16 rows", "a forward pass"),
}


def curve_figure(record: Record, name: str) -> str:
    """Medians and quartiles in ms against a number."""
    key, x_label, what = CURVES[name]
    series: dict[str, dict[int, list[float]]] = {}
    for label, times in record["groups"][key]["seconds"].items():
        arm, _, number = label.rpartition(" ")
        arm, number = (arm, number) if number.isdigit() else (label, "1")
        series.setdefault(arm, {})[int(number)] = [1000 * t for t in times]
    figure, ax = plots.figure(height=3.2)
    for arm, points in series.items():
        x = sorted(points)
        quartiles = [statistics.quantiles(points[n], n=4, method="inclusive") for n in x]
        drawn = ax.plot(
            x,
            [q[1] for q in quartiles],
            label={"tasks": "ours", "PEFT tasks": "PEFT"}.get(arm, arm),
        )[0]
        ax.fill_between(
            x,
            [q[0] for q in quartiles],
            [q[2] for q in quartiles],
            color=drawn.get_color(),
            alpha=0.2,
            linewidth=0,
        )
    numbers = sorted({n for points in series.values() for n in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(numbers, [str(n) for n in numbers])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel(x_label)
    ax.set_ylabel(f"ms for {what}")
    figure.legend(loc="outside upper center", ncols=3)
    said = "; ".join(
        f"{arm}: "
        + ", ".join(f"{n} → {statistics.median(points[n]):.0f} ms" for n in sorted(points))
        for arm, points in series.items()
    )
    return picture(figure, f"Time of {what} against {x_label}. {said}.")


def page(path: Path) -> str:
    """The generated part of the book's page; a sentence where nothing was measured yet."""
    if not path.exists():
        return "*Not measured yet: `make bench`.*"
    record = json.loads(path.read_text())
    source, groups = record["provenance"], record["groups"]
    dates = sorted({group["date"] for group in groups.values()})
    parts = [
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} on {source['machine']}, {source['processor']}, {source['cores']} cores, "
        f"{source['threads']} threads; " + ", ".join(f"{name} {version}" for name, version in source["versions"].items()) + "."
        + ("" if source["native_bf16"] else " This processor emulates bf16: a bf16 base gets one row of 16 tokens, and a 4-bit base computes in fp32."),
        "## Against the aims", headline_figure(record), markdown(HEAD, table_rows(record)),
    ]  # fmt: skip
    if unmet := [
        text
        for text, (ratio, *_), memory, aim in headlines(record)
        if verdict(text, ratio, memory, aim) != "met"
    ]:
        parts += [
            "Not met, and what was found on the machine that this course's own record is from:",
            "\n".join(f"- **{text}**: {reason(text)}" for text in unmet),
        ]
    if found := shares(record):
        parts += [
            "## What the base alone takes",
            "A step of the frozen base, forward and backward with nothing to train, is a part of every adapter's step. Left: how much of PEFT's. "
            "Right: what is added to it here, over what PEFT adds.",
            markdown(["what", "frozen base, of PEFT's step", "added here, over added by PEFT"], [[label, f"{base:.2f}", f"{own:.2f}"] for label, base, own in found]),
        ]  # fmt: skip
    for name, (key, *_) in CURVES.items():
        if key in groups:
            parts += [
                f"## Against the number of {name}" if name != "rank" else "## Against the rank",
                curve_figure(record, name),
            ]
    parts.append("## Every arm")
    body = []
    for key, group in groups.items():
        for label, times in group["seconds"].items():
            low, middle, high = (
                1000 * q for q in statistics.quantiles(times, n=4, method="inclusive")
            )
            peak = group.get("peak_bytes", {}).get(label)
            body.append(
                [
                    key,
                    label,
                    f"{middle:.1f} ({low:.1f}–{high:.1f})",
                    f"{peak / 1e6:.0f}" if peak else "",
                ]
            )
    parts.append(markdown(["group", "arm", "ms, median (quartiles)", "peak memory, MB"], body))
    return "\n\n".join(parts)
