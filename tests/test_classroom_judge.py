"""Verdicts on stubs, wrong and right answers, and what holds for every check."""

import random

import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from torch import nn

from lora_course.classroom import exercises, judge
from lora_course.classroom.calls import Answer
from lora_course.classroom.exercises import Draw, case, exercise, mistake


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "EXERCISES", {})


@pytest.fixture
def check():
    """What to do with two vectors: a weighted sum, its gradient included."""

    def right(x, y, weight=1.0):
        return x + weight * y

    @exercise(
        "0.0-sum",
        points=2,
        right=right,
        gradients=("x",),
        otherwise="This is no weighted sum.",
        mistakes={
            "The weight is not used.": lambda x, y, weight=1.0: x + y,
            "y is missing.": lambda x, y, weight=1.0: x * 1,
        },
    )
    def check_sum(draw: Draw):
        for _ in range(2):
            n = draw.integer(2, 9)
            yield case(draw.normal(n), draw.normal(n))
            yield case(draw.normal(n), draw.normal(n), 3.0, hint="It goes wrong with a weight.")
        yield case(torch.zeros(0), torch.zeros(0), 2.0, hint="Empty vectors go wrong.")

    return check_sum


def _not_implemented(*_):
    raise NotImplementedError("your turn")


@pytest.mark.parametrize("stub", [None, ..., _not_implemented, lambda *_: None, lambda *_: ...])
def test_an_untouched_stub_is_not_answered_yet_and_does_not_raise(check, stub, capsys) -> None:
    result = check(stub)
    assert (result.status, result.points) == ("not attempted", 0)
    assert capsys.readouterr().out.startswith("– 0.0-sum: not answered yet")


@pytest.mark.parametrize(
    "answer",
    [
        lambda x, y, weight=1.0: x + weight * y,
        lambda a, b, c=1: torch.add(a, b, alpha=c),
        lambda x, y, *, weight=1.0: x + weight * y,
        lambda *, x, y, weight=1.0: x + weight * y,
        lambda *a: a[0] + (a[2] if len(a) > 2 else 1) * a[1],
        lambda x, y, weight=1.0: x.double() + weight * y.double(),
        lambda x, y, weight=1.0: (x + weight * y).bfloat16(),
        lambda x, y, weight=1.0: x.bfloat16() + weight * y.bfloat16(),
    ],
)
def test_right_answers_of_any_form_get_the_points_and_a_tick(check, answer, capsys) -> None:
    for seed in range(5):
        result = check(answer, seed)
        assert (result.status, result.points, result.seed) == ("right", 2, seed), result.message
    assert capsys.readouterr().out.startswith("✓ 0.0-sum: right\n")


def test_a_cell_that_ends_with_a_check_shows_its_result_once(check, capsys) -> None:
    result = check(lambda x, y, weight=1.0: x + weight * y)
    assert capsys.readouterr().out == "✓ 0.0-sum: right\n"
    displayed, _ = DisplayFormatter().format(result)
    assert displayed == {} and capsys.readouterr().out == ""


