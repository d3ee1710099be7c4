"""`lora_course.hierarchical`: cuts are slices, slices are adapters, and the two ways to train them are what they say."""

import itertools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from lora_course.arguments import training_arguments
from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.export import export_peft
from lora_course.hierarchical import NestedLoRALinear, RankSampler, at_rank, cut, matryoshka_weights
from lora_course.injection import adapter_layers, inject, merge, unload, unmerge
from lora_course.linears import is_4bit
from lora_course.lora import LoRALinear
from lora_course.qlora import quantize_model
from lora_course.states import adapter_state, concatenate, factor_state, split_state, use_adapter
from lora_course.training import AdapterTrainer
from tests.models import batch, config, qwen, randomize, relative
from tests.tolerances import EXACT, ROUNDED, TRAINED

RANKS = (1, 2, 5)


def nested(
    base: nn.Module | None = None, weighting: str = "equal", seed: int = 1, **fields: object
) -> nn.Module:
    """Rank 5, scale 12/5, factors as after training."""
    model = inject(
        base or qwen(),
        config(r=5, **fields),
        layer=NestedLoRALinear,
        ranks=RANKS,
        weighting=weighting,
    )
    return randomize(model, seed)


def batch_at(t: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(100 + t))
    return {"input_ids": ids, "labels": ids}


# ------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("weighting", ["equal", "matryoshka"])
def test_layer_computes_its_equation_at_every_cut(weighting: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(7, 4)
    layer = NestedLoRALinear(base, r=5, lora_alpha=12, ranks=RANKS, weighting=weighting)
    x = torch.randn(2, 3, 7)
    assert torch.equal(layer(x), base(x))  # B is zero
    layer.B.data.normal_()
    P = {"equal": [1, 1, 1, 1, 1], "matryoshka": [1, 2 / 3, 1 / 3, 1 / 3, 1 / 3]}[weighting]
    for b in range(1, 6):
        layer.rank = b
        expected = base(x) + sum(
            12 / 5 * P[i] * (x @ layer.A[i])[..., None] * layer.B[:, i] for i in range(b)
        )
        torch.testing.assert_close(layer(x), expected, **ROUNDED)
        A, B, scaling = layer.factors()
        assert A.shape == (b, 7) and B.shape == (4, b) and scaling == 12 / 5
        before = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), before, **ROUNDED)
        layer.unmerge()
    layer.weighted, layer.rank = False, 2
    torch.testing.assert_close(layer.delta_weight(), 12 / 5 * layer.B[:, :2] @ layer.A[:2])


def test_it_starts_as_the_base_and_as_lora_learns_b_first() -> None:
    base = qwen()
    reference = base(**batch()).logits
    model = inject(base, config(r=5), layer=NestedLoRALinear, ranks=RANKS)
    with at_rank(model, 2):
        assert torch.equal(model(**batch()).logits, reference)
        model(**batch()).loss.backward()
    for layer in adapter_layers(model).values():
        assert (
            layer.A.grad.abs().max() == 0
            and layer.B.grad[:, :2].abs().max() > 0
            and layer.B.grad[:, 2:].abs().max() == 0
        )


def test_equal_weights_at_full_rank_are_pefts_lora() -> None:
    ours, theirs = nested(), get_peft_model(qwen(), config(r=5))
    for name, layer in adapter_layers(ours).items():
        peft = theirs.base_model.model.get_submodule(name)
        peft.lora_A["default"].weight.data.copy_(layer.A)
        peft.lora_B["default"].weight.data.copy_(layer.B)
    mine, other = ours(**batch()), theirs(**batch())
    torch.testing.assert_close(mine.logits, other.logits, **ROUNDED)
    mine.loss.backward(), other.loss.backward()
    for name, layer in adapter_layers(ours).items():
        assert (
            relative(
                layer.A.grad,
                theirs.base_model.model.get_submodule(name).lora_A["default"].weight.grad,
            )
            < 1e-4
        )


