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
def shown(monkeypatch) -> list[dict[str, str]]:
    outputs: list[dict[str, str]] = []
    monkeypatch.setattr(plots, "display", lambda output: outputs.append(output.forms))
    return outputs


def test_the_shown_figure_carries_its_alt_text_number_and_caption(shown) -> None:
    fig, ax = figure()
    ax.plot([1, 2], [3, 4])
    show(fig, 'Loss falls from 4 to 3 & stays "low"', "It falls < 4.", "2.1-3")
    (forms,) = shown
    page = forms["text/html"]
    assert page.count('aria-label="Loss falls from 4 to 3 &amp; stays &quot;low&quot;"') == 2
    assert 'id="figure-2-1-3"' in page
    assert "<figcaption><b>Figure 2.1-3.</b> It falls &lt; 4.</figcaption>" in page
    assert forms["text/plain"].startswith("[figure] Loss falls")
    assert not plt.get_fignums()  # or a notebook would show it a second time


def test_a_caption_names_panels_by_where_they_stand_on_a_phone_too(shown) -> None:
    fig, _ = figure(1, 2)
    show(
        fig,
        "two curves",
        "Left: it falls. Right, it rises. Further left is better; Left of zero too.",
    )
    page = shown[0]["text/html"]
    assert '<span data-column="Above">Left</span>: it falls.' in page
    assert '<span data-column="Below">Right</span>, it rises.' in page
    assert page.count("data-column=") == 2  # the others are directions
    assert "content: attr(data-column)" in page  # where no other style sheet is


def test_paper_gets_a_sharp_figure_on_white(shown) -> None:
    show(figure()[0], "nothing")
    picture = Image.open(io.BytesIO(base64.b64decode(shown[0]["image/png"])))
    assert picture.size == (1050, 540)
    assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_on_a_page_black_and_grey_follow_the_text_and_the_ground_is_transparent(shown) -> None:
    fig, ax = figure()
    ax.add_patch(plt.Rectangle((0, 0), 1, 1, facecolor="#EEEEEE", edgecolor="black"))
    ax.plot([0, 1], [0, 1], color=plots.PALETTE[0])
    show(fig, "a box")
    page = shown[0]["text/html"]
    assert "#0072b2" in page
    assert not re.search(r"#000000|#eeeeee|#dddddd|fill: #ffffff", page)
    assert "fill: color-mix(in srgb, currentColor 7%, transparent)" in page  # 17 of 255


def test_black_on_a_coloured_cell_stays_black_in_the_dark(shown) -> None:
    fig, ax = figure()
    ax.imshow([[0.1, 0.2]], cmap="Blues")
    ax.text(0, 0, "0.1", color="black")
    show(fig, "a matrix")
    assert plots.FIXED in shown[0]["text/html"]


@pytest.mark.parametrize(
    ("rows", "columns", "stacked"), [(1, 1, True), (1, 2, True), (2, 1, False), (2, 2, False)]
)
def test_a_row_of_panels_is_a_column_on_a_phone(shown, rows, columns, stacked) -> None:
    show(figure(rows, columns, height=3.6)[0], "panels")
    page = shown[0]["text/html"]
    sizes = [tuple(map(float, box)) for box in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', page)]
    assert sizes[0] == pytest.approx((7 * 72, 3.6 * 72))
    assert len(sizes) == 1 + stacked and page.count("display:none") == stacked
    if stacked:
        assert 4 * 72 < sizes[1][0] < 5 * 72 and sizes[1][1] >= 2.2 * 72 * columns


def test_panels_that_share_their_rows_name_them_one_by_one_on_a_phone(shown) -> None:
    fig, axes = figure(1, 2, sharey=True)
    axes[0].set_yticks([0, 1], ["first row", "second row"])
    show(fig, "two panels, one set of rows")
    page = shown[0]["text/html"]  # words are paths, each beside a comment that says them
    assert page.count("<!-- first row -->") == 1 + 2


def test_words_beside_a_point_keep_their_distance_on_a_phone() -> None:
    fig, ax = figure()
    ax.plot([1, 2], [1, 2])
    plots.beside(ax, 1, 1, "one")

    def distance() -> float:
        fig.canvas.draw()
        return ax.texts[0].get_window_extent().x0 - ax.transData.transform((1, 1))[0]

    wide = distance()
    assert wide > 5 and plots.stack(fig)
    assert distance() == pytest.approx(wide, abs=1)  # pixels; in units of the data it doubles


def test_a_colour_bar_keeps_its_figure_in_one_piece(shown) -> None:
    fig, ax = figure()
    fig.colorbar(ax.imshow([[0, 1]]), ax=ax)
    show(fig, "a matrix with its scale")
    assert "narrow" not in shown[0]["text/html"].split("</style>")[1]


def test_a_legend_wider_than_a_phone_is_not_cut_off(shown) -> None:
    fig, ax = figure()
    for name in ("a long name", "another long name", "a third name", "the last of them"):
        ax.plot([0, 1], [0, 1], label=name)
    ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    show(fig, "four lines")
    narrow = float(re.findall(r'viewBox="0 0 ([\d.]+)', shown[0]["text/html"])[1])
    assert narrow > 6 * 72


def test_no_two_figures_share_an_id(shown) -> None:
    for _ in range(2):
        show(figure()[0], "the same twice")
    ids = re.findall(r'\bid="([^"]+)"', "".join(forms["text/html"] for forms in shown))
    assert len(ids) > 20 and len(set(ids)) == len(ids)


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