def test_a_mistake_is_named_only_where_it_explains_every_case(check) -> None:
    assert check(lambda x, y, weight=1.0: x + y).message == "The weight is not used."
    assert check(lambda x, y, weight=1.0: x.clone()).message == "y is missing."
    # the same number in the first case of another mistake: not accused of it
    assert (
        check(lambda x, y, weight=1.0: x + weight**2 * y).message == "It goes wrong with a weight."
    )
    assert check(lambda x, y, weight=1.0: x - weight * y).message == "This is no weighted sum."


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x, y, weight=1.0: x / 0 if isinstance(x, int) else [][0], "stops in line"),
        (lambda x, y, weight=1.0: exit(), "SystemExit"),
        (lambda x: x, "takes (x); it is called with (x, y)"),
        (7, "A function is expected"),
        (lambda x, y, weight=1.0: "text", "has no gradient"),
        (lambda x, y, weight=1.0: (x + weight * y).detach(), "has no gradient"),
        (lambda x, y, weight=1.0: x.detach() + weight * y + 0 * x, "no weighted sum"),
        (lambda x, y, weight=1.0: (x + weight * y)[:-1], "shape"),
        (lambda x, y, weight=1.0: (x + weight * y) * float("nan"), "no weighted sum"),
        (lambda x, y, weight=1.0: y.add_(0.5) + x, "changed what it was given (y)"),
        (lambda x, y, weight=1.0: (torch.manual_seed(0), x + weight * y)[1], "random state"),
        (lambda x, y, weight=1.0: (random.random(), x + weight * y)[1], "Python's random state"),
        (lambda x, y, weight=1.0: (np.random.seed(1), x + weight * y)[1], "numpy's random state"),
        (lambda x, y, weight=1.0: (torch.set_default_dtype(torch.float64), x + weight * y)[1], "default dtype"),
        (lambda x, y, weight=1.0: (x + weight * y, torch.set_grad_enabled(False))[0], "gradient mode"),
        (lambda x, y, weight=1.0: x + weight * y if len(x) else None, "returns nothing (None)"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_and_put_back(check, answer, words) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    result = check(answer, seed=1)
    assert result.status == "wrong" and words in result.message
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tobytes() == before[2]


def test_a_function_that_replaces_the_frame_gains_nothing(check) -> None:
    originals = judge.difference, exercises.mistake, torch.allclose

    def patches(x, y, weight=1.0):
        judge.difference = lambda *a, **k: None
        exercises.mistake = lambda *a: None
        torch.allclose = lambda *a, **k: True
        return x

    result = check(patches)
    assert result.status == "wrong" and "classroom" in result.message
    assert (judge.difference, exercises.mistake, torch.allclose) == originals


def test_inputs_are_new_at_every_run_and_those_of_a_seed_can_be_had_again(check) -> None:
    seen = []

    def remembers(x, y, weight=1.0):
        seen.append(x.tolist())
        return x + weight * y

    check(remembers), check(remembers)
    half = len(seen) // 2
    assert seen[:half] != seen[half:]
    seen.clear()
    check(remembers, seed=7), check(remembers, seed=7)
    assert seen[:5] == seen[5:]


def test_what_changes_in_place_is_compared_and_nothing_else_may() -> None:
    def right(items, extra):
        items.append(extra[0])

    @exercise("0.0-append", right=right, changes=("items",))
    def check_append(draw: Draw):
        yield case([draw.integer(0, 9)], [draw.integer(10, 19)])

    def pops(items, extra):
        items.append(extra.pop())

    assert check_append(right).status == "right"
    assert check_append(lambda items, extra: items).status == "wrong"
    assert "extra" in check_append(pops).message


def test_layers_are_watched_and_a_returned_one_may_not_share_memory() -> None:
    def right(layer):
        made = nn.Linear(layer.in_features, layer.out_features, bias=False)
        made.weight.data = 2 * layer.weight.data
        return made

    def used(found, layer, note):
        mistake(not isinstance(found, nn.Linear), "No layer, but a {}.", type(found).__name__)
        return found(note)

    @exercise("0.0-double", right=right, look=used, fresh=True, draws=True)
    def check_double(draw: Draw):
        inputs, outputs = draw.sizes(2, 2, 9)
        layer = nn.Linear(inputs, outputs, bias=False)
        layer.weight.data = draw.normal(outputs, inputs)
        yield case(layer, note=draw.normal(3, inputs))

    def leaves(change):
        def answer(layer):
            made = right(layer)
            change(layer)
            return made

        return answer

    assert check_double(right).status == "right"
    assert check_double(lambda layer: 3).message == "No layer, but a int."
    assert "shares its memory" in check_double(lambda layer: layer).message
    for change in (nn.Module.eval, lambda m: m.requires_grad_(False), lambda m: setattr(m, "x", 1),
                   lambda m: m.weight.data.add_(1), lambda m: m.register_forward_hook(print),
                   lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.clone()))):  # fmt: skip
        assert "changed what it was given (layer" in check_double(leaves(change)).message


def test_a_way_that_the_text_forbids_by_its_size_is_refused() -> None:
    @exercise("0.0-thin", right=lambda A, B: (B * A.T).sum())
    def check_trace(draw: Draw):
        yield case(draw.normal(3, 50), draw.normal(50, 3), largest=400)

    assert check_trace(lambda A, B: (B @ A).trace()).status == "wrong"
    assert check_trace(lambda A, B: (A @ B).trace()).status == "right"

    @exercise("0.0-through", right=lambda g, W: g @ W.T)
    def check_through(draw: Draw):
        yield case(draw.normal(3, 50), draw.normal(40, 50), largest=400)

    # a view of what was given takes no memory, a copy does
    assert check_through(lambda g, W: torch.nn.functional.linear(g, W)).status == "right"
    assert check_through(lambda g, W: g @ W.T.contiguous()).status == "wrong"


def test_an_answer_may_live_elsewhere(check) -> None:
    class Elsewhere(Answer):
        def call(self, arguments, draws=False, largest=None):
            sent = {
                k: v.detach().clone() if torch.is_tensor(v) else v for k, v in arguments.items()
            }
            back = super().call(sent, draws, largest)
            return back + arguments["x"] - arguments["x"].detach()  # and a gradient of its own

    assert check(Elsewhere(lambda x, y, weight=1.0: x + weight * y)).status == "right"
    assert check(Elsewhere(lambda x, y, weight=1.0: x + y)).message == "The weight is not used."
