"""`adaptive.growth`: the schedule, the budget, the optimiser's state, resuming, and what is refused."""

import copy
import json
from pathlib import Path

import bitsandbytes as bnb
import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_course.adaptive import GrowthSchedule, RankGrower, rank_history
from lora_course.arguments import training_arguments
from lora_course.checkpoint import load_adapter, restore_adapter, save_adapter
from lora_course.injection import adapter_layers, inject, merge
from lora_course.runs import last_checkpoint
from lora_course.states import adapter_state
from lora_course.training import AdapterTrainer
from tests.adaptive.models import (
    SCHEDULE,
    assert_same,
    growing,
    grown,
    train,
    trainable,
)
from tests.models import batch, config, qwen
from tests.processes import run_until_shot, shot
from tests.tolerances import TRAINED


def snapshot(optimizer: torch.optim.Optimizer) -> dict[int, tuple[Tensor, dict]]:
    """Each tensor of an optimiser and its state, by identity, as copies."""
    state = {
        p: optimizer.state[p]
        for group in optimizer.param_groups
        for p in group["params"]
        if p in optimizer.state
    }
    return {id(p): (p.detach().clone(), copy.deepcopy(dict(s))) for p, s in state.items()}


def test_the_layer_that_the_loss_depends_on_grows() -> None:
    model = growing()
    grower = RankGrower(model, SCHEDULE)
    favourite = "model.layers.1.mlp.up_proj"
    for _ in range(3):
        model(**batch()).loss.backward()
        adapter_layers(model)[favourite].B.grad.mul_(1000)
        grower.observe()
        model.zero_grad()
    scores = grower.scores()
    assert max(scores, key=scores.get) == favourite
    for name, layer in adapter_layers(model).items():
        assert scores[name] == pytest.approx(
            layer.importance.item() * layer.uncertainty.item(), rel=1e-5
        )
    assert list(grower.plan())[0] == favourite and set(grower.plan()) == set(
        sorted(scores, key=scores.get)[-3:]
    )


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(trainable(model), lr=1e-2),
    "named, not foreach": lambda model: torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2, foreach=False),
    "8-bit": lambda model: bnb.optim.AdamW8bit(trainable(model), lr=1e-2, min_8bit_size=64),
    "A and B apart": lambda model: torch.optim.AdamW([
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and n.endswith(".A")], "lr": 1e-2},
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and n.endswith(".B")], "lr": 3e-2},
    ]),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_growth_touches_no_old_tensor_and_no_state_and_new_ones_start_afresh(kind: str) -> None:
    model = growing()
    optimizer = OPTIMIZERS[kind](model)
    schedule = GrowthSchedule(budget=40, start=100, every=1, top=14, add=1)
    grower = RankGrower(model, schedule)
    for _ in range(3):
        train(model, optimizer, range(1), None)
    model(**batch()).loss.backward()
    grower.observe()
    optimizer.step()
    before, groups = snapshot(optimizer), [dict(group) for group in optimizer.param_groups]
    held = {id(p): p for p in trainable(model)}
    assert set(before) == set(held)
    gained = grower.grow(optimizer, 100)
    assert sum(gained.values()) == 12 and grower.total == 40
    after = snapshot(optimizer)
    assert after.keys() == before.keys()  # nothing was lost, and the new tensors have no state yet
    for key, (tensor, state) in before.items():
        assert torch.equal(after[key][0], tensor)
        for name, value in state.items():
            same = (
                torch.equal(after[key][1][name], value)
                if isinstance(value, Tensor)
                else after[key][1][name] == value
            )
            assert same, f"{name} changed"
    assert len(optimizer.param_groups) == len(groups)
    for old, new in zip(groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k not in ("params", "param_names")} == {
            k: v for k, v in new.items() if k not in ("params", "param_names")
        }
    for name, layer in adapter_layers(model).items():
        for group in optimizer.param_groups:
            ids = [id(p) for p in group["params"]]
            assert all(
                (id(first) in ids) == (id(later) in ids)
                for first, later in zip(layer.pairs[0], layer.pairs[-1], strict=True)
            ), name
    optimizer.zero_grad()
    losses = train(model, optimizer, range(101, 104))
    assert losses[-1] < losses[0]
    for name in gained:
        state = optimizer.state[adapter_layers(model)[name].B1]
        assert (
            int(state["step"]) == 3
            and int(optimizer.state[adapter_layers(model)[name].B]["step"]) == 7
        )
    if "named" in kind:
        names = {id(p): name for name, p in model.named_parameters()}
        assert [
            names[id(p)] for p in optimizer.param_groups[0]["params"]
        ] == optimizer.param_groups[0]["param_names"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimisers_order_is_that_of_one_made_from_the_grown_model(kind: str) -> None:
    """What makes its saved state fit after a restart."""
    model = growing()
    optimizer = OPTIMIZERS[kind](model)
    grower = RankGrower(model, GrowthSchedule(budget=44, start=2, every=1, top=2, add=2))
    train(model, optimizer, range(1, 7), grower)
    assert grower.finished and max(len(layer.pairs) for layer in adapter_layers(model).values()) > 2
    if kind == "A and B apart":
        fresh = [
            [
                p
                for n, p in model.named_parameters()
                if p.requires_grad and n.rpartition(".")[2][0] == x
            ]
            for x in "AB"
        ]
    else:
        fresh = [group["params"] for group in OPTIMIZERS[kind](model).param_groups]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in group] for group in fresh
    ]


