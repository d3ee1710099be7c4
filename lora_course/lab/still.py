"""The still form of a figure that moves: some of its frames, drawn by matplotlib for print and for pages without scripts."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from lora_course.lab.plots import PALETTE, WIDTH, Picture, bars, png, style

Panel = dict[str, Any]
HEIGHT = {"line": 2.7, "bars": 2.5, "points": 3.2, "heat": 2.9}


def limits(panels: Sequence[Panel]) -> dict[str, list[float]]:
    """The range of each axis over all frames of one place, so that frames can be compared: x, y, or the colours' z."""
    kind = panels[0]["kind"]
    found: dict[str, list[float]] = {"x": [], "y": [], "z": []}
    for panel in panels:
        if kind == "line":
            found["x"] += panel["x"]
            found["y"] += [value for values in panel["series"].values() for value in values]
        elif kind == "bars":
            found["y"] += [0, *(v for group in panel["groups"].values() for v in group.values())]
        elif kind == "points":
            found["x"] += [x for x, _ in panel["places"].values()]
            found["y"] += [y for _, y in panel["places"].values()]
        elif kind == "heat":
            found["z"] += [v for row in panel["matrix"] for v in row if v is not None]
    ranges = {axis: [min(values), max(values)] for axis, values in found.items() if values}
    for axis, (low, _) in ranges.items():
        if axis in panels[0].get("log", "") and low <= 0:
            raise ValueError(
                f"a logarithmic {axis} axis holds {low}; expected positive numbers only"
            )
    return ranges


def spoken(panel: Panel) -> str:
    """A panel in words, for where it can't be seen."""
    if panel["kind"] == "bars":
        return ", ".join(
            f"{' '.join(filter(None, (group, name)))} {value:.3g}"
            for group, series in panel["groups"].items()
            for name, value in series.items()
        )
    if panel["kind"] == "line":
        at = panel["at"]
        return ", ".join(
            f"{name} {values[panel['x'].index(at)]:.3g}"
            if at in panel["x"]
            else f"{name} from {values[0]:.3g} to {values[-1]:.3g}"
            for name, values in panel["series"].items()
        )
    if panel["kind"] == "points":
        return ", ".join(panel["chosen"])
    if panel["kind"] == "table":
        return "; ".join(" ".join(str(cell) for cell in row) for row in panel["rows"])
    return ""


def picture(frames: Sequence[tuple[str, list[Panel]]], ranges: Sequence[dict]) -> Picture:
    """A row for each frame, a column for each panel that is a plot; texts and tables have rows of their own."""
    style()
    rows = [row for title, panels in frames for row in _rows(title, panels, ranges)]
    heights = [max(height(panel) for panel, _ in panels) for _, panels in rows]
    fig = plt.figure(figsize=(WIDTH, sum(heights)))
    for sub, (title, panels) in zip(_strips(fig, heights), rows, strict=True):
        axes = sub.subplots(1, len(panels), squeeze=False)[0]
        sub.suptitle(title, fontsize=10, fontweight="bold")
        for ax, (panel, spans) in zip(axes, panels, strict=True):
            DRAW[panel["kind"]](ax, panel, spans)
    return png(fig)


def height(panel: Panel) -> float:
    """Inches of one panel: a text and a table are as tall as they have lines."""
    if panel["kind"] == "tokens":
        return 0.5 + 0.16 * len(_words(panel).splitlines())
    return 0.7 + 0.27 * len(panel["rows"]) if panel["kind"] == "table" else HEIGHT[panel["kind"]]


def _rows(title: str, panels: list[Panel], ranges: Sequence[dict]) -> Iterator[tuple[str, list]]:
    pairs = list(zip(panels, ranges, strict=True))
    plots = [pair for pair in pairs if pair[0]["kind"] not in ("tokens", "table")]
    for row in [*([pair] for pair in pairs if pair not in plots), plots]:
        if row:
            yield title, row
            title = ""


def _strips(fig: plt.Figure, heights: list[float]) -> list:
    strips = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    return [strip for (strip,) in strips]


