"""One style of figures: readable at the width of a column, in print, and by colour-blind people; always with alt text."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays apart under the common kinds of colour blindness; its yellow is too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++")
WIDTH = 7.0  # inches: 700 px at 100 px an inch, the width of the book's column


def style() -> None:
    """Sets matplotlib's defaults to the course's style. Series differ in colour, line and marker, so also in grey."""
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.6),
            "figure.dpi": 100,
            "savefig.dpi": 200,
            "figure.facecolor": "white",
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
        style_of_bar = {
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


def band(ax: Axes, x: Sequence[float], per_seed: Sequence[Sequence[float]], label: str) -> None:
    """The mean over seeds as a line and their range, from least to greatest, as a band. per_seed: [seeds, points]."""
    values = np.asarray(per_seed, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(x):
        raise ValueError(
            f"per_seed has shape {values.shape}; expected one row a seed of {len(x)} points, as x has"
        )
    (line,) = ax.plot(x, values.mean(0), label=label, markevery=max(1, len(x) // 10))
    ax.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


def show(fig: Figure, alt: str) -> None:
    """Displays a figure, for screens of double resolution, with alt text that says what it shows; then closes it.

    An `<img>` in HTML, since a notebook's `image/png` output carries no alt text into the book.
    """
    if not alt.strip():
        raise ValueError("alt is empty: say in a sentence what the figure shows")
    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=200, facecolor="white")
    plt.close(fig)
    width = round(fig.get_figwidth() * 100)
    data = base64.b64encode(picture.getvalue()).decode()
    display(
        HTML(
            f'<img alt="{html.escape(alt, quote=True)}" width="{width}" style="max-width:100%;height:auto" '
            f'src="data:image/png;base64,{data}">'
        )
    )
