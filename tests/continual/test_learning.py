"""`continual.learning`: the matrix and its metrics, kills and what goes on after them, and what is refused."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_course.continual import (
    Orthogonal,
    Replay,
    Results,
    Sequential,
    Task,
    learn,
    learning,
    load_results,
    mean_loss,
    metrics,
    strategies,
)
from lora_course.states import adapter_state
from lora_course.training import AdapterTrainer
from tests.continual.models import STRATEGIES, arguments, decided, injected, rows, same, tasks
from tests.models import qwen
from tests.processes import run_until_shot

pytestmark = pytest.mark.usefixtures("one_thread")


def test_metrics_are_gems_and_their_signs_say_better_or_worse() -> None:
    accuracy = torch.tensor(
        [[0.1, 0.2, 0.3], [0.9, 0.4, 0.3], [0.7, 0.8, 0.5], [0.5, 0.75, 0.95]], dtype=torch.float64
    )
    found = metrics(accuracy, higher_is_better=True)
    assert found["ACC"] == pytest.approx((0.5 + 0.75 + 0.95) / 3)
    assert found["BWT"] == pytest.approx(((0.5 - 0.9) + (0.75 - 0.8)) / 2)
    assert found["FWT"] == pytest.approx(((0.4 - 0.2) + (0.5 - 0.3)) / 2)
    error = metrics(1 - accuracy)
    assert error["ACC"] == pytest.approx(1 - found["ACC"])
    assert (error["BWT"], error["FWT"]) == (
        pytest.approx(found["BWT"]),
        pytest.approx(found["FWT"]),
    )


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(3, 3), torch.zeros(2, 1), torch.zeros(3), torch.full((3, 2), float("nan"))],
)
def test_metrics_refuse_what_is_no_full_matrix(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[T \+ 1, T\]"):
        metrics(matrix)


def test_the_row_before_any_task_is_the_base(tmp_path: Path) -> None:
    results = learn(injected(), tasks(2), Sequential(), arguments(tmp_path, max_steps=1))
    assert isinstance(results, Results) and results.names == ["task 0", "task 1"]
    assert results.matrix[0].tolist() == [mean_loss(decided(), task.evaluate) for task in tasks(2)]


def test_a_loop_by_hand_reaches_what_learn_reaches(tmp_path: Path) -> None:
    for name in ("replay", "orthogonal"):
        make = STRATEGIES[name]
        strategy = make()
        model = injected(strategy)
        learn(model, tasks(2), strategy, arguments(tmp_path / name))
        by_hand, other = make(), injected(strategy)
        for index, task in enumerate(tasks(2)):
            by_hand.before_task(other, index, seed=0)
            args = arguments(tmp_path / "hand", save_strategy="no")
            AdapterTrainer(
                other,
                args,
                train_dataset=by_hand.training_rows(task.train),
                auxiliary_loss=by_hand.penalty,
            ).train()
            by_hand.after_task(other, index, task.train)
        assert same(adapter_state(model), adapter_state(other)), name


def test_a_function_may_give_the_score_and_sees_the_model_in_eval_mode(tmp_path: Path) -> None:
    calls: list[bool] = []

    def evaluate(model: nn.Module) -> float:
        calls.append(model.training)
        return float(len(calls))

    results = learn(
        injected(),
        [Task("only", rows(0), evaluate)],
        Sequential(),
        arguments(tmp_path, max_steps=1),
    )
    assert results.matrix.tolist() == [[1.0], [2.0]] and calls == [False, False]


class Killed(BaseException):
    pass


class KillAt(TrainerCallback):
    """Stops one training in the middle: after the checkpoint of step 2, before that of step 4."""

    def __init__(self, training: int, how: Callable[[], None]) -> None:
        self.training, self.how = training, how

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step == 3 and Path(args.output_dir).name == f"training-{self.training}":
            self.how()


def whole(folder: Path, name: str, **trainer: object) -> tuple[dict[str, Tensor], str]:
    """The command that is repeated: the final weights, and the record as text."""
    strategy = STRATEGIES[name]()
    model = injected(strategy)
    learn(model, tasks(3), strategy, arguments(folder), **trainer)
    return adapter_state(model), (folder / learning.RECORD).read_text()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Tensor], str]]:
    return {name: whole(tmp_path_factory.mktemp(name), name) for name in STRATEGIES}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, "training") for name in STRATEGIES),
        *(("replay", place) for place in ("scores", "save", "record")),
    ],
)
def test_what_is_stopped_anywhere_ends_with_the_same_weights_and_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict, name: str, place: str
) -> None:
    def stop(*_: object) -> None:
        raise Killed

    def at_call(function: Callable, number: int) -> Callable:
        count = iter(range(1000))
        return lambda *args: function(*args) if next(count) != number else stop()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if place == "training":
            whole(tmp_path, name, callbacks=[KillAt(2, stop)])
        elif place == "scores":
            patch.setattr(
                learning, "score_task", at_call(learning.score_task, 7)
            )  # in the row after the second task
        elif place == "save":
            patch.setattr(strategies, "save_adapter", at_call(strategies.save_adapter, 2))
        else:
            patch.setattr(
                learning, "_write_record", at_call(learning._write_record, 5)
            )  # trained and saved, and not yet noted
        whole(tmp_path, name)
    assert json.loads((tmp_path / learning.RECORD).read_text())["stages"] in (2, 3)
    state, record = whole(tmp_path, name)
    assert same(state, straight[name][0]) and record == straight[name][1]
    assert not list(tmp_path.glob("training-*")) and not list(tmp_path.rglob("*.pt")) + list(
        tmp_path.rglob("*.pth")
    )


def test_after_a_kill_the_same_command_reaches_the_same_weights_and_matrix(
    tmp_path: Path, straight: dict
) -> None:
    run_until_shot(
        "tests.continual.test_learning",
        f"whole(Path({str(tmp_path)!r}), 'replay', callbacks=[KillAt(3, shot)])",
    )
    assert (tmp_path / "training-3" / "checkpoint-2").is_dir() and json.loads(
        (tmp_path / learning.RECORD).read_text()
    )["stages"] == 3
    state, record = whole(tmp_path, "replay")
    assert same(state, straight["replay"][0]) and record == straight["replay"][1]


def test_within_a_task_training_goes_on_and_does_not_begin_again(tmp_path: Path) -> None:
    steps: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            steps.append(state.global_step)

    def stop() -> None:
        raise Killed

    with pytest.raises(Killed):
        whole(tmp_path, "sequential", callbacks=[KillAt(2, stop)])
    whole(tmp_path, "sequential", callbacks=[Count()])
    assert steps == [3, 4, *range(1, 5)]


def test_a_finished_sequence_is_not_trained_again_and_gives_its_model_back(
    tmp_path: Path, straight: dict
) -> None:
    first = whole(tmp_path, "replay")
    files = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    again = whole(
        tmp_path,
        "replay",
        callbacks=[KillAt(k, lambda: pytest.fail("trained again")) for k in (1, 2, 3)],
    )
    assert (
        same(first[0], again[0])
        and sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == files
    )
    assert same(first[0], straight["replay"][0])


@pytest.mark.parametrize("name", ["replay", "isolated"])
def test_a_strategy_that_comes_from_another_run_gives_what_a_fresh_one_gives(
    tmp_path: Path, straight: dict, name: str
) -> None:
    def stop() -> None:
        raise Killed

    strategy = STRATEGIES[name]()
    learn(injected(), tasks(2)[::-1], strategy, arguments(tmp_path / "other"))
    with pytest.raises(Killed):
        whole(tmp_path / "resumed", name, callbacks=[KillAt(3, stop)])
    for folder in (tmp_path / "anew", tmp_path / "resumed"):
        model = injected()
        learn(model, tasks(3), strategy, arguments(folder))
        assert same(adapter_state(model), straight[name][0]), folder.name
        assert (folder / learning.RECORD).read_text() == straight[name][1], folder.name


def test_rows_that_a_memory_held_before_its_first_run_are_in_each_run_of_it(tmp_path: Path) -> None:
    strategy = Replay(100_000)
    strategy.memory.add(rows(7, count=5))
    for folder in ("a", "b"):
        learn(injected(), tasks(2), strategy, arguments(tmp_path / folder))
        seen = [Replay(100_000).memory for _ in range(3)]
        for i, memory in enumerate(seen):
            memory.load(tmp_path / folder / f"stage-{i}" / "memory.safetensors")
        assert [memory.seen for memory in seen] == [5, 5 + 16, 5 + 32], folder


@pytest.mark.parametrize("name", STRATEGIES)
def test_tasks_added_later_end_as_if_all_had_been_known(
    tmp_path: Path, straight: dict, name: str
) -> None:
    strategy = STRATEGIES[name]()
    learn(injected(strategy), tasks(1), strategy, arguments(tmp_path))
    state, record = whole(tmp_path, name)
    assert same(state, straight[name][0])
    assert json.loads(record) == json.loads(
        straight[name][1]
    )  # earlier rows have the new columns too


def test_a_run_that_is_not_finished_shows_what_it_has(tmp_path: Path) -> None:
    def stop() -> None:
        raise Killed

    with pytest.raises(Killed):
        whole(tmp_path, "sequential", callbacks=[KillAt(2, stop)])
    matrix = load_results(tmp_path).matrix
    assert torch.isfinite(matrix[:2]).all() and torch.isnan(matrix[2:]).all()


def test_what_does_not_fit_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    args, model = arguments(tmp_path / "a", max_steps=1), injected()
    with pytest.raises(ValueError, match="injected with LoRALinear.*layer=OrthogonalLoRALinear"):
        learn(model, tasks(2), Orthogonal(), args)
    with pytest.raises(ValueError, match=r"inject\(model, config\)"):
        learn(qwen(), tasks(2), Sequential(), args)
    for wrong in ([], [tasks(1)[0]] * 2, [Task("empty", [], lambda model: 0.0)]):
        with pytest.raises(ValueError, match="each of another name and with rows"):
            learn(model, wrong, Sequential(), args)
    assert not (tmp_path / "a").exists()
    learn(model, tasks(2), Sequential(), args)
    for others, strategy, change in (
        (tasks(2)[::-1], Sequential(), {}), (tasks(1), Sequential(), {}), (tasks(2), Replay(1000), {}),
        (tasks(2), Sequential(), {"learning_rate": 1e-4}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="(give a|Give another) (new )?(output_dir|folder)"):
            learn(
                injected(), others, strategy, arguments(tmp_path / "a", **{"max_steps": 1} | change)
            )
    (tmp_path / "a" / learning.RECORD).unlink()
    with pytest.raises(ValueError, match=r"stage-0.*no continual.json"):
        learn(injected(), tasks(2), Sequential(), args)


def test_other_rows_another_rank_or_schedule_under_an_old_name_are_refused_and_can_start_anew(
    tmp_path: Path,
) -> None:
    settings = {"max_steps": 1}
    learn(injected(), tasks(2), Sequential(), arguments(tmp_path, **settings))
    others = [Task("task 0", rows(0, seed=7), rows(0, 8, seed=1)), tasks(2)[1]]
    scored = [Task("task 0", rows(0), rows(0, 8, seed=2)), tasks(2)[1]]
    for model, given, change, named in (
        (injected(), others, {}, r"rows\.task 0 is"),
        (injected(), scored, {}, r"evaluate\.task 0 is"),
        (injected(r=5), tasks(2), {}, r"adapter\.config\.r is 3 there and 5 here"),
        (injected(), tasks(2), {"lr_scheduler_type": "constant"}, "lr_scheduler_type"),
        (injected(), tasks(2), {"weight_decay": 0.5}, "weight_decay"),
    ):
        with pytest.raises(ValueError, match=named) as caught:
            learn(model, given, Sequential(), arguments(tmp_path, **settings | change))
        assert "overwrite=True" in str(caught.value)
    anew, fresh = injected(), injected()
    found = learn(anew, others, Sequential(), arguments(tmp_path, **settings), overwrite=True)
    expected = learn(fresh, others, Sequential(), arguments(tmp_path / "b", **settings))
    assert torch.equal(found.matrix, expected.matrix)
    assert same(adapter_state(anew), adapter_state(fresh))


def test_a_record_without_test_rows_and_a_score_with_an_address_in_it_go_on(tmp_path: Path) -> None:
    def score(model: nn.Module, of: object) -> float:
        return 1.0

    def both() -> list[Task]:
        return [tasks(1)[0], Task("scored", rows(1), functools.partial(score, of=object()))]

    first = both()
    args = arguments(tmp_path, max_steps=1)
    expected = learn(injected(), first, Sequential(), args).matrix
    assert torch.equal(learn(injected(), both(), Sequential(), args).matrix, expected)
    path = tmp_path / learning.RECORD
    record = json.loads(path.read_text())
    del record["run"]["evaluate"]  # as an earlier version wrote it
    path.write_text(json.dumps(record))
    changed = [Task("task 0", rows(0), rows(0, 8, seed=2)), first[1]]
    assert torch.equal(learn(injected(), changed, Sequential(), args).matrix, expected)