def test_the_next_step_moves_old_tensors_as_if_nothing_had_grown() -> None:
    """Adam's step is per tensor: with the same gradients the old factors go where they would have gone."""
    model = growing()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(trainable(m), lr=1e-2) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        train(m, optimizer, range(3))
    grower = RankGrower(model, GrowthSchedule(budget=42, start=3, every=1, top=14))
    model(**batch()).loss.backward()
    grower.observe()
    model.zero_grad()
    assert grower.grow(optimizers[0], 3)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        train(m, optimizer, range(4, 5))
    for name, layer in adapter_layers(twin).items():
        # Adam amplifies the last bits of gradients near zero
        torch.testing.assert_close(adapter_layers(model)[name].A, layer.A, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(adapter_layers(model)[name].B, layer.B, atol=2e-5, rtol=1e-4)


def test_a_learning_rate_schedule_goes_on_and_new_tensors_follow_it() -> None:
    model = growing()
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    grower = RankGrower(model, SCHEDULE)
    for step in range(1, 7):
        model(**batch()).loss.backward()
        grower.observe()
        optimizer.step()
        scheduler.step()
        gained = grower.grow(optimizer, step)
        assert (
            optimizer.param_groups[0]["lr"] == pytest.approx(1 / (1 + step))
            and len(optimizer.param_groups) == 1
        )
        assert bool(gained) == (step in (3, 5))
        optimizer.zero_grad()
    layer = next(layer for layer in adapter_layers(model).values() if len(layer.pairs) > 1)
    model(**batch()).loss.backward()
    before, gradient = layer.B1.clone(), layer.B1.grad.clone()
    optimizer.step()
    torch.testing.assert_close(before - layer.B1, gradient / 7, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "schedule",
    [
        SCHEDULE,
        GrowthSchedule(budget=29, start=2, every=3, top=5, add=4),  # less than one growth's worth
        GrowthSchedule(
            budget=41, start=1, every=1, top=3, add=2
        ),  # the last growth hands out the odd rest
        GrowthSchedule(
            budget=14 * 3, start=2, every=1, top=4, add=5, max_r=3
        ),  # every layer ends at the maximum
        GrowthSchedule(
            budget=14 * 3 - 1, start=2, every=1, top=20, add=1, max_r=3
        ),  # more than there are layers
        GrowthSchedule(budget=28, start=2, every=1, top=1),  # nothing to hand out
    ],
    ids=lambda s: f"{s.budget}-{s.top}x{s.add}",
)
def test_the_budget_is_met_exactly_when_it_was_foretold_and_ranks_only_rise(
    schedule: GrowthSchedule,
) -> None:
    model = growing()
    grower = RankGrower(model, schedule)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    foretold, totals = schedule.steps(grower.total), []
    for step in range(1, 13):
        before = grower.ranks
        train(model, optimizer, range(step, step + 1), grower)
        after = grower.ranks
        assert all(before[name] <= after[name] <= (schedule.max_r or 32) for name in after)
        assert (before != after) == (step in foretold)
        assert sum(after.values()) - sum(before.values()) <= schedule.top * schedule.add
        assert schedule.steps(grower.total, after=step) == [s for s in foretold if s > step]
        totals.append(grower.total)
    assert totals[-1] == schedule.budget and max(totals) == schedule.budget
    assert grower.ranks == {
        name: layer.factors()[0].shape[0] for name, layer in adapter_layers(model).items()
    }
    history = rank_history(model)
    assert [entry["step"] for entry in history] == [0, *foretold]
    assert set(history[0]["ranks"].values()) == {2} and history[-1]["ranks"] == grower.ranks
    assert json.loads(json.dumps(history)) == history
    assert len({p.data_ptr() for group in optimizer.param_groups for p in group["params"]}) == len(
        trainable(model)
    )


def test_ranks_that_differ_from_the_start_count_too() -> None:
    model = growing(rank_pattern={"q_proj": 4, "down_proj": 1})
    grower = RankGrower(model, GrowthSchedule(budget=50, start=2, every=1, top=3, add=2, max_r=5))
    assert grower.total == 2 * (4 + 1 + 5 * 2)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), range(1, 8), grower)
    assert grower.finished and max(grower.ranks.values()) <= 5


