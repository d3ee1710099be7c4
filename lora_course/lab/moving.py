"""Figures that move: a cell computes every frame, and sliders and menus show them without a kernel.

    def frame(block, kind):
        return [moving.line(outliers, {kind: errors[kind, block]}, "outliers, %", "error")]

    moving.show({"block size": [16, 64, 256], "format": ["NF4", "FP4"]}, frame, alt="…", number="1.1-1")

The output carries its data, its script (moving.js) and a still picture of some frames. Where scripts don't run (GitHub, paper)
the still is shown. What is drawn is what the cell computed, to six significant digits.
"""

import functools
import html
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from IPython.display import display

from lora_course.lab import still
from lora_course.lab.plots import PALETTE, bundle, caption_of, label, stylesheet

MOST = 1_000_000  # characters of data in one figure
Panel = dict[str, Any]


def line(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    log: str = "",
    at: float | None = None,
) -> Panel:
    """Curves over `x`. log: "x", "y" or "xy". at: where a vertical line says "here"."""
    return {
        "kind": "line", "x": x, "series": series, "x_label": x_label, "y_label": y_label,
        "log": log, "at": at,
    }  # fmt: skip


def bars(groups: Mapping[str, float | Mapping[str, float]], y_label: str) -> Panel:
    """A bar for each name, or for each series of each group: `groups[group][series]`."""
    nested = {name: v if isinstance(v, Mapping) else {"": v} for name, v in groups.items()}
    return {"kind": "bars", "groups": nested, "y_label": y_label}


def heat(matrix: Sequence[Sequence[float | None]], rows: Sequence, columns: Sequence, title: str,
         x_label: str = "", y_label: str = "") -> Panel:  # fmt: skip
    """A matrix as coloured cells; None leaves a cell empty. Numbers stand in the cells where there are few."""
    return {
        "kind": "heat", "matrix": matrix, "rows": [str(r) for r in rows],
        "columns": [str(c) for c in columns], "title": title, "x_label": x_label, "y_label": y_label,
    }  # fmt: skip


def points(places: Mapping[str, tuple[float, float]], x_label: str, y_label: str,
           chosen: Sequence[str] = (), log: str = "") -> Panel:  # fmt: skip
    """Named points in a plane; those in `chosen` are filled and named, the others hollow."""
    return {
        "kind": "points", "places": places, "x_label": x_label, "y_label": y_label,
        "chosen": list(chosen), "log": log,
    }  # fmt: skip


def tokens(texts: Sequence[str], weights: Sequence[Sequence[float]], names: Sequence[str],
           picks: str = "") -> Panel:  # fmt: skip
    """A text whose tokens have the colour of their largest weight. weights: [tokens, names], each row within [0, 1].

    picks: name of a control with a value for each token; a click on a token sets it, and its token is framed.
    """
    return {"kind": "tokens", "texts": list(texts), "weights": weights, "names": list(names), "picks": picks}  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], marked: Sequence[tuple[int, int]] = ()) -> Panel:  # fmt: skip
    """A small table of numbers or words; the first column names the rows. marked: (row, column) of cells to point at."""
    return {"kind": "table", "header": list(header), "rows": rows, "marked": [list(m) for m in marked]}  # fmt: skip


