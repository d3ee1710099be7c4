"""One call of a learner's function: how it is called, and how its errors are told."""

import pytest
import torch

from lora_course.classroom.calls import Answer, Mistake, Unanswered


def test_arguments_go_by_position_as_far_as_they_can_and_by_name_else() -> None:
    arguments = {"a": 1, "b": 2, "c": 3}
    for function in (
        lambda x, y, z: (x, y, z),
        lambda *, c, b, a: (a, b, c),
        lambda x, *, c, b: (x, b, c),
        lambda *all: all,
        lambda **named: (named["a"], named["b"], named["c"]),
    ):
        assert Answer(function).call(arguments) == (1, 2, 3)
    with pytest.raises(Mistake, match=r"takes \(x\); it is called with \(a, b, c\)"):
        Answer(lambda x: x).call(arguments)


def test_a_stub_is_no_mistake_but_an_error_of_torch_is() -> None:
    def unwritten():
        raise NotImplementedError

    def half():
        raise NotImplementedError("\"addmm\" not implemented for 'Half'")

    for stub in (None, ..., unwritten):
        with pytest.raises(Unanswered):
            Answer(stub).call({})
    with pytest.raises(Mistake, match="not implemented for 'Half'"):
        Answer(half).call({})


def test_an_error_is_told_in_one_sentence_with_the_learners_line() -> None:
    def inner(x):
        return x @ torch.ones(7, 7)

    def answer(x):
        y = x + 1
        return inner(y)

    with pytest.raises(Mistake) as told:
        Answer(answer).call({"x": torch.ones(2, 3)})
    text = str(told.value)
    assert "`return x @ torch.ones(7, 7)`" in text and "RuntimeError" in text
    assert (
        "\n" not in text and text.endswith(".") and str(inner.__code__.co_firstlineno + 1) in text
    )


def test_an_interrupt_reaches_the_reader() -> None:
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Answer(interrupted).call({})


def test_drawing_is_allowed_where_it_is_said_and_seeding_never() -> None:
    Answer(lambda: torch.rand(1)).call({}, draws=True)
    for function in (lambda: torch.manual_seed(3), lambda: torch.rand(1)):
        with pytest.raises(Mistake, match="torch's random state"):
            Answer(function).call({}, draws=function.__code__.co_names[-1] == "manual_seed")
