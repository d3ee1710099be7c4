"""`continual.memory`: a uniform sample within its budget, and the share that is replayed."""

from pathlib import Path

import pytest
import torch

from lora_course.continual import (
    Interleaved,
    Replay,
    Reservoir,
    learn,
)
from tests.continual.models import arguments, injected, plain, same, tasks

pytestmark = pytest.mark.usefixtures("one_thread")


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
