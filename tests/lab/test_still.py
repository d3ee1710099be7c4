"""The still form of figures that move."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from lora_course.lab import moving, still


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
def test_every_kind_has_a_still_form(panel) -> None:
    data = moving.figure_data({"k": [1, 2]}, lambda k: [panel])
    picture = still.picture([("k 1", data["panels"])], data["limits"])
    drawn = Image.open(io.BytesIO(base64.b64decode(picture.data))).convert("L")
    assert drawn.width == 1050 and np.mean(np.asarray(drawn) < 128) > 1e-3


def test_a_matrix_of_many_columns_names_its_rows_and_the_columns_that_have_a_name() -> None:
    names = ["", "1", "", "", "2", ""] * 2
    panel = moving.heat([[1.0] * 12, [0.5] * 12], ["q", "k"], names, "R")
    _, ax = plt.subplots()
    still.DRAW["heat"](ax, panel, {"z": [0.5, 1.0]})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["q", "k"]
    assert [int(tick) for tick in ax.get_xticks()] == [1, 4, 7, 10]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "1", "2"]
    assert not ax.texts  # numbers stand in few cells only
    plt.close()


def test_names_of_points_on_top_of_each_other_do_not_cover_each_other() -> None:
    places = {f"method {i}": (0.01 * i, 0.0) for i in range(8)} | {"far": (1.0, 1.0)}
    figure, ax = plt.subplots()
    still.DRAW["points"](ax, moving.points(places, "x", "y", list(places)), {"x": [0, 1], "y": [0, 1]})  # fmt: skip
    rooms = {words.get_text(): words.get_window_extent() for words in ax.texts}
    assert 3 <= len(rooms) < len(places) and "far" in rooms
    pairs = [(a, b) for a in rooms for b in rooms if a < b]
    assert not [pair for pair in pairs if rooms[pair[0]].overlaps(rooms[pair[1]])]
    assert rooms["far"].x1 <= figure.bbox.x1
    plt.close()


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
