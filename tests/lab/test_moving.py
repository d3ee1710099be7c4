"""Figures that move: every frame is what the cell computed, ranges hold over all frames, bad input is refused."""

import base64
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_course.lab import moving
from tests import chromium

ERRORS = {(16, "NF4"): [0.1, 0.2], (16, "FP4"): [0.3, 0.5], (64, "NF4"): [1.5, 2.0], (64, "FP4"): [4.0, 8.0]}  # fmt: skip
CONTROLS = {"block size": [16, 64], "format": ["NF4", "FP4"]}


def frame(block, kind):
    return [
        moving.line([0, 5], {kind: np.array(ERRORS[block, kind])}, "outliers, %", "error"),
        moving.bars({"bits": 4 + 8 / block}, "bits"),
        f"{kind} at {block}",
    ]


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    monkeypatch.setattr(moving, "display", lambda output: outputs.append(output.forms))
    return outputs


def test_each_frame_is_found_at_its_controls_and_holds_what_was_computed() -> None:
    data = moving.figure_data(CONTROLS, frame)
    for place, values in [((0, 1), (16, "FP4")), ((1, 0), (64, "NF4"))]:
        curve, bits = moving._panels(data, place)
        assert curve["series"] == {values[1]: ERRORS[values]}
        assert bits["groups"] == {"bits": {"": 4 + 8 / values[0]}}
        assert data["said"][moving._place(data, place)] == f"{values[1]} at {values[0]}"
    assert [control["slider"] for control in data["controls"]] == [True, False]


def test_equal_panels_are_stored_once() -> None:
    data = moving.figure_data(CONTROLS, frame)
    assert len(data["frames"]) == 4 and len(data["panels"]) == 4 + 2  # bits don't know the format


def test_axes_span_all_frames_so_that_they_can_be_compared() -> None:
    lines, bars = moving.figure_data(CONTROLS, frame)["limits"]
    assert lines["x"] == [0, 5] and lines["y"] == [0.1, 8.0]
    assert bars["y"] == [0, 4.5]  # bars start at zero
    heat = moving.figure_data(
        {"after": [1, 2]}, lambda k: [moving.heat([[k, None], [-3, 1]], "ab", "cd", "R")]
    )
    assert heat["limits"] == [{"z": [-3, 2]}]


def test_the_output_stands_alone_and_has_a_still_form(shown) -> None:
    moving.show(CONTROLS, frame, "errors </script> by block", "See <this>.", "1.1-2", start=[1, 0])
    (forms,) = shown
    page = forms["text/html"]
    assert 'id="figure-1-1-2"' in page and "<b>Figure 1.1-2.</b> See &lt;this&gt;." in page
    assert "https://" not in page and "src=" in page and 'alt="errors &lt;/script&gt; by' in page
    data = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data) == moving.figure_data(CONTROLS, frame, [1, 0])
    assert moving.script() in page and "<style data-lab>" in page
    still_form = Image.open(io.BytesIO(base64.b64decode(forms["image/png"])))
    colours = np.asarray(still_form.convert("RGB")).reshape(-1, 3)
    assert still_form.width > 1000 and len(np.unique(colours, axis=0)) > 10
    assert forms["text/plain"].startswith("[figure] errors")


def test_a_script_in_the_data_cannot_end_the_figures_own(shown) -> None:
    moving.show(
        {"k": [1, 2]},
        lambda k: [moving.table(["", "v"], [["</script><b>", k]])],
        "a table",
    )
    assert "<\\/script><b>" in shown[0]["text/html"]


