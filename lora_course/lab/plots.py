"""One style of figures: readable on a phone and in print, on light and dark ground, by colour-blind people; with alt text."""

import base64
import functools
import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from PIL import Image

# Okabe and Ito's palette, which stays apart under the common kinds of colour blindness; its yellow is too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++")
WIDTH = 7.0  # inches: 700 px at 100 px an inch, the width of the book's column
NARROW = 4.6  # inches: what a phone shows at 80 percent, so that 11 points are still 12 pixels
SIDE = re.compile(r"\b(?:Left|Right)(?=[:,])")  # where a caption names a panel
COLUMN = {"Left": "Above", "Right": "Below"}
GREY = re.compile(r"#([0-9a-f]{2})\1\1\b")
FIXED = "#010101"  # black that stays black in the dark: text on a cell of a coloured matrix
_serial = itertools.count()


def style() -> None:
    """Sets matplotlib's defaults to the course's style. Series differ in colour, line and marker, so also in grey."""
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.6),
            "figure.dpi": 100,
            "savefig.dpi": 200,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#DDDDDD",
            "lines.linewidth": 2,
            "lines.markersize": 5,
            "legend.frameon": False,
            "axes.prop_cycle": cycler(color=PALETTE)
            + cycler(linestyle=LINES)
            + cycler(marker=MARKERS),
        }
    )


def figure(
    rows: int = 1, columns: int = 1, height: float = 3.6, **arguments
) -> tuple[Figure, Axes | np.ndarray]:
    """`plt.subplots` in the course's style, as wide as the column; height in inches."""
    style()
    return plt.subplots(rows, columns, figsize=(WIDTH, height), **arguments)


def bars(
    ax: Axes,
    groups: Mapping[str, Mapping[str, float | Sequence[float]]],
    label: str,
    values: str | None = None,
) -> None:
    """Bars side by side: `groups[group][series]` is a number, or one a seed (the bar is their mean, the line their range).

    label: of the y axis, with its unit. values: format of the number over each bar, such as ".2f"; none by default.
    """
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        seeds = [np.atleast_1d(group.get(name, np.nan)).astype(float) for group in groups.values()]
        heights = np.array([s.mean() for s in seeds])
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        spread = np.array([[s.mean() - s.min(), s.max() - s.mean()] for s in seeds]).T
        style_of_bar: dict[str, Any] = {
            "color": PALETTE[i % len(PALETTE)],
            "hatch": HATCHES[i % len(HATCHES)],
            "edgecolor": "white",
        }
        drawn = ax.bar(
            x,
            heights,
            width,
            label=name,
            yerr=spread if spread.any() else None,
            capsize=3,
            **style_of_bar,
        )
        if values is not None:
            ax.bar_label(drawn, [f"{height:{values}}" for height in heights], padding=2, fontsize=9)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_ylabel(label)
    ax.grid(axis="x", visible=False)
    if len(series) > 1:
        ax.legend()