def test_matryoshka_weights_are_the_mean_of_the_cuts_and_algorithm_1_up_to_its_scales() -> None:
    assert matryoshka_weights([1, 2, 4, 8]).tolist() == [1, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    model = nested(weighting="matryoshka")
    for layer in adapter_layers(model).values():
        mean = sum(layer.scaling * layer.B[:, :b] @ layer.A[:b] for b in RANKS) / len(RANKS)
        torch.testing.assert_close(layer.delta_weight(), mean, **ROUNDED)
    # The published algorithm counts down from the largest rank, with a scale for each cut; here all scales are one.
    for ranks in ((1, 2, 5), (3,), (2, 3, 4, 9)):
        counted, found = [0] * ranks[-1], 0
        for r in range(ranks[-1], 0, -1):
            found += r in ranks
            counted[r - 1] = found
        assert (matryoshka_weights(ranks) * len(ranks)).round().int().tolist() == counted


def test_a_sum_of_branches_is_one_adapter_of_the_summed_rank_with_a_scale_a_block() -> None:
    """What the notes call hierarchical: y = Σ_k s_k B_k A_k x, with ranks 16, 8 and 4."""
    torch.manual_seed(0)
    base, x = nn.Linear(40, 33), torch.randn(6, 40)
    blocks = [
        (k, scale, torch.randn(k, 40), torch.randn(33, k))
        for k, scale in ((16, 0.3), (8, 2.0), (4, 0.7))
    ]
    expected = base(x) + sum(scale * x @ A.T @ B.T for _, scale, A, B in blocks)
    whole = NestedLoRALinear(base, r=28, lora_alpha=28, ranks=(16, 24, 28))
    whole.A.data, whole.B.data = (
        torch.cat([A for *_, A, _ in blocks]),
        torch.cat([B for *_, B in blocks], 1),
    )
    whole.P.copy_(torch.cat([torch.full((k,), scale) for k, scale, *_ in blocks]))
    torch.testing.assert_close(whole(x), expected, atol=1e-3, rtol=1e-5)
    assert torch.linalg.matrix_rank(whole.delta_weight()) == 28
    states = [{"m.A": A, "m.B": B, "m.scaling": torch.tensor(s)} for _, s, A, B in blocks]
    joined = concatenate(states)
    torch.testing.assert_close(
        joined["m.B"] @ joined["m.A"], whole.delta_weight(), atol=1e-4, rtol=1e-5
    )


# ------------------------------------------------------------------------------------------------- cutting


@pytest.mark.parametrize("weighting", ["equal", "matryoshka"])
def test_a_cut_equals_a_slice_and_cuts_are_nested_at_one_scale(weighting: str) -> None:
    model = nested(weighting=weighting)
    whole, name = split_state(factor_state(model)), next(iter(adapter_layers(model)))
    previous = None
    for b in range(1, 6):
        state = split_state(cut(model, b))
        assert torch.equal(state[name]["A"], whole[name]["A"][:b]) and torch.equal(
            state[name]["B"], whole[name]["B"][:, :b]
        )
        assert float(state[name]["scaling"]) == 12 / 5
        if previous:
            assert torch.equal(state[name]["A"][:-1], previous[name]["A"]) and torch.equal(
                state[name]["B"][:, :-1], previous[name]["B"]
            )
        previous = state
        plain = use_adapter(inject(qwen(), config()), cut(model, b))
        assert {layer.r for layer in adapter_layers(plain).values()} == {b}
        with at_rank(model, b):
            torch.testing.assert_close(
                plain(**batch()).logits, model(**batch()).logits, atol=1e-6, rtol=1e-6
            )
    logits = [model(**batch()).logits]
    for b in range(1, 6):
        with at_rank(model, b):
            logits.append(model(**batch()).logits)
    assert torch.equal(logits[0], logits[5])
    assert all(relative(one, other) > 1e-3 for one, other in itertools.combinations(logits[1:], 2))


def test_a_state_that_was_cut_is_a_copy_and_training_goes_on_at_the_cut_alone() -> None:
    model = nested()
    state, before = cut(model, 2), adapter_state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with at_rank(model, 2):
        model(**batch_at(0)).loss.backward()
    optimizer.step()
    name, layer = next(iter(adapter_layers(model).items()))
    assert torch.equal(state[f"{name}.A"], before[f"{name}.A"][:2])
    assert torch.equal(layer.A[2:], before[f"{name}.A"][2:]) and torch.equal(
        layer.B[:, 2:], before[f"{name}.B"][:, 2:]
    )
    assert not torch.equal(layer.A[:2], before[f"{name}.A"][:2]) and not torch.equal(
        layer.B[:, :2], before[f"{name}.B"][:, :2]
    )


def test_only_last_trains_the_block_beyond_the_next_smaller_rank_with_the_same_output() -> None:
    model = nested()
    with at_rank(model, 5):
        expected = model(**batch_at(0)).logits
        model(**batch_at(0)).loss.backward()
    gradients = [layer.A.grad.clone() for layer in adapter_layers(model).values()]
    for b, kept in ((5, 2), (2, 1), (1, 0), (4, 2)):
        model.zero_grad()
        with at_rank(model, b, only_last=True):
            output = model(**batch_at(0))
            output.loss.backward()
        for i, layer in enumerate(adapter_layers(model).values()):
            assert layer.A.grad[:kept].abs().max().item() == 0 if kept else True
            assert layer.A.grad[b:].abs().max().item() == 0 if b < 5 else True
            assert (
                layer.A.grad[kept:b].abs().min(0).values.max() > 0
                and layer.B.grad[:, kept:b].abs().max() > 0
            )
            if b == 5:
                torch.testing.assert_close(
                    layer.A.grad[kept:], gradients[i][kept:], atol=1e-6, rtol=1e-4
                )
        if b == 5:
            assert torch.equal(output.logits, expected)


def test_the_cut_is_undone_after_the_block_and_after_an_error() -> None:
    model = nested()
    before = model(**batch()).logits
    with (
        pytest.raises(KeyError),
        at_rank(model, 1),
        at_rank(model, 2, weighted=False, only_last=True),
    ):
        raise KeyError
    assert torch.equal(model(**batch()).logits, before)
    assert all(
        (layer.rank, layer.weighted, layer.only_last) == (5, True, False)
        for layer in adapter_layers(model).values()
    )


def test_merging_at_a_cut_and_taking_it_back() -> None:
    model, base = nested(), qwen()
    with at_rank(model, 2):
        expected = model(**batch()).logits
        merge(model)
    torch.testing.assert_close(model(**batch()).logits, expected, **ROUNDED)
    with pytest.raises(RuntimeError, match="unmerge"), at_rank(model, 3):
        pass
    unmerge(model)
    for name, layer in adapter_layers(model).items():
        torch.testing.assert_close(
            layer.base_layer.weight, base.get_submodule(name).weight, atol=1e-6, rtol=1e-5
        )
    with at_rank(nested(), 1) as again:
        merge(again)
        unload(again)
    with at_rank(nested(), 1) as reference:
        torch.testing.assert_close(again(**batch()).logits, reference(**batch()).logits, **ROUNDED)


# ------------------------------------------------------------------------------------------------- files


def test_a_state_dict_keeps_the_cut_at_which_it_was_merged_and_an_older_one_is_whole() -> None:
    model, found, base = nested(weighting="matryoshka"), nested(seed=2), qwen()
    with at_rank(model, 1, weighted=False):
        merge(model)
    found.load_state_dict(model.state_dict())
    unmerge(found)
    for name, layer in adapter_layers(found).items():
        torch.testing.assert_close(
            layer.base_layer.weight, base.get_submodule(name).weight, atol=1e-6, rtol=1e-5
        )
    older = unmerge(model).state_dict()
    older |= {key: value[:2] for key, value in older.items() if key.endswith("_extra_state")}
    found.load_state_dict(older)
    layers = adapter_layers(found).values()
    assert {(layer.rank, layer.weighted, layer.merged) for layer in layers} == {(5, True, False)}
    with at_rank(model, 1):
        found.load_state_dict(model.state_dict())  # nothing is merged: it is whole
    assert {layer.rank for layer in layers} == {5}


@pytest.mark.parametrize("weighting", ["equal", "matryoshka"])
def test_peft_loads_every_cut_with_equal_logits_and_its_size_follows_the_rank(
    tmp_path: Path, weighting: str
) -> None:
    model, sizes = nested(weighting=weighting), {}
    for b in range(1, 6):
        with at_rank(model, b):
            expected = model(**batch()).logits
            folder = export_peft(model, tmp_path / str(b))
        theirs = PeftModel.from_pretrained(qwen(), folder)
        assert theirs.peft_config["default"].r == b and theirs.peft_config[
            "default"
        ].lora_alpha == pytest.approx(2.4 * b)
        torch.testing.assert_close(theirs(**batch()).logits, expected, **ROUNDED)
        sizes[b] = (folder / "adapter_model.safetensors").stat().st_size
    steps = {sizes[b + 1] - sizes[b] for b in range(1, 5)}
    row = 4 * sum(
        layer.in_features + layer.out_features for layer in adapter_layers(model).values()
    )
    assert all(abs(step - row) < 0.05 * row for step in steps)  # the rest is the header's numbers


@pytest.mark.parametrize("weighting", ["equal", "matryoshka"])
def test_a_saved_adapter_reloads_whole_with_its_ranks_and_weights(
    tmp_path: Path, weighting: str
) -> None:
    model = nested(weighting=weighting)
    with at_rank(model, 2):
        save_adapter(model, tmp_path)
    again = load_adapter(qwen(), tmp_path)
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    layer = next(iter(adapter_layers(again).values()))
    assert (layer.ranks, layer.weighting, layer.rank) == (RANKS, weighting, 5)
    assert cut(again, 2).keys() == cut(model, 2).keys() and all(
        torch.equal(cut(again, 2)[k], v) for k, v in cut(model, 2).items()
    )
    again(**batch()).loss.backward()


# ------------------------------------------------------------------------------------------------- training


def trainer(model: nn.Module, folder: Path, callbacks: list, **fields: object) -> AdapterTrainer:
    data = Dataset.from_list([{k: v[0] for k, v in batch_at(t).items()} for t in range(24)])
    defaults = {"max_steps": 9, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0,
                "per_device_train_batch_size": 1, "save_strategy": "no", "disable_tqdm": True, "bf16": False}  # fmt: skip
    args = training_arguments(folder, device="cpu", **{**defaults, **fields})
    return AdapterTrainer(
        model, args, train_dataset=data, eval_dataset=data.select(range(2)), callbacks=callbacks
    )


def test_ranks_are_drawn_by_seed_and_step_alone_and_about_equally() -> None:
    model = nested()
    first, second, other = (
        RankSampler(model, seed=0),
        RankSampler(nested(), seed=0),
        RankSampler(model, seed=1),
    )
    drawn = [first.rank(t) for t in range(1, 601)]
    assert drawn == [second.rank(t) for t in range(600, 0, -1)][::-1] and drawn != [
        other.rank(t) for t in range(1, 601)
    ]
    # 200 of each are expected, with a deviation of 11.5
    assert set(drawn) == set(RANKS) and all(150 < drawn.count(b) < 250 for b in RANKS)
    assert first.begin_step(3) == drawn[2] and all(
        layer.rank == drawn[2] for layer in adapter_layers(model).values()
    )
    first.end_step()
    assert all(layer.rank == 5 for layer in adapter_layers(model).values())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("only_last", [False, True])
def test_the_callback_does_what_the_loop_does(
    tmp_path: Path, accumulation: int, only_last: bool
) -> None:
    model, reference, seen = nested(), nested().train(), []

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, **_) -> None:
            seen.append(next(iter(adapter_layers(model).values())).rank)

        def on_evaluate(self, args, state, control, **_) -> None:
            assert {(layer.rank, layer.only_last) for layer in adapter_layers(model).values()} == {
                (5, False)
            }

    run = trainer(model, tmp_path, [RankSampler(model, 3, only_last=only_last), Watch()], gradient_accumulation_steps=accumulation,
                  eval_strategy="steps", eval_steps=4)  # fmt: skip
    batches = list(run.get_train_dataloader())
    run.train()
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    sampler = RankSampler(reference, 3, only_last=only_last)
    assert len({sampler.rank(t) for t in range(1, 10)}) > 1
    assert seen == ([sampler.rank(t) for t in range(1, 10)] if accumulation == 2 else [])
    for t in range(1, 10):
        b = sampler.begin_step(t)
        sampler.end_step()
        with at_rank(reference, b, only_last=only_last):
            for micro in batches[(t - 1) * accumulation : t * accumulation]:
                (reference(**micro).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in adapter_state(model).items():
        torch.testing.assert_close(tensor, adapter_state(reference)[name], **TRAINED)


@pytest.mark.parametrize("only_last", [False, True])
def test_rows_that_a_step_does_not_train_are_held_against_momentum_and_decay(
    only_last: bool,
) -> None:
    moved = {}
    for hold in (True, False):
        model, moved[hold] = nested().train(), set()
        layer = next(iter(adapter_layers(model).values()))
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
        )
        sampler = RankSampler(model, 0, only_last=only_last, hold=hold)
        for t in range(1, 13):
            A, B, b = layer.A.detach().clone(), layer.B.detach().clone(), sampler.begin_step(t)
            kept = max((c for c in RANKS if c < b), default=0) if only_last else 0
            model(**batch_at(t)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sampler.end_step()
            changed = {
                i
                for i in range(5)
                if not torch.equal(layer.A[i], A[i]) or not torch.equal(layer.B[:, i], B[:, i])
            }
            assert changed >= set(range(kept, b))
            moved[hold] |= changed - set(range(kept, b))
    assert moved[True] == set() and {4, 3} <= moved[False]


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            control.should_training_stop = state.global_step == 5

    straight, stopped, resumed = nested(), nested(), nested(seed=9)
    trainer(straight, tmp_path / "whole", [RankSampler(straight)], optim="adamw_torch").train()
    saving = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    trainer(stopped, tmp_path / "cut", [RankSampler(stopped), Stop()], **saving).train()
    trainer(resumed, tmp_path / "cut", [RankSampler(resumed)], **saving).train(
        resume_from_checkpoint=True
    )
    expected, found = adapter_state(straight), adapter_state(resumed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **EXACT)


def test_training_by_truncation_orders_what_slicing_a_plain_adapter_does_not() -> None:
    """A target of rank 4 with falling singular values: after truncated training each cut is near the best of its rank."""
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(24, 4))[0], torch.linalg.qr(torch.randn(20, 4))[0]
    target, x = U @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])) @ V.T, torch.randn(400, 20)
    error = {}
    for sampled in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 24, bias=False))
        model[0].weight.data.zero_()
        inject(
            model,
            LoraConfig(r=4, lora_alpha=4, target_modules=["0"]),
            layer=NestedLoRALinear,
            ranks=(1, 2, 3, 4),
        )
        sampler, optimizer = RankSampler(model), torch.optim.Adam(model.parameters(), lr=0.02)
        for t in range(1, 501):
            if sampled:
                sampler.begin_step(t)
            (model(x) - x @ target.T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            sampler.end_step()
        for b in (1, 2, 3):
            with at_rank(model, b):
                best = torch.tensor([4.0, 2.0, 1.0, 0.5])[b:].norm()
                error[sampled, b] = ((model[0].delta_weight() - target).norm() / best).item()
    assert all(error[True, b] < 1.15 and error[False, b] > 1.3 for b in (1, 2)), error
    assert all(error[True, b] < error[False, b] for b in (1, 2, 3)), error


def test_checkpointing_autocast_and_moving_change_nothing() -> None:
    model = nested(weighting="matryoshka").train()
    with at_rank(model, 2):
        model(**batch(), use_cache=False).loss.backward()
        expected = [layer.B.grad.clone() for layer in adapter_layers(model).values()]
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch(), use_cache=False).loss.backward()
    for layer, gradient in zip(adapter_layers(model).values(), expected, strict=True):
        torch.testing.assert_close(layer.B.grad, gradient, atol=1e-6, rtol=1e-4)
    reference = model.eval()(**batch()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(model(**batch()).logits.float(), reference) < 0.03  # bf16 has eight bits
    layer = next(iter(adapter_layers(model).values()))
    assert model.to(torch.float64) and layer.P.dtype == torch.float64
    assert relative(model(**batch()).logits.float(), reference) < 1e-5
    assert layer.to("meta").P.device.type == "meta"


def test_it_works_on_a_4bit_base(tmp_path: Path) -> None:
    model = nested(quantize_model(qwen()))
    weights = {
        name: layer.base_layer.weight.data.clone() for name, layer in adapter_layers(model).items()
    }
    trainer(model, tmp_path, [RankSampler(model)], max_steps=3).train()
    for name, layer in adapter_layers(model).items():
        assert is_4bit(layer.base_layer) and torch.equal(
            layer.base_layer.weight.data, weights[name]
        )
    with at_rank(model.eval(), 2), torch.no_grad():
        expected = model(**batch()).logits
        theirs = PeftModel.from_pretrained(
            quantize_model(qwen()), export_peft(model, tmp_path / "peft")
        )
        torch.testing.assert_close(theirs(**batch()).logits, expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(TypeError, match="4-bit"):
            merge(model)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("arguments", "words"), [
    ({"ranks": (1, 2)}, r"ranks=\(1, 2\), r=3.*the last is r"),
    ({"ranks": (2, 1, 3)}, "rising"),
    ({"ranks": (1, 1, 3)}, "rising"),
    ({"ranks": (0, 3)}, "from 1 on"),
    ({"ranks": ()}, "the last is r"),
    ({"weighting": "sum"}, "weighting='sum'"),
])  # fmt: skip
def test_ranks_that_cannot_be_served_are_refused_and_nothing_is_changed(
    arguments: dict, words: str
) -> None:
    model = qwen()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=words):
        inject(model, config(), layer=NestedLoRALinear, **arguments)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names


