"""What a benchmark's record says, in words and tables: a line a group, the headlines for a terminal, the page for the book."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.aims import Record, headlines, memory_aim, reason, shares, verdict
from benchmarks.figures import CURVES, curve_figure, headline_figure


def line(group: Record) -> str:
    """Each arm's median, in ms."""
    return ", ".join(
        f"{label} {1000 * statistics.median(times):.0f} ms"
        for label, times in group["seconds"].items()
    )


def table_rows(record: Record) -> list[list[str]]:
    return [
        [text, f"{ratio:.2f} ({low:.2f}–{high:.2f})", f"{memory:.2f}" if memory else "", f"≤\N{NO-BREAK SPACE}{aim:g}" + (", both" if memory_aim(text) else ""), verdict(text, ratio, memory, aim)]
        for text, (ratio, low, high), memory, aim in headlines(record)
    ]  # fmt: skip


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