@pytest.mark.parametrize(
    ("controls", "made", "message"),
    [
        ({}, lambda: [], "at least one control"),
        ({"k": [1]}, lambda k: [moving.bars({"a": 1}, "y")], "two or more"),
        ({"k": [1, 2]}, lambda k: [moving.bars({"a": float("nan")}, "y")], "nan; expected finite"),
        ({"k": [1, 2]}, lambda k: ["words alone"], "at least one"),
        (
            {"k": [1, 2]},
            lambda k: [moving.bars({"a": 1}, "y")] * k,
            r"frame\(2,\) has the panels \['bars', 'bars'\]; expected \['bars'\]",
        ),
        (
            {"k": [0, 2]},
            lambda k: [moving.line([1, 2], {"a": [k, 1]}, "x", "y", log="y")],
            "logarithmic y axis holds 0",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(controls, made, message) -> None:
    with pytest.raises(ValueError, match=message):
        moving.figure_data(controls, made)


def test_too_much_data_is_refused_before_it_bloats_the_page(shown, monkeypatch) -> None:
    monkeypatch.setattr(moving, "MOST", 100)
    with pytest.raises(ValueError, match="at most 100"):
        moving.show(CONTROLS, frame, "errors")


KINDS = {
    "line": lambda k: moving.line([1, 10], {"a": [k, 2.5], "b": [3, 4]}, "x", "y", log="x", at=10),
    "bars": lambda k: moving.bars({"a": {"p": k, "q": -2}, "b": {"p": 0.5, "q": 1}}, "y"),
    "heat": lambda k: moving.heat([[k, None], [0.25, 0.5]], "ab", "cd", "R", "x", "y"),
    "points": lambda k: moving.points({"LoRA": (1, k), "ours": (3, 7)}, "x", "y", ["ours"]),
    "tokens": lambda k: moving.tokens(["a<", " b"], [[k / 4, 0.1], [0.2, 0.8]], "xy", picks="k"),
    "table": lambda k: moving.table(["", "w"], [["mean", k]], marked=[(0, 1)]),
}
VALUES = {  # what each kind says it draws, in order, at k = 1 and k = 2
    "line": "{k} 2.5 3 4",
    "bars": "{k} -2 0.5 1",
    "heat": "{k} 0.25 0.5",
    "points": "{k} 7",
    "tokens": "{quarter},0.1 0.2,0.8",
    "table": "mean {k}",
}


@pytest.fixture(scope="module")
def browser(chromium_process: chromium.Chromium) -> Iterator[chromium.Browser]:
    browser = chromium.Browser(chromium_process)
    yield browser
    browser.close()


def opened(browser: chromium.Browser, folder: Path, body: str, width: int = 700) -> None:
    page = folder / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><body>{body}')  # fmt: skip
    browser.size(width, 900, mobile=width < 500)
    browser.open(page.as_uri())
    browser.wait(
        "!document.querySelector('script[data-lab]') || document.querySelector('.panels [data-value], .panels td, .panels span')"
    )


DRAWN = "[...document.querySelectorAll('.panels [data-value]')].map(e => e.dataset.value).join(' ')"


def press(browser: chromium.Browser, key: str, code: int) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)  # fmt: skip


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_it_draws_moves_by_keyboard_and_shows_the_cells_values(
    kind, browser, shown, tmp_path
) -> None:
    moving.show({"k": [1, 2]}, lambda k: [KINDS[kind](k), f"k is {k}"], "a figure")
    opened(browser, tmp_path, shown[0]["text/html"])
    assert browser.evaluate(DRAWN) == VALUES[kind].format(k=1, quarter=0.25)
    assert browser.evaluate("document.querySelector('.said').textContent") == "k is 1"
    browser.evaluate("document.querySelector('input[type=range]').focus()")
    press(browser, "ArrowRight", 39)
    assert browser.evaluate(DRAWN) == VALUES[kind].format(k=2, quarter=0.5)
    assert browser.evaluate("document.querySelector('.said[aria-live=polite]').textContent") == "k is 2"  # fmt: skip
    assert browser.evaluate("document.querySelector('input').getAttribute('aria-valuetext')") == "2"
    assert not browser.errors


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 700])
def test_names_of_points_on_top_of_each_other_do_not_cover_each_other(
    width, browser, shown, tmp_path
) -> None:
    places = {f"method {i}": (0.01 * i, 0.0) for i in range(8)} | {"far": (1.0, 1.0)}
    moving.show({"k": [1, 2]}, lambda k: [moving.points(places, "x", "y", list(places))], "a figure")  # fmt: skip
    opened(browser, tmp_path, shown[0]["text/html"], width)
    names = "[...document.querySelectorAll('.panels text[font-weight=bold]')]"
    drawn = json.loads(browser.evaluate(f"JSON.stringify({names}.map(e => [e.textContent, ...Object.values(e.getBoundingClientRect().toJSON())]))"))  # fmt: skip
    rooms = {name: (x, y, x + wide, y + tall) for name, x, y, wide, tall, *_ in drawn}
    assert 3 <= len(rooms) < len(places) and "far" in rooms
    inside = 2  # pixels by which boxes of lines of text may meet: letters don't fill them
    for a, b in itertools.combinations(rooms.values(), 2):
        assert min(a[2], b[2]) - max(a[0], b[0]) < inside or min(a[3], b[3]) - max(a[1], b[1]) < 2 * inside  # fmt: skip


