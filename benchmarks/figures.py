"""A benchmark's record as pictures for a page of the book."""

from __future__ import annotations

import base64
import html
import io
import statistics

import matplotlib.pyplot as plt

from benchmarks.aims import Record, headlines, met
from lora_course.lab import plots


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
