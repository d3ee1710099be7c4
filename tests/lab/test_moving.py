"""Figures that move: every frame is what the cell computed, ranges hold over all frames, bad input is refused."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from lora_course.lab import moving, still

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
    "panel",
    [
        moving.line([1, 2], {"a": [1, 2]}, "x", "y", log="xy", at=1),
        moving.bars({"a": {"p": 1.0, "q": -2.0}, "b": {"p": 0.5, "q": 1.0}}, "y"),
        moving.heat([[0.1, None], [0.2, 0.9]], ["long name", "b"], [1, 2], "R", "x", "y"),
        moving.points({"LoRA": (1, 2), "ours": (3, 4)}, "x", "y", chosen=["ours"]),
        moving.tokens(["a$", " b"], [[0.9, 0.1], [0.2, 0.8]], ["x", "y"]),
        moving.table(["", "w"], [["mean", 0.25], ["trim", 1]], marked=[(0, 1)]),
    ],
    ids=lambda panel: panel["kind"],
)
def test_every_kind_has_a_still_form(panel, shown) -> None:
    moving.show({"k": [1, 2]}, lambda _: [panel], "one kind")
    assert len(base64.b64decode(shown[0]["image/png"])) > 1000


@pytest.mark.parametrize(
    ("panel", "words"),
    [
        (moving.line([1, 2], {"a": [1, 2.5]}, "x", "y"), "a from 1 to 2.5"),
        (moving.line([1, 2], {"a": [1, 2.5]}, "x", "y", at=2), "a 2.5"),
        (moving.bars({"NF4": 0.091}, "y"), "NF4 0.091"),
        (moving.bars({"NF4": {"error": 0.5}}, "y"), "NF4 error 0.5"),
        (moving.points({"LoRA": (1, 2)}, "x", "y", chosen=["LoRA"]), "LoRA"),
        (moving.table(["", "w"], [["mean", 1]]), "mean 1"),
    ],
)
def test_a_frame_without_a_sentence_is_put_in_words(panel, words) -> None:
    assert still.spoken(panel) == words


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
