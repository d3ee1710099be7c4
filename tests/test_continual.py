"""`lora_course.continual`: the matrix and its metrics, the memory, each strategy, and the same results after a kill."""

import copy
import functools
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_course import continual, lora
from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.continual import (
    Interleaved,
    Isolated,
    Orthogonal,
    OrthogonalLoRALinear,
    Replay,
    Reservoir,
    Results,
    Sequential,
    Task,
    learn,
    load_results,
    mean_loss,
    metrics,
    overlap,
    restart,
)
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, merge
from lora_course.qlora import quantize_model
from lora_course.states import adapter_state, use_adapter
from lora_course.training import AdapterTrainer, training_arguments
from tests.models import batch, config, qwen, randomize, relative

LENGTH = 10


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """The batches are too small for a second thread. Each training collects garbage: half its time, with all that is imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@functools.cache
def rows(task: int, count: int = 16, seed: int = 0) -> datasets.Dataset:
    """Task k: any order of the tokens 10k … 10k + 4; what one task teaches is wrong for the others."""
    ids = 10 * task + torch.randint(
        5, (count, LENGTH), generator=torch.Generator().manual_seed(100 * task + seed)
    )
    return datasets.Dataset.from_dict(
        {"input_ids": ids.numpy(), "labels": ids.numpy()}
    ).with_format("torch")


def tasks(count: int = 3) -> list[Task]:
    return [Task(f"task {k}", rows(k), rows(k, 8, seed=1)) for k in range(count)]


def injected(
    strategy: Sequential | None = None, base: nn.Module | None = None, **fields: object
) -> nn.Module:
    torch.manual_seed(5)
    fields = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1} | fields
    return inject(
        base or decided(), config(**fields), strategy.layer if strategy else lora.LoRALinear
    )


def decided() -> nn.Module:
    """A base whose logits can get far apart, so that there is something to learn and to forget."""
    base = qwen()
    base.lm_head.weight.data.mul_(10)
    return base


def arguments(folder: Path, **overrides: object):
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 2,
        "bf16": False, "disable_tqdm": True, **overrides,
    }  # fmt: skip
    return training_arguments(folder, device="cpu", **settings)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


STRATEGIES: dict[str, Callable[[], Sequential]] = {
    "sequential": Sequential, "replay": lambda: Replay(1000), "orthogonal": lambda: Orthogonal(0.01), "isolated": Isolated,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ metrics


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


def test_mean_loss_is_by_token_and_leaves_the_mode() -> None:
    model, data = qwen().train(), rows(0, 11)
    masked = [dict(row) for row in data]
    masked[0] = {
        **masked[0],
        "labels": torch.cat([torch.full((6,), -100), masked[0]["labels"][6:]]),
    }
    logits = model.eval()(input_ids=torch.stack([row["input_ids"] for row in masked])).logits[
        :, :-1
    ]
    labels = torch.stack([row["labels"] for row in masked])[:, 1:]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    for training in (True, False):
        assert mean_loss(model.train(training), masked, batch_size=4) == pytest.approx(
            expected.item(), rel=1e-5
        )
        assert model.training is training


# ------------------------------------------------------------------------------------------------------ memory


def plain(count: int, size: int = 3, start: int = 0) -> list[dict[str, list[int]]]:
    return [{"input_ids": [start + i] * size} for i in range(count)]


def test_each_row_is_kept_with_equal_probability_whenever_it_came() -> None:
    offered, kept, runs = 30, 6, 600
    counts = torch.zeros(offered)
    for seed in range(runs):
        memory = Reservoir(kept * 12, seed)
        for task, (start, count) in enumerate(
            [(0, 4), (4, 1), (5, 25)]
        ):  # in parts of different size
            memory.add(plain(count, start=start), task)
        assert len(memory.rows) == kept and memory.seen == offered and memory.nbytes == kept * 12
        for row, source in zip(memory.rows, memory.sources, strict=True):
            value = int(row["input_ids"][0])
            counts[value] += 1
            assert source == (0 if value < 4 else 1 if value == 4 else 2)
    expected = runs * kept / offered
    # χ² of 30 equally likely rows, drawn without replacement: 29 degrees of freedom, times 1 − 6/30; 58.3 is its 99.9% point.
    chi_squared = ((counts - expected) ** 2 / expected).sum().item() / (1 - kept / offered)
    assert chi_squared < 58.3
    assert chi_squared > 8.3, "more even than chance: the runs are not independent"


def test_the_budget_holds_for_rows_of_any_size_and_small_late_ones_are_not_preferred() -> None:
    generator = torch.Generator().manual_seed(0)
    late, runs, share = 0, 120, 0.0
    for seed in range(runs):
        memory = Reservoir(1000, seed)
        for i in range(60):
            size = 1 + int(torch.randint(20, (), generator=generator))
            memory.add([{"input_ids": [i] * size, "weight": torch.tensor(0.5)}])
            assert memory.nbytes <= 1000 and memory.nbytes == sum(
                4 * len(row["input_ids"]) + 4 for row in memory.rows
            )
        late += sum(int(row["input_ids"][0]) >= 30 for row in memory.rows)
        share += len(memory.rows)
    assert late / share == pytest.approx(
        0.5, abs=0.03
    )  # 120 · 21 rows: a standard error of 0.01 at most


def test_a_row_is_a_copy_and_not_what_was_offered() -> None:
    source = [{"input_ids": torch.arange(4), "scale": torch.ones(2)}]
    memory = Reservoir(1000)
    memory.add(source)
    source[0]["input_ids"].zero_()
    source[0]["scale"].zero_()
    assert memory.rows[0]["input_ids"].tolist() == [0, 1, 2, 3] and memory.rows[0][
        "scale"
    ].tolist() == [1, 1]


def test_a_saved_memory_goes_on_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    memories = [Reservoir(100, seed=3) for _ in range(2)]
    for memory in memories:
        memory.add(plain(20), 0)
    memories[1].save(tmp_path / "memory.safetensors")
    memories[1] = Reservoir(100, seed=99)
    memories[1].load(tmp_path / "memory.safetensors")
    for memory in memories:
        memory.add(plain(30, start=20), 1)
    one, other = memories
    assert all(same(a, b) for a, b in zip(one.rows, other.rows, strict=True)) and set(
        one.sources
    ) == {0, 1}
    assert (one.numbers, one.sources, one.limit, one.seen, one.nbytes) == (
        other.numbers,
        other.sources,
        other.limit,
        other.seen,
        other.nbytes,
    )


def test_interleaving_gives_the_share_that_was_asked_for() -> None:
    memory = Reservoir(40)
    memory.add([{"input_ids": torch.tensor([-1])}] * 10)
    for share, expected in ((0.5, 24), (0.25, 8), (0.0, 0)):
        mixed = Interleaved(plain(24, 1), memory.rows, share)
        assert (
            sum(int(row["input_ids"][0]) < 0 for row in (mixed[i] for i in range(len(mixed))))
            == expected
        )
        assert len(mixed) == 24 + expected
    assert len(Interleaved(plain(24), [], 0.5)) == 24
    assert {
        row.dtype for i in (0, 30) for row in Interleaved(plain(24), memory.rows, 0.5)[i].values()
    } == {torch.int64}


def test_replayed_rows_come_during_training_and_not_after(tmp_path: Path) -> None:
    """What each step of the second task was trained on, as the model saw it."""
    seen: list[list[int]] = []
    model, strategy = injected(), Replay(2000, share=0.5)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"][:, 0] // 10).tolist()) if module.training else None,
        with_kwargs=True,
    )  # fmt: skip
    learn(model, tasks(2), strategy, arguments(tmp_path, max_steps=12))
    first, second = seen[:12], seen[12:]
    assert all(task == 0 for step in first for task in step)
    old = [step.count(0) for step in second]
    assert all(task in (0, 1) for step in second for task in step) and len(second) == 12
    assert (
        12 <= sum(old) <= 36 and sum(count > 0 for count in old[:6]) >= 3
    )  # 24 of 48 are expected


# ------------------------------------------------------------------------------------------------------ O-LoRA


def test_freezing_keeps_the_function_and_the_bits_of_what_is_frozen() -> None:
    model = randomize(injected(Orthogonal(), lora_dropout=0.0))
    layer = adapter_layers(model)["model.layers.1.mlp.down_proj"]
    expected = model(**batch()).logits
    first = layer.A.detach().clone(), layer.scaling * layer.B.detach().clone()
    Orthogonal().begin(model, 1, seed=0)
    torch.testing.assert_close(model(**batch()).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.past_A, first[0]) and torch.equal(layer.past_B, first[1])
    assert layer.B.abs().max() == 0 and relative(layer.A, first[0]) > 0.5
    assert [name for name, _ in layer.named_parameters() if not name.startswith("base")] == [
        "A",
        "B",
    ]
    randomize(model, 2)
    changed = model(**batch()).logits
    A, B, scaling = layer.factors()
    assert A.shape[0] == 6 and scaling == 1
    x = torch.randn(2, 4, layer.in_features)
    torch.testing.assert_close(
        layer(x) - layer.base_layer(x), x @ (B @ A).t(), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(merge(model)(**batch()).logits, changed, atol=1e-5, rtol=1e-5)


def test_overlap_is_the_sum_over_pairs_of_rows_of_all_layers() -> None:
    model = randomize(injected(Orthogonal()))
    assert overlap(model) == 0
    Orthogonal().begin(model, 1, seed=0)
    randomize(model, 2)
    Orthogonal().begin(model, 2, seed=0)
    randomize(model, 3)
    absolute = squared = 0.0
    for layer in adapter_layers(model).values():
        for old in layer.past_A:
            for new in layer.A:
                absolute += abs(old @ new).item()
                squared += (old @ new).item() ** 2
    assert overlap(model).item() == pytest.approx(absolute, rel=1e-5)
    assert overlap(model, squared=True).item() == pytest.approx(squared, rel=1e-5)
    assert Orthogonal(0.3).penalty(model).item() == pytest.approx(0.3 * absolute, rel=1e-5)
    assert Orthogonal(0.3, squared=True).penalty(model).item() == pytest.approx(
        0.3 * squared, rel=1e-5
    )
    for layer in adapter_layers(model).values():  # rows out of the span of the past ones
        Q = torch.linalg.qr(layer.past_A.t()).Q
        layer.A.data -= layer.A.data @ Q @ Q.t()
    assert overlap(model) < 1e-4 * absolute


@pytest.mark.parametrize("squared", [False, True])
def test_the_penalty_goes_towards_zero_in_training_and_without_it_does_not(
    tmp_path: Path, squared: bool
) -> None:
    ends = {}
    for strength in (0.0, 1.0):
        model, strategy = injected(Orthogonal()), Orthogonal(strength, squared)
        strategy.begin(model, 0, 0)
        randomize(model)
        strategy.begin(model, 1, 0)
        past = {
            name: (layer.past_A.clone(), layer.past_B.clone())
            for name, layer in adapter_layers(model).items()
        }
        start = overlap(model).item()
        args = arguments(
            tmp_path / f"{strength}",
            max_steps=40,
            learning_rate=3e-2,
            save_strategy="no",
            lr_scheduler_type="linear",
        )
        AdapterTrainer(model, args, train_dataset=rows(1), auxiliary_loss=strategy.penalty).train()
        ends[strength] = overlap(model).item() / start
        for name, layer in adapter_layers(model).items():
            assert torch.equal(layer.past_A, past[name][0]) and torch.equal(
                layer.past_B, past[name][1]
            )
            assert layer.B.abs().max() > 0.01
    # 40 steps of a falling rate: 6% is left of the absolute overlap, 7% of the squared one
    assert ends[1.0] < 0.1 and ends[0.0] > 0.5


def test_a_frozen_adapter_never_changes_by_a_bit_when_tasks_are_added(tmp_path: Path) -> None:
    strategy = Orthogonal(0.01)
    model = injected(strategy)
    learn(model, tasks(2), strategy, arguments(tmp_path))
    files = {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("stage-*/*")
    }
    trained = {
        name: (layer.A.clone(), layer.scaling * layer.B.clone())
        for name, layer in adapter_layers(model).items()
    }
    first = {
        name: (layer.past_A.clone(), layer.past_B.clone())
        for name, layer in adapter_layers(model).items()
    }
    learn(model, tasks(4), strategy, arguments(tmp_path))
    for name, layer in adapter_layers(model).items():
        assert layer.past_A.shape[0] == 9
        assert torch.equal(layer.past_A[:3], first[name][0]) and torch.equal(
            layer.past_B[:, :3], first[name][1]
        )
        assert torch.equal(layer.past_A[3:6], trained[name][0]) and torch.equal(
            layer.past_B[:, 3:6], trained[name][1]
        )
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == files


def test_orthogonal_adapters_save_and_export(tmp_path: Path) -> None:
    model = randomize(injected(Orthogonal(), lora_dropout=0.0))
    Orthogonal().begin(model, 1, 0)
    randomize(model, 2)
    expected = model(**batch()).logits
    again = load_adapter(decided(), save_adapter(model, tmp_path / "own"))
    torch.testing.assert_close(again(**batch()).logits, expected, atol=0, rtol=0)
    loaded = PeftModel.from_pretrained(decided(), export_peft(model, tmp_path / "peft"))
    torch.testing.assert_close(loaded(**batch()).logits, expected, atol=1e-5, rtol=1e-5)
    state = adapter_state(model)
    state["model.layers.0.mlp.down_proj.past_A"] = torch.zeros(5, 7)
    with pytest.raises(
        ValueError, match=r"past factors for 'model.layers.0.mlp.down_proj'.*another base"
    ):
        use_adapter(model, state)


@pytest.mark.parametrize("case", ["bf16", "autocast", "checkpointing"])
def test_the_past_adapters_compute_in_the_types_of_the_layer(case: str) -> None:
    def build(dtype: torch.dtype = torch.float32) -> nn.Module:
        model = randomize(injected(Orthogonal(), qwen().to(dtype), lora_dropout=0.0))
        Orthogonal().begin(model, 1, 0)
        return randomize(model, 2)

    def gradients(model: nn.Module) -> list[Tensor]:
        model(**batch(), use_cache=False).loss.backward()
        return [layer.A.grad for layer in adapter_layers(model).values()]

    reference = build()
    logits = reference(**batch()).logits
    if case == "bf16":
        found = build(torch.bfloat16)(**batch()).logits
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(
            found.float(), logits, atol=0.1, rtol=0.1
        )  # every product is rounded to 2⁻⁸
    elif case == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(
                build()(**batch()).logits.float(), logits, atol=0.1, rtol=0.1
            )
    else:
        model = build().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for plain_gradient, checkpointed in zip(
            gradients(reference.train()), gradients(model), strict=True
        ):
            torch.testing.assert_close(plain_gradient, checkpointed, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- the strategies


def test_the_matrix_shows_what_each_strategy_is_for(tmp_path: Path) -> None:
    found: dict[str, Tensor] = {}
    for name, make in STRATEGIES.items():
        strategy = make()
        model = injected(strategy, lora_dropout=0.0, r=8, lora_alpha=16)
        found[name] = learn(
            model,
            tasks(2),
            strategy,
            arguments(tmp_path / name, max_steps=24, learning_rate=3e-2, save_strategy="no"),
        ).matrix
        assert found[name].shape == (3, 2) and not model.training
        assert all(
            found[name][k + 1, k] < found[name][0, k] - 0.3 for k in range(2)
        )  # each task is learned
    assert all(
        torch.equal(matrix[:2, 0], found["sequential"][:2, 0]) for matrix in found.values()
    )  # until then all are one
    forgetting = {name: -metrics(matrix)["BWT"] for name, matrix in found.items()}
    assert forgetting["isolated"] == 0
    assert forgetting["sequential"] > 0.3 and forgetting["replay"] < forgetting["sequential"] / 2
    assert torch.equal(
        found["isolated"][1, 1], found["isolated"][0, 1]
    )  # a task that is not learned yet gets the base


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
            by_hand.begin(other, index, seed=0)
            args = arguments(tmp_path / "hand", save_strategy="no")
            AdapterTrainer(
                other, args, train_dataset=by_hand.rows(task.train), auxiliary_loss=by_hand.penalty
            ).train()
            by_hand.end(other, index, task.train)
        assert same(adapter_state(model), adapter_state(other)), name


def test_isolated_adapters_serve_by_task_and_the_model_is_given_back(tmp_path: Path) -> None:
    strategy, scores = Isolated(), []
    model = injected(strategy)
    learn(model, tasks(3), strategy, arguments(tmp_path))
    before, logits = adapter_state(model), model(**batch()).logits
    for index, state in enumerate(strategy.states):
        with strategy.serving(model, index):
            assert same(adapter_state(model), state)
            scores.append(mean_loss(model, tasks(3)[index].evaluate))
    assert same(adapter_state(model), before) and same(strategy.states[2], before)
    torch.testing.assert_close(model(**batch()).logits, logits, atol=0, rtol=0)
    assert scores == load_results(tmp_path).matrix[3].tolist()
    assert not same(*strategy.states[:2])


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


def test_restart_draws_a_new_a_and_leaves_the_random_state() -> None:
    model = randomize(injected())
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    restart(model, 4)
    assert torch.equal(torch.rand(3), expected)
    first = adapter_state(model)
    assert all(layer.B.abs().max() == 0 for layer in adapter_layers(model).values())
    restart(randomize(model), 4)
    assert same(adapter_state(model), first)
    restart(model, 5)
    layer = adapter_layers(model)["model.layers.0.mlp.down_proj"]
    assert relative(layer.A, first["model.layers.0.mlp.down_proj.A"]) > 0.5
    assert layer.A.abs().max() <= 1 / layer.in_features**0.5  # Kaiming-uniform, as at injection


@pytest.mark.parametrize("name", ["replay", "orthogonal", "isolated"])
def test_a_4bit_base_learns_and_its_bytes_stay(tmp_path: Path, name: str) -> None:
    strategy = STRATEGIES[name]()
    model = injected(strategy, quantize_model(decided()))
    before = {
        key: value.clone() for key, value in model.named_parameters() if not value.requires_grad
    }
    assert any(value.dtype == torch.uint8 for value in before.values())
    matrix = learn(
        model, tasks(2), strategy, arguments(tmp_path, max_steps=12, save_strategy="no")
    ).matrix
    assert all(matrix[k + 1, k] < matrix[0, k] - 0.1 for k in range(2))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[key], value) for key, value in before.items())


# ------------------------------------------------------------------------------------------- kills and resumption


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
    return adapter_state(model), (folder / continual.RECORD).read_text()


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
                continual, "score", at_call(continual.score, 7)
            )  # in the row after the second task
        elif place == "save":
            patch.setattr(continual, "save_adapter", at_call(continual.save_adapter, 2))
        else:
            patch.setattr(
                continual, "_write", at_call(continual._write, 5)
            )  # trained and saved, and not yet noted
        whole(tmp_path, name)
    assert json.loads((tmp_path / continual.RECORD).read_text())["stages"] in (2, 3)
    state, record = whole(tmp_path, name)
    assert same(state, straight[name][0]) and record == straight[name][1]
    assert not list(tmp_path.glob("training-*")) and not list(tmp_path.rglob("*.pt")) + list(
        tmp_path.rglob("*.pth")
    )


def test_after_a_kill_the_same_command_reaches_the_same_weights_and_matrix(
    tmp_path: Path, straight: dict
) -> None:
    code = (
        f"from tests.test_continual import *; torch.set_num_threads(1); "
        f"whole(Path({str(tmp_path)!r}), 'replay', callbacks=[KillAt(3, lambda: os.kill(os.getpid(), signal.SIGKILL))])"
    )
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (tmp_path / "training-3" / "checkpoint-2").is_dir() and json.loads(
        (tmp_path / continual.RECORD).read_text()
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


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_does_not_fit_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    args, model = arguments(tmp_path / "a", max_steps=1), injected()
    with pytest.raises(ValueError, match=r"Orthogonal needs OrthogonalLoRALinear.*is a LoRALinear"):
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
        with pytest.raises(ValueError, match="give a new output_dir"):
            learn(
                injected(), others, strategy, arguments(tmp_path / "a", **{"max_steps": 1} | change)
            )
    (tmp_path / "a" / continual.RECORD).unlink()
    with pytest.raises(ValueError, match=r"stage-0.*no continual.json"):
        learn(injected(), tasks(2), Sequential(), args)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="budget_bytes=0"):
        Reservoir(0)
    with pytest.raises(ValueError, match="holds no row: one takes about 12 bytes"):
        Reservoir(10).add(plain(3))
    with pytest.raises(ValueError, match="'text' holds str, no numbers"):
        Reservoir(100).add([{"text": "a row"}])
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="share"):
            Replay(100, share)
    with pytest.raises(ValueError, match="strength=-1"):
        Orthogonal(-1)


def test_strategies_say_what_was_chosen() -> None:
    assert Replay(100, 0.25, 3).settings() == {
        "strategy": "Replay",
        "budget_bytes": 100,
        "share": 0.25,
        "seed": 3,
    }
    assert Orthogonal(0.1).settings() == {
        "strategy": "Orthogonal",
        "strength": 0.1,
        "squared": False,
    }
    assert Isolated().settings() == {"strategy": "Isolated"} and Sequential().settings() == {
        "strategy": "Sequential"
    }
    assert (
        OrthogonalLoRALinear.__name__ in lora.LAYERS
        and copy.deepcopy(Replay(100)).memory.nbytes == 0
    )
