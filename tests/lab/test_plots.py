"""Figures: alt text arrives in the output, and series differ in more than colour."""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from lora_course.lab import plots
from lora_course.lab.plots import band, bars, figure, show


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    outputs: list[str] = []
    monkeypatch.setattr(plots, "display", lambda output: outputs.append(output._repr_html_()))
    return outputs


def test_the_shown_figure_carries_its_alt_text_and_fits_a_phone(shown) -> None:
    fig, ax = figure()
    ax.plot([1, 2], [3, 4])
    show(fig, 'Loss falls from 4 to 3 & stays "low"')
    (output,) = shown
    assert 'alt="Loss falls from 4 to 3 &amp; stays &quot;low&quot;"' in output
    assert 'width="700"' in output and "max-width:100%" in output
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", output)[1])))
    assert picture.size == (1400, 720)
    assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)  # white in dark mode too
    assert not plt.get_fignums()  # or a notebook would show it a second time


def test_a_figure_without_alt_text_is_refused(shown) -> None:
    with pytest.raises(ValueError, match="alt"):
        show(figure()[0], " ")


def test_series_differ_in_colour_line_and_marker() -> None:
    _, ax = figure()
    lines = [ax.plot([0, 1], [0, i])[0] for i in range(len(plots.PALETTE))]
    for look in ("get_color", "get_linestyle", "get_marker"):
        seen = [
            str(getattr(line, look)())
            + str(line._unscaled_dash_pattern if look == "get_linestyle" else "")
            for line in lines
        ]
        assert len(set(seen)) == len(lines)


def test_a_band_is_the_mean_between_the_least_and_the_greatest_seed() -> None:
    _, ax = figure()
    band(ax, [0, 1], [[1, 2], [3, 2], [2, 5]], "LoRA")
    assert ax.lines[0].get_ydata().tolist() == [2, 3]
    edges = ax.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in edges.tolist()} == {(0, 1), (0, 3), (1, 2), (1, 5)}
    with pytest.raises(ValueError, match="one row a seed of 2 points"):
        band(ax, [0, 1], [1, 2], "LoRA")


def test_bars_are_means_with_the_range_of_the_seeds() -> None:
    _, ax = figure()
    bars(
        ax,
        {"bible": {"LoRA": [1.0, 3.0], "QLoRA": 2.5}, "python": {"LoRA": 4.0}},
        "bits a byte",
        values=".1f",
    )
    heights = [
        [bar.get_height() for bar in group] for group in ax.containers if hasattr(group, "patches")
    ]
    assert heights[0] == [2.0, 4.0]
    assert heights[1][0] == 2.5 and np.isnan(heights[1][1])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["bible", "python"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["LoRA", "QLoRA"]
    assert ax.get_ylabel() == "bits a byte"
    ranges = [segment for group in ax.collections for segment in group.get_segments()]
    assert any(np.allclose(sorted(segment[:, 1]), [1, 3]) for segment in ranges)
    assert ax.patches[0].get_hatch() != ax.patches[2].get_hatch()