def beside(ax: Axes, x: float, y: float, words: str) -> None:
    """Words to the right of a point, as near on a phone as on a screen (a distance in data would shrink with the figure)."""
    ax.annotate(words, (x, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=10)


def band(ax: Axes, x: Sequence[float], per_seed: Sequence[Sequence[float]], label: str) -> None:
    """The mean over seeds as a line and their range, from least to greatest, as a band. per_seed: [seeds, points]."""
    values = np.asarray(per_seed, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(x):
        raise ValueError(
            f"per_seed has shape {values.shape}; expected one row a seed of {len(x)} points, as x has"
        )
    (line,) = ax.plot(x, values.mean(0), label=label, markevery=max(1, len(x) // 10))
    ax.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG: its data as an address that needs no file, and its width in pixels on the page."""

    data: str
    width: int

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{self.data}"


class Bundle:
    """An output in several forms: HTML for notebooks and the book, a PNG for paper and GitHub, words for a terminal."""

    def __init__(self, forms: dict[str, str]) -> None:
        self.forms = forms

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return self.forms


def bundle(body: str, picture: Picture, alt: str) -> Bundle:
    return Bundle({"text/html": body, "image/png": picture.data, "text/plain": f"[figure] {alt}"})


def show(fig: Figure, alt: str, caption: str = "", number: str = "") -> None:
    """Displays a figure with alt text that says what it shows; then closes it.

    Its ground is transparent, and its black and grey follow the page's text, so that it can be read on light and on dark
    ground. A row of panels stands in a column on a phone. caption: what to see in it, in a sentence. number: such as "2.1-1";
    gives "Figure 2.1-1." before the caption and the anchor #figure-2-1-1.

    Raises ValueError for an empty alt.
    """
    if not alt.strip():
        raise ValueError("alt is empty: say in a sentence what the figure shows")
    for ax in fig.axes:
        for text in ax.texts if ax.images else ():
            if text.get_color() in ("black", "k", "#000000"):
                text.set_color(FIXED)
    paper = png(fig, close=False)
    forms = f'<div class="wide">{svg(fig, alt)}</div>'
    if stack(fig):
        forms += f'<div class="narrow" style="display:none">{svg(fig, alt, bbox_inches="tight", pad_inches=0.03)}</div>'
    plt.close(fig)
    body = f'<figure class="plot"{label(number)}>{stylesheet()}{forms}{caption_of(caption, number)}</figure>'
    display(bundle(body, paper, alt))


def png(fig: Figure, close: bool = True) -> Picture:
    """A figure on white, sharp enough for print, in 128 colours, which take a third of the bytes."""
    drawn, picture = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=150, facecolor="white")
    if close:
        plt.close(fig)
    Image.open(drawn).convert("RGB").quantize(128).save(picture, format="png", optimize=True)
    data = base64.b64encode(picture.getvalue()).decode()
    return Picture(data, round(fig.get_figwidth() * 100))


def svg(fig: Figure, alt: str, **options: object) -> str:
    """A figure as SVG that takes its black from the page's text, and its greys from mixing that with the ground."""
    text = io.StringIO()
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "lora-course"}):
        fig.savefig(text, format="svg", transparent=True, metadata={"Date": None}, **options)
    source = text.getvalue()
    source = re.sub(
        r"<metadata>.*?</metadata>", "", source[source.index("<svg") :], flags=re.DOTALL
    )
    mine = f"f{next(_serial)}-"  # ids are the page's: two figures must not share one
    source = re.sub(r'(\bid="|url\(#|href="#)', lambda found: found[1] + mine, source)
    source = GREY.sub(lambda found: found[0] if found[0] in ("#ffffff", FIXED) else ink(int(found[1], 16)), source)  # fmt: skip
    (box,) = re.findall(r'viewBox="([^"]*)"', source)[:1]
    width = round(float(box.split()[2]) * 100 / 72)  # points at 100 pixels an inch
    opening = (
        f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" fill="currentColor" '
        f'style="width:100%;max-width:{width}px;height:auto" viewBox="{box}">'
    )
    return opening + source[source.index(">") + 1 :]


def ink(grey: int) -> str:
    """A grey (0 black, 255 white) as a mix of the text's colour with the ground."""
    return f"color-mix(in srgb, currentColor {100 * (255 - grey) / 255:.0f}%, transparent)" if grey else "currentColor"  # fmt: skip


def stack(fig: Figure) -> bool:
    """Puts a row of panels into a column as wide as a phone; a single one gets that width. False where it can't be done."""
    places = [ax.get_subplotspec() for ax in fig.axes]
    grids = {place.get_gridspec() if place else None for place in places}
    grid = grids.pop() if len(grids) == 1 else None
    if not grid or grid.nrows != 1 or grid.ncols != len(fig.axes) or fig.legends:
        return False
    height = fig.get_figheight()
    column = GridSpec(grid.ncols, 1, figure=fig)
    for row, ax in enumerate(fig.axes):
        ax.set_subplotspec(column[row])
        if row and ax.get_shared_y_axes().joined(ax, fig.axes[0]):
            ax.tick_params(labelleft=True)  # in a row its neighbour had them
    fig.set_size_inches(NARROW, max(height * NARROW / WIDTH, 2.6) * grid.ncols)
    return True


@functools.cache
def stylesheet() -> str:
    """The rules for what the lab displays, as an element: outputs carry it, since Colab and Jupyter have no other."""
    rules = resources.files("lora_course.lab").joinpath("lab.css").read_text(encoding="utf-8")
    return f"<style data-lab>{rules}</style>"


def label(number: str) -> str:
    """The anchor of a numbered figure."""
    return f' id="figure-{html.escape(number.replace(".", "-"))}"' if number else ""


def caption_of(caption: str, number: str) -> str:
    """A caption; its "Left:" and "Right:" are called "Above:" and "Below:" on a phone, where panels stand in a column."""
    if not caption and not number:
        return ""
    named = f"<b>Figure {html.escape(number)}.</b> " if number else ""
    sides = SIDE.sub(
        lambda m: f'<span data-column="{COLUMN[m[0]]}">{m[0]}</span>', html.escape(caption)
    )
    return f"<figcaption>{named}{sides}</figcaption>"