@pytest.mark.browser
def test_a_bar_is_as_tall_as_its_value(browser, shown, tmp_path) -> None:
    moving.show({"k": [1, 2]}, lambda k: [moving.bars({"a": k, "b": 4 * k}, "y")], "bars")
    opened(browser, tmp_path, shown[0]["text/html"])
    heights = (
        "[...document.querySelectorAll('rect[data-value]')].map(e => +e.getAttribute('height'))"
    )
    a, b = browser.evaluate(heights)
    assert b == pytest.approx(4 * a, rel=1e-3) and a > 10
    browser.evaluate(
        "(i => { i.value = 1; i.dispatchEvent(new Event('input', {bubbles: true})) })(document.querySelector('input'))"
    )
    assert browser.evaluate(heights) == pytest.approx([2 * a, 2 * b], rel=1e-3)  # one scale for all


@pytest.mark.browser
@pytest.mark.parametrize(
    ("values", "ticks"),
    [([2, 8, 64], ["2", "5", "10", "20", "50"]), ([1, 10, 1000], ["1", "10", "100", "1000"])],
)
def test_a_logarithmic_axis_has_round_ticks(browser, shown, tmp_path, values, ticks) -> None:
    """Powers of ten, or 1, 2 and 5 where there are too few of them."""
    moving.show(
        {"k": [1, 2]},
        lambda k: [moving.line(values, {"a": [k, 2, 3]}, "x", "above zero", log="x")],
        "a line",
        "c",
        "1.1-1",
    )
    opened(browser, tmp_path, shown[0]["text/html"])
    middle = (
        "[...document.querySelectorAll('svg text[text-anchor=middle]')].map(t => t.textContent)"
    )
    assert browser.evaluate(middle)[:-1] == ticks  # the last one is the axis' name


@pytest.mark.browser
def test_two_controls_and_a_click_on_a_token(browser, shown, tmp_path) -> None:
    texts = ["one", " two", " three"]

    def routed(block, token):
        rows = [[block / 10 + i / 100, 0.1] for i in range(3)]
        return [moving.tokens(texts, rows, ["x", "y"], picks="token"), moving.bars({"x": rows[token - 1][0]}, "gate")]  # fmt: skip

    moving.show({"block": [1, 2], "token": [1, 2, 3]}, routed, "gates", start=[1, 0])
    opened(browser, tmp_path, shown[0]["text/html"])
    bar = "document.querySelector('rect[data-value]').dataset.value"
    assert browser.evaluate(bar) == "0.2"
    browser.evaluate("document.querySelectorAll('.tokens span')[2].click()")
    assert browser.evaluate(bar) == "0.22"
    assert browser.evaluate("document.querySelector('.tokens .here').textContent") == " three"
    assert browser.evaluate("document.querySelectorAll('output')[1].textContent") == "3"


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_its_page_and_its_letters_stay_readable(browser, shown, tmp_path, width) -> None:
    moving.show(CONTROLS, frame, "errors")
    opened(browser, tmp_path, shown[0]["text/html"], width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    letters = "[...document.querySelectorAll('.panels svg text')].map(e => e.getBoundingClientRect().height)"
    assert min(browser.evaluate(letters)) >= 11


@pytest.mark.browser
def test_the_still_is_for_paper_and_for_pages_without_scripts(browser, shown, tmp_path) -> None:
    moving.show(CONTROLS, frame, "errors")
    seen = "[...document.querySelectorAll('.still, .live')].map(e => e.offsetHeight > 50)"
    opened(browser, tmp_path, shown[0]["text/html"])
    assert browser.evaluate(seen) == [False, True]
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate(seen) == [True, False]
    browser.call("Emulation.setEmulatedMedia", media="")
    opened(browser, tmp_path, re.sub(r"<script data-lab>.*?</script>", "", shown[0]["text/html"], flags=re.DOTALL))  # fmt: skip
    assert browser.evaluate(seen) == [True, False]