def test_growth_draws_nothing_from_the_global_generator_and_repeats_itself() -> None:
    def grown(seed: int, drawn: int) -> list[Tensor]:
        model = growing()
        grower = RankGrower(
            model, GrowthSchedule(budget=34, start=2, every=1, top=3, add=2, seed=seed)
        )
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        train(model, optimizer, range(1, 2), grower)
        torch.manual_seed(drawn)
        state = torch.get_rng_state()
        train(model, optimizer, range(2, 3), grower)
        assert torch.equal(torch.get_rng_state(), state)
        new = [
            layer.A1.detach() for layer in adapter_layers(model).values() if len(layer.pairs) > 1
        ]
        assert len(new) == 3
        return new

    first = grown(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, grown(0, 2), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, grown(1, 1), strict=True))
    assert not any(
        torch.equal(a[:1], b[:1]) for a in first for b in first if a is not b and a.shape == b.shape
    )


def test_after_the_budget_is_spent_nothing_is_observed() -> None:
    model = growing()
    grower = RankGrower(model, GrowthSchedule(budget=28, start=1, every=1, top=1))
    grower.observe()  # no gradients, and none are needed
    assert not any(layer.importance for layer in adapter_layers(model).values())


REFUSED = [
    ({"budget": 0}, "budget=0: a whole number"),
    ({"top": 1.5}, "top=1.5: a whole number"),
    ({"start": 0}, "start=0"),
    ({"every": 0}, "every=0"),
    ({"add": -1}, "add=-1"),
    ({"max_r": 0}, "max_r=0"),
    ({"beta": 1.0}, r"beta=1.0: a number in \[0, 1\)"),
    (
        {"budget": 27},
        "budget=27: it counts the ranks of all 14 layers together, which are 28 now and can become 84",
    ),
    ({"budget": 85}, "which are 28 now and can become 84 .max_r=6"),
    ({"max_r": 1}, "'model.layers.0.self_attn.q_proj' has rank 2 and may have 1 at most"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_an_impossible_schedule_is_refused(fields: dict, message: str) -> None:
    settings = {"budget": 40, "start": 3, "every": 2, "top": 3, "max_r": 6}
    with pytest.raises(ValueError, match=message):
        RankGrower(growing(), GrowthSchedule(**settings | fields))


def test_a_grower_is_refused_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="layer=GrowingLoRALinear"):
        RankGrower(inject(qwen(), config()), SCHEDULE)
    with pytest.raises(RuntimeError, match="q_proj' is merged.*unmerge"):
        RankGrower(merge(growing()), SCHEDULE)
    model = growing()
    grower = RankGrower(model, SCHEDULE)
    with pytest.raises(RuntimeError, match="after backward"):
        grower.observe()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with pytest.raises(RuntimeError, match="No layer has any importance yet"):
        grower.grow(optimizer, 3)
    train(model, optimizer, range(1, 4), grower)
    with pytest.raises(ValueError, match="step=3: layers grew at step 3. After resuming"):
        grower.grow(optimizer, 3)
    ranks = grower.ranks
    with pytest.raises(
        ValueError, match="does not hold the factors of 'model.layers.0.self_attn.q_proj'"
    ):
        grower.grow(torch.optim.AdamW(trainable(model)[1:], lr=1e-2), 5)
    merge(model)
    with pytest.raises(RuntimeError, match="is merged"):
        grower.grow(optimizer, 5)
    assert grower.ranks == ranks


def test_an_adapter_comes_back_with_its_pairs_its_importance_and_its_history(
    tmp_path: Path,
) -> None:
    model = grown()
    save_adapter(model, tmp_path)
    loaded = load_adapter(qwen(), tmp_path)
    assert_same(adapter_state(loaded), adapter_state(model))
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    assert rank_history(loaded) == rank_history(model) and len(rank_history(model)) == 3
    for name, layer in adapter_layers(loaded).items():
        other = adapter_layers(model)[name]
        assert (layer.r, layer.lora_alpha, layer.scaling) == (
            other.r,
            other.lora_alpha,
            other.scaling,
        )
        assert all(
            p.requires_grad
            for p in layer.parameters()
            if p is not layer.base_layer.weight and p is not layer.base_layer.bias
        )


@pytest.mark.parametrize("kind", ["adamw", "named, not foreach", "8-bit"])
def test_a_loop_that_is_stopped_in_mid_growth_goes_on_to_the_same_weights(
    tmp_path: Path, kind: str
) -> None:
    def parts(model: nn.Module) -> tuple[RankGrower, torch.optim.Optimizer]:
        return RankGrower(model, SCHEDULE), OPTIMIZERS[kind](model)

    straight = growing()
    grower, optimizer = parts(straight)
    train(straight, optimizer, range(1, 5), grower)
    save_adapter(straight, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(straight, optimizer, range(5, 9), grower)
    assert grower.finished
    if kind == "8-bit":
        kinds = {optimizer.state[p]["state1"].dtype for p in trainable(straight)}
        assert kinds == {
            torch.uint8,
            torch.float32,
        }  # tensors of 64 numbers or more, and smaller ones

    resumed = load_adapter(qwen(), tmp_path)
    grower, optimizer = parts(resumed)
    assert grower.total == 34
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(resumed, optimizer, range(5, 9), grower)
    assert_same(adapter_state(resumed), adapter_state(straight))


def rows() -> datasets.Dataset:
    ids = torch.randint(1, 97, (24, 16), generator=torch.Generator().manual_seed(1))
    return datasets.Dataset.from_dict(
        {"input_ids": ids.numpy(), "labels": ids.numpy()}
    ).with_format("torch")


def arguments(folder: Path, **overrides: object):
    settings = {
        "max_steps": 7, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_strategy": "no", "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    return training_arguments(folder, device="cpu", **settings | overrides)


def trainer(
    model: nn.Module,
    folder: Path,
    schedule: GrowthSchedule = SCHEDULE,
    callbacks: tuple = (),
    **overrides: object,
) -> AdapterTrainer:
    grower = RankGrower(model, schedule)
    return AdapterTrainer(
        model, arguments(folder, **overrides), train_dataset=rows(), callbacks=[grower, *callbacks]
    )


def test_the_callback_does_what_the_loop_does(tmp_path: Path) -> None:
    model, reference = growing(), growing().train()
    run = trainer(
        model,
        tmp_path,
        lr_scheduler_type="linear",
        warmup_steps=0,
        gradient_accumulation_steps=2,
        max_steps=6,
    )
    batches = list(run.get_train_dataloader())
    run.train()

    grower = RankGrower(reference, SCHEDULE)
    optimizer = torch.optim.AdamW(trainable(reference), lr=5e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    for step in range(1, 7):
        for micro in batches[2 * step - 2 : 2 * step]:
            (reference(input_ids=micro["input_ids"], labels=micro["labels"]).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(trainable(reference), 1.0)
        grower.observe()
        optimizer.step()
        scheduler.step()
        grower.grow(optimizer, step)
        optimizer.zero_grad()
    assert grower.finished and rank_history(model) == rank_history(reference)
    for name, tensor in adapter_state(reference).items():
        torch.testing.assert_close(adapter_state(model)[name], tensor, **TRAINED)


class Kill(TrainerCallback):
    """Kills its own process in the fifth step, between two micro-batches: after the first of two growths."""

    def on_substep_end(self, args, state, control, **_) -> None:
        if state.global_step == 4:
            shot()


def run_to_the_end(folder: Path, kill: bool = False) -> dict[str, Tensor]:
    """The command that is repeated after a kill."""
    model = growing(lora_dropout=0.2)
    callbacks = (Kill(),) if kill else ()
    run = trainer(
        model,
        folder,
        callbacks=callbacks,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 7
    return adapter_state(model)


def test_after_a_kill_in_mid_growth_the_same_command_reaches_the_same_weights(
    tmp_path: Path, one_thread: None
) -> None:
    expected = run_to_the_end(tmp_path / "straight")
    run_until_shot(
        "tests.adaptive.test_growth",
        f"run_to_the_end(Path({str(tmp_path / 'killed')!r}), kill=True)",
    )
    middle = restore_adapter(growing(lora_dropout=0.2), last_checkpoint(tmp_path / "killed"))
    assert (
        last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
        and sum(layer.r for layer in adapter_layers(middle).values()) == 34
    )
    found = run_to_the_end(tmp_path / "killed")
    assert_same(found, expected)
    assert (
        sum(
            tensor.shape[0]
            for name, tensor in found.items()
            if name.rpartition(".")[2].startswith("A")
        )
        == 40
    )


def test_a_finished_run_brings_back_the_grown_adapter(tmp_path: Path, one_thread: None) -> None:
    expected = run_to_the_end(tmp_path)
    assert_same(run_to_the_end(tmp_path), expected)


def test_the_callback_refuses_what_would_not_reach_the_budget(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="last growth would come after step 5 and the run has 5: grow by more"
    ):
        trainer(growing(), tmp_path, max_steps=5).train()
    assert trainer(growing(), tmp_path, max_steps=6).train().global_step == 6
    model = growing()
    other = torch.optim.AdamW(trainable(growing()), lr=1e-2)
    grower = RankGrower(model, SCHEDULE)
    run = AdapterTrainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[grower],
        optimizers=(other, None),
    )
    with pytest.raises(ValueError, match="does not hold the factors"):
        run.train()