def test_default_ranks_are_powers_of_two_and_the_whole() -> None:
    found = {r: NestedLoRALinear(nn.Linear(3, 3), r, 1.0).ranks for r in (1, 2, 3, 8, 12)}
    assert found == {1: (1,), 2: (1, 2), 3: (1, 2, 3), 8: (1, 2, 4, 8), 12: (1, 2, 4, 8, 12)}


def test_what_has_no_such_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NestedLoRALinear does not support rank_pattern"):
        inject(qwen(), config(rank_pattern={"q_proj": 2}), layer=NestedLoRALinear)
    model = nested()
    for b in (0, 6, -1, 2.0):
        with pytest.raises(ValueError, match="from 1 to its rank, 5"), at_rank(model, b):
            pass
    plain = inject(qwen(), config())
    for function in (RankSampler, lambda m: cut(m, 1)):
        with pytest.raises(ValueError, match="injected with LoRALinear"):
            function(plain)
    with pytest.raises(ValueError, match="trains all cuts in each step"):
        RankSampler(nested(weighting="matryoshka"))
    with pytest.raises(ValueError, match="another model"):
        trainer(nested(), tmp_path, [RankSampler(model)]).train()
    with pytest.raises(ValueError, match="needs rank 5"):
        use_adapter(model, adapter_state(inject(qwen(), config(r=4), layer=NestedLoRALinear)))
    assert isinstance(next(iter(adapter_layers(model).values())), LoRALinear)


def test_a_training_that_was_stopped_by_hand_leaves_the_adapter_whole(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **_) -> None:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    model = inject(qwen(), config(r=8), NestedLoRALinear, ranks=(1, 2, 4, 8))
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    args = training_arguments(
        tmp_path, device="cpu", bf16=False, max_steps=1, gradient_accumulation_steps=2, save_strategy="no",
        per_device_train_batch_size=1,
    )  # fmt: skip
    sampler = RankSampler(
        model, seed=next(s for s in range(9) if RankSampler(model, s).rank(1) < 8)
    )
    trainer = AdapterTrainer(model, args, train_dataset=data, callbacks=[sampler, Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert {layer.rank for layer in adapter_layers(model).values()} == {8}
