"""How a check is made, and how those of a learner are run together."""

import pytest

from lora_course.classroom import exercises
from lora_course.classroom.exercises import Draw, case, exercise, grade


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "EXERCISES", {})


@pytest.fixture
def check():
    @exercise("0.0-sum", points=2, right=lambda x, y: x + y)
    def check_sum(draw: Draw):
        yield case(draw.number(1, 2), draw.number(3, 4))

    return check_sum


def test_a_taken_id_is_refused_but_the_same_check_may_be_defined_again() -> None:
    def define():
        @exercise("0.0-again", right=abs)
        def check_again(draw: Draw): ...

    define()
    define()
    with pytest.raises(ValueError, match=r"0.0-again.*defined already"):

        @exercise("0.0-again", right=abs)
        def check_other(draw: Draw): ...


def test_grading_runs_the_same_checks_and_refuses_unknown_ids(check) -> None:
    right = {"0.0-sum": lambda x, y: x + y}
    assert grade(right)["0.0-sum"].points == 2
    assert grade({})["0.0-sum"].status == "not attempted"
    with pytest.raises(ValueError, match=r"0.0-cube.*0.0-sum"):
        grade({"0.0-cube": abs})


def test_a_check_that_refuses_the_course_s_own_answer_does_not_accuse_the_learner() -> None:
    def look(result, x):
        exercises.mistake(True, "The scale is missing.")

    @exercise("0.0-broken", right=lambda x: x, look=look)
    def check_broken(draw: Draw):
        yield case(draw.number(1, 2))

    with pytest.raises(RuntimeError, match=r"0.0-broken refuses the course's own answer"):
        check_broken(lambda x: x)


def test_no_draw_of_2_2_c_refuses_a_right_restart_or_takes_the_stub_for_an_answer() -> None:
    from lora_course.classroom.chapter_2_2.restart import check_restart, restart

    def stub(layer, optimizer):
        raise NotImplementedError

    for seed in range(60):  # 45 among them once drew a scale of 1
        assert check_restart(restart, seed).status == "right"
        assert check_restart(stub, seed).status == "not attempted"


def test_no_draw_of_3_2_c_takes_the_logits_own_places() -> None:
    from lora_course.classroom.chapter_3_2 import check_a_token

    def mean_over(places):
        return lambda batchmean, labels: batchmean * len(labels) / (labels[:, places] != -100).sum()

    for seed in range(40):  # 10 and 30 among them once took the first
        judge = check_a_token.exercise.judge
        assert judge(mean_over(slice(None, -1)), seed).status == "wrong"
        assert judge(mean_over(slice(1, -1)), seed).status == "wrong"
        assert judge(mean_over(slice(1, None)), seed).status == "right"


def test_no_draw_of_5_1_d_takes_places_for_seeds_or_their_order_as_text() -> None:
    from lora_course.classroom.chapter_5_1 import check_fair_differences
    from lora_course.classroom.chapter_5_1.fairness import fair_differences

    def by_place(first, second):
        pairs = zip(sorted(first), sorted(second), strict=False)
        return [first[one] - second[other] for one, other in pairs]

    def by_text(first, second):
        return [first[seed] - second[seed] for seed in sorted(set(first) & set(second), key=str)]

    def pairing(pair):
        return lambda *arguments: fair_differences(*arguments, pair=pair)

    for seed in range(20):  # 6 and 14 among them once took the first, 3 and 8 the second
        judge = check_fair_differences.exercise.judge
        assert judge(pairing(by_place), seed).status == "wrong"
        assert judge(pairing(by_text), seed).status == "wrong"
        assert judge(fair_differences, seed).status == "right"
