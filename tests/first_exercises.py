"""What holds for every exercise. A chapter's test file imports these and states answers by check in WRONG and RIGHT."""

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("wrong", "right"):
        if name in metafunc.fixturenames:
            answers = getattr(metafunc.module, name.upper())
            metafunc.parametrize(
                ("check", name), answers.items(), ids=[check.__name__ for check in answers]
            )


def test_wrong_answers_are_rejected_with_messages_of_their_own(check, wrong) -> None:
    results = [check(answer) for answer in wrong]
    assert len(results) >= 2 and [result.status for result in results] == ["wrong"] * len(results)
    assert len({result.message for result in results}) == len(results)
    assert not any("It stopped with" in result.message for result in results)


def test_right_answers_pass_and_stubs_are_not_attempted(check, right) -> None:
    assert len(right) >= 1 and [check(answer).status for answer in right] == ["right"] * len(right)

    def stub(*arguments, **keywords): ...

    def unwritten(*arguments, **keywords):
        raise NotImplementedError

    assert [check(learner).status for learner in (None, unwritten)] == ["not attempted"] * 2
    # To a function that is meant to return nothing, a stub is one that does nothing.
    assert check(stub).status == "not attempted" or "Nothing has happened" in check(stub).message