def _axes(ax: Axes, panel: Panel, spans: dict, margin: float = 0.06) -> None:
    ax.set(xlabel=panel.get("x_label", ""), ylabel=panel.get("y_label", ""))
    for axis, (low, high) in spans.items():
        log = axis in panel.get("log", "")
        getattr(ax, f"set_{axis}scale")("log" if log else "linear")
        ratio = (high / low) ** margin if log else (high - low) * margin or 0.5
        getattr(ax, f"set_{axis}lim")(
            *((low / ratio, high * ratio) if log else (low - ratio, high + ratio))
        )


def _line(ax: Axes, panel: Panel, spans: dict) -> None:
    for name, values in panel["series"].items():
        ax.plot(panel["x"], values, label=name, markevery=max(1, len(values) // 10))
    if panel["at"] is not None:
        ax.axvline(panel["at"], color="grey", linewidth=1, linestyle=":", marker="")
    _axes(ax, panel, spans)
    ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def _bars(ax: Axes, panel: Panel, spans: dict) -> None:
    bars(ax, panel["groups"], panel["y_label"], values=".3g")
    if ax.get_legend():
        ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    low, high = spans["y"]
    ax.set_ylim(low * 1.15, high * 1.15)


def _heat(ax: Axes, panel: Panel, spans: dict) -> None:
    low, high = spans["z"]
    matrix = [[float("nan") if value is None else value for value in row] for row in panel["matrix"]]  # fmt: skip
    ax.imshow(matrix, cmap="Blues", vmin=min(low, 0), vmax=high, aspect="auto")
    if len(panel["rows"]) <= 8 and len(panel["columns"]) <= 8:
        for i, row in enumerate(panel["matrix"]):
            for j, value in enumerate(row):
                if value is not None:
                    dark = value > 0.6 * high
                    ax.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=9, color="white" if dark else "black")  # fmt: skip
    named = {place: name for place, name in enumerate(panel["columns"]) if name}
    if len(named) <= 8:
        long = max(map(len, named.values()), default=0) > 5
        ax.set_xticks(list(named), list(named.values()), rotation=30 * long, ha="right" if long else "center")  # fmt: skip
    if len(panel["rows"]) <= 8:
        ax.set_yticks(range(len(panel["rows"])), panel["rows"])
    ax.set(title=panel["title"], xlabel=panel["x_label"], ylabel=panel["y_label"])
    ax.grid(visible=False)


def _points(ax: Axes, panel: Panel, spans: dict) -> None:
    for name, (x, y) in panel["places"].items():
        chosen = name in panel["chosen"]
        ax.scatter(x, y, s=50, facecolors=PALETTE[1] if chosen else "none", edgecolors=PALETTE[0])
    _axes(ax, panel, spans, margin=0.12)
    taken: list[Any] = []
    for name in panel["chosen"]:
        place, late = panel["places"][name], panel["places"][name][0] > sum(spans["x"]) / 2
        for before, below in ((late, False), (not late, False), (late, True), (not late, True)):
            words = ax.annotate(
                name, place, xytext=(-5 if before else 5, -5 if below else 5), textcoords="offset points", fontsize=9,
                ha="right" if before else "left", va="top" if below else "bottom",
            )  # fmt: skip
            room = words.get_window_extent()
            if not any(room.overlaps(other) for other in taken):
                taken.append(room)
                break
            words.remove()  # where no place is free, the sentence below the figure has the name


def _tokens(ax: Axes, panel: Panel, _: dict) -> None:
    ax.axis("off")
    ax.text(0, 1, _words(panel).replace("$", r"\$"), va="top", fontsize=8)


def _words(panel: Panel) -> str:
    """Each token with its largest weight, in lines."""
    best = [max(range(len(row)), key=row.__getitem__) for row in panel["weights"]]
    words = [f"{text.strip()} [{panel['names'][i]} {row[i]:.2f}]" for text, row, i in zip(panel["texts"], panel["weights"], best)]  # fmt: skip
    return textwrap.fill("   ".join(words), 110)


def _table(ax: Axes, panel: Panel, _: dict) -> None:
    ax.axis("off")
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in panel["rows"]]  # fmt: skip
    drawn = ax.table(cells, colLabels=panel["header"], loc="center", cellLoc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)


DRAW = {
    "line": _line, "bars": _bars, "heat": _heat, "points": _points, "tokens": _tokens, "table": _table,
}  # fmt: skip
