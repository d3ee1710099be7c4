"""The frame of exercises: what it says of stubs, wrong and right answers."""

import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from torch import nn

from lora_course.classroom import first_exercises as exercises
from lora_course.classroom.first_exercises import exercise, grade, mistake


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "EXERCISES", {})


@pytest.fixture
def check():
    @exercise("0.0-square", points=2)
    def check_square(learner) -> None:
        mistake(
            learner(3) == 6, "{} doubled 3; squaring multiplies it by itself.", learner.__name__
        )
        mistake(learner(3) != 9, "3 squared is 9, not {}.", learner(3))

    return check_square


def _not_implemented(x):
    raise NotImplementedError("your turn")


def _passes(x):
    pass


@pytest.mark.parametrize("stub", [None, ..., _not_implemented, _passes, lambda x: ...])
def test_an_untouched_stub_is_not_attempted_and_does_not_raise(check, stub, capsys) -> None:
    result = check(stub)
    assert (result.status, result.points) == ("not attempted", 0)
    assert "not attempted" in capsys.readouterr().out


def test_a_right_answer_gets_the_points_and_a_tick(check, capsys) -> None:
    result = check(lambda x: x**2)
    assert (result.status, result.points) == ("right", 2)
    assert capsys.readouterr().out.startswith("✓ 0.0-square: right")


def test_a_cell_that_ends_with_a_check_shows_its_result_once(check, capsys) -> None:
    result = check(lambda x: x * x)
    assert capsys.readouterr().out == "✓ 0.0-square: right\n"
    displayed, _ = DisplayFormatter().format(result)
    assert displayed == {} and capsys.readouterr().out == ""


def test_wrong_answers_get_different_messages_that_name_the_mistake(check, capsys) -> None:
    def doubled(x):
        return 2 * x

    first, second = check(doubled), check(lambda x: x**3)
    assert (first.status, second.status, first.points) == ("wrong", "wrong", 0)
    assert first.message == "doubled doubled 3; squaring multiplies it by itself."
    assert second.message == "3 squared is 9, not 27."
    assert "3 squared is 9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda x: x / 0, "ZeroDivisionError"),
        (lambda x, y: x, "TypeError"),
        (lambda x: exit(), "SystemExit"),
        (7, "TypeError"),
    ],
)
def test_an_answer_that_stops_is_wrong_and_the_error_is_named(check, answer, word) -> None:
    result = check(answer)
    assert result.status == "wrong"
    assert word in result.message


def test_an_error_of_torch_for_a_dtype_is_a_mistake_not_a_stub(check) -> None:
    def answer(x):
        raise NotImplementedError("\"addmm\" not implemented for 'Half'")

    assert check(answer).status == "wrong"


def test_a_function_that_works_in_place_may_return_nothing() -> None:
    @exercise("0.0-zero", in_place=True)
    def check_zero(learner) -> None:
        x = torch.ones(2)
        learner(x)
        mistake(bool(x.any()), "x is unchanged.")

    assert check_zero(lambda x: None).status == "wrong"

    def zeroed(x) -> None:
        x.zero_()

    assert check_zero(zeroed).status == "right"


def test_modules_and_classes_reach_the_check_as_they_are() -> None:
    @exercise("0.0-module")
    def check_module(learner) -> None:
        mistake(
            not isinstance(learner, nn.Module) and not issubclass(learner, nn.Module),
            "That is no module.",
        )

    assert check_module(nn.Linear(2, 2)).status == "right"
    assert check_module(nn.Linear).status == "right"


def test_a_taken_id_is_refused_but_the_same_check_may_be_defined_again() -> None:
    def define():
        @exercise("0.0-again")
        def check_again(learner) -> None: ...

    define()
    define()
    with pytest.raises(ValueError, match="0.0-again.*defined already"):

        @exercise("0.0-again")
        def check_other(learner) -> None: ...


def test_grading_runs_the_same_checks_and_refuses_unknown_ids(check) -> None:
    assert grade({"0.0-square": lambda x: x * x})["0.0-square"].points == 2
    assert grade({})["0.0-square"].status == "not attempted"
    with pytest.raises(ValueError, match="0.0-cube.*0.0-square"):
        grade({"0.0-cube": abs})