def show(
    controls: Mapping[str, Sequence[Any]],
    frame: Callable[..., Sequence[Panel | str]],
    alt: str,
    caption: str = "",
    number: str = "",
    start: Sequence[int] | None = None,
    stills: Sequence[Sequence[int]] | None = None,
) -> None:
    """Displays a figure with a slider for each control whose values are numbers and a menu for each other one.

    controls: name → its values. frame: called with one value a control, in order, for every combination; returns the panels
    of that frame (the same kinds in each) and, if it likes, a sentence for below the figure. alt: what the figure shows.
    caption: what to see in it. number: such as "1.1-1"; gives "Figure 1.1-1." and the anchor #figure-1-1-1.
    start: place in each control's values to begin at. stills: such places for the still form; by default the first control's
    first, middle and last value.

    Raises ValueError for a control without a choice, frames of unequal kinds, numbers that are not finite, too much data.
    """
    data = figure_data(controls, frame, start)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    if len(text) > MOST:
        raise ValueError(
            f"the figure holds {len(text):,} characters of data; at most {MOST:,}: take fewer values a control"
        )
    places = [tuple(place) for place in stills] if stills else _stills(data)
    chosen = [(_titled(data, place), _panels(data, place)) for place in places]
    picture = still.picture(chosen, data["limits"])
    source = html.escape(picture.source, quote=True)
    body = (
        f'<img class="still" alt="{html.escape(alt, quote=True)}" src="{source}" width="{picture.width}">'
        f'<div class="live"></div>{caption_of(caption, number)}'
        f'<script type="application/json">{text}</script>'
        f"<script data-lab>{script()}</script>"
    )
    display(
        bundle(f'<figure class="moving"{label(number)}>{stylesheet()}{body}</figure>', picture, alt)
    )


def figure_data(controls: Mapping[str, Sequence[Any]], frame: Callable[..., Sequence[Panel | str]],
                start: Sequence[int] | None = None) -> dict[str, Any]:  # fmt: skip
    """All that the script draws: controls, distinct panels, the panels of each frame, and the range of each place."""
    lists = {name: list(values) for name, values in controls.items()}
    if not lists or any(len(values) < 2 for values in lists.values()):
        raise ValueError(
            f"controls={ {n: len(v) for n, v in lists.items()} } values; expected at least one control, each with two or more"
        )
    known: dict[str, int] = {}
    frames: list[list[int]] = []
    said: list[str] = []
    kinds: list[str] = []
    for values in itertools.product(*lists.values()):
        parts = frame(*values)
        panels = [_plain(part) for part in parts if not isinstance(part, str)]
        words = [part for part in parts if isinstance(part, str)]
        if not panels or (kinds and kinds != [panel["kind"] for panel in panels]):
            raise ValueError(
                f"frame{values} has the panels {[p['kind'] for p in panels]}; expected {kinds or 'at least one'}"
            )
        kinds = [panel["kind"] for panel in panels]
        texts = [json.dumps(panel, ensure_ascii=False) for panel in panels]
        frames.append([known.setdefault(text, len(known)) for text in texts])
        said.append(" ".join(words) or "; ".join(filter(None, map(still.spoken, panels))))
    panels = [json.loads(text) for text in known]
    return {
        "controls": [
            {"name": name, "values": [_word(v) for v in values], "slider": all(_numeric(v) for v in values)}
            for name, values in lists.items()
        ],
        "start": list(start) if start else [0] * len(lists),
        "panels": panels,
        "frames": frames,
        "said": said,
        "limits": [still.limits([panels[f[slot]] for f in frames]) for slot in range(len(kinds))],
        "colours": [colour if colour != "#000000" else "currentColor" for colour in PALETTE],
    }  # fmt: skip


@functools.cache
def script() -> str:
    return resources.files("lora_course.lab").joinpath("moving.js").read_text(encoding="utf-8")


def _place(data: dict[str, Any], place: Sequence[int]) -> int:
    """The index of a frame from a place in each control: the last control changes fastest."""
    index = 0
    for control, at in zip(data["controls"], place, strict=True):
        index = index * len(control["values"]) + at
    return index


def _panels(data: dict[str, Any], place: Sequence[int]) -> list[Panel]:
    return [data["panels"][i] for i in data["frames"][_place(data, place)]]


def _titled(data: dict[str, Any], place: Sequence[int]) -> str:
    return ", ".join(f"{c['name']} {c['values'][i]}" for c, i in zip(data["controls"], place))


def _stills(data: dict[str, Any]) -> list[tuple[int, ...]]:
    count, rest = len(data["controls"][0]["values"]), data["start"][1:]
    return [(i, *rest) for i in dict.fromkeys([0, count // 2, count - 1])]


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists, floats to six significant digits; refuses what is not finite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a frame holds {value}; expected finite numbers (None leaves a cell of heat empty)")  # fmt: skip
        return float(f"{value:.6g}")
    return value
