"""`adalora.allocator`: step by step with PEFT's AdaLoRA, the budget, resuming, pruning, and what is refused."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import TrainerCallback

from lora_course.adalora import (
    AdaLoRALinear,
    RankAllocator,
    kept_triplets,
    prune_triplets,
    regularizer,
)
from lora_course.arguments import training_arguments
from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, injection_of, merge, trainable_parameters
from lora_course.linears import is_4bit
from lora_course.qlora import quantize_model
from lora_course.states import adapter_state, use_adapter
from lora_course.training import AdapterTrainer
from tests.adalora.models import adapted, config, optimizer_of, peft_of, randomize
from tests.models import batch, qwen, relative
from tests.tolerances import EXACT, ROUNDED, TRAINED

LAYERS = 14  # two blocks of seven linear layers


def batch_at(t: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(100 + t))
    return {"input_ids": ids, "labels": ids}


def train(
    model: nn.Module,
    allocator: RankAllocator,
    steps: range,
    optimizer: torch.optim.Optimizer | None = None,
) -> list:
    """The loop by hand; what `step` returned at each step."""
    optimizer, chosen = optimizer or optimizer_of(model), []
    for t in steps:
        (model(**batch_at(t)).loss + regularizer(model)).backward()
        optimizer.step()
        chosen.append(allocator.step(t))
        optimizer.zero_grad()
    return chosen


def trained(**fields: object) -> tuple[nn.Module, list]:
    model = adapted(**fields)
    return model, train(model, RankAllocator(model), range(1, 12))


def peft_scores(allocator, name: str) -> torch.Tensor:
    """What PEFT's `mask_to_budget` ranks the triplets of a module by, from its own functions."""
    s = {key: allocator._element_score(f"{name}.lora_{key}.default") for key in "AEB"}
    return allocator._combine_ipt(s["E"], torch.stack([s["A"].mean(1), s["B"].mean(0)], 1))


def test_each_step_gives_pefts_averages_scores_budget_masks_and_weights() -> None:
    """In fp64: scores are products of differences of products, in which fp32 keeps three digits."""
    ours = adapted().double()
    theirs = peft_of(ours, qwen().double())
    allocator, peft, peft_config = (
        RankAllocator(ours),
        theirs.base_model.rankallocator,
        theirs.peft_config["default"],
    )
    layers, optimizers, allocated = (
        adapter_layers(ours),
        [optimizer_of(ours), optimizer_of(theirs)],
        [],
    )
    for t in range(1, 12):
        mine, other = ours(**batch_at(t)).loss + regularizer(ours), theirs(**batch_at(t)).loss
        torch.testing.assert_close(
            mine.float(), other
        )  # PEFT adds its penalty to a loss that transformers made fp32
        mine.backward(), other.backward()
        optimizers[0].step(), optimizers[1].step()
        assert allocator.budget(t) == peft.budget_schedule(t)[0]
        if t == allocator.final:  # the last choice is made with the scores of the step before
            compare_scores(layers, peft)
        chosen = allocator.step(t)
        theirs.base_model.update_and_allocate(t)
        if t < allocator.final:
            compare_scores(layers, peft)
        if chosen:
            allocated.append(t)
        for name, layer in layers.items():
            module = theirs.base_model.model.get_submodule(name)
            if chosen:
                assert layer.mask.tolist() == peft_config.rank_pattern[f"{name}.lora_E.default"]
                assert chosen[name] == sum(layer.mask.tolist())
            for key in "AEB":
                torch.testing.assert_close(
                    getattr(layer, key),
                    getattr(module, f"lora_{key}")["default"],
                    atol=1e-9,
                    rtol=1e-9,
                )
            assert torch.equal(layer.E == 0, module.lora_E["default"] == 0)
        optimizers[0].zero_grad(), optimizers[1].zero_grad()
    assert allocated == [4, 6, 8]
    assert (
        sum(kept_triplets(ours).values()) == 2 * LAYERS
        and len(set(kept_triplets(ours).values())) > 1
    )


def compare_scores(layers: dict[str, AdaLoRALinear], peft) -> None:
    for name, layer in layers.items():
        for key in "AEB":
            full = f"{name}.lora_{key}.default"
            assert relative(getattr(layer, f"sensitivity_{key}"), peft.exp_avg_ipt[full]) < 1e-8
            assert relative(getattr(layer, f"uncertainty_{key}"), peft.exp_avg_unc[full]) < 1e-8
        assert relative(layer.scores(), peft_scores(peft, name)) < 1e-8


def test_the_budget_falls_cubically_and_is_met_exactly_at_every_allocation() -> None:
    model = adapted()
    allocator = RankAllocator(model)
    assert [allocator.budget(t) for t in (1, 2)] == [4 * LAYERS] * 2  # warm-up
    assert allocator.budget(5) == int(2 * LAYERS + 2 * LAYERS * (1 - 3 / 6) ** 3)
    assert [allocator.budget(t) for t in (8, 9, 11)] == [2 * LAYERS] * 3
    chosen = train(model, allocator, range(1, 12))
    assert [t for t, c in enumerate(chosen, 1) if c] == [4, 6, 8]
    for t in (4, 6, 8):
        assert sum(chosen[t - 1].values()) == allocator.budget(t)
    kept = [int((layer.E != 0).sum()) for layer in adapter_layers(model).values()]
    assert (
        kept == list(kept_triplets(model).values()) == list(chosen[7].values())
        and sum(kept) == 2 * LAYERS
    )


def test_masked_triplets_may_come_back_until_the_last_allocation_and_not_after() -> None:
    model = adapted(tfinal=3, deltaT=3)
    allocator, optimizer = RankAllocator(model), optimizer_of(model)
    train(model, allocator, range(1, 4), optimizer)
    masked = [layer.E[~layer.mask] for layer in adapter_layers(model).values()]
    assert sum(len(E) for E in masked) > 0 and all((E == 0).all() for E in masked)
    train(model, allocator, range(4, 5), optimizer)
    assert any((layer.E[~layer.mask] != 0).any() for layer in adapter_layers(model).values())
    train(model, allocator, range(5, 9), optimizer)
    last = {name: layer.mask.clone() for name, layer in adapter_layers(model).items()}
    for t in range(9, 12):
        train(model, allocator, range(t, t + 1), optimizer)
        for name, layer in adapter_layers(model).items():
            assert torch.equal(layer.mask, last[name]) and (layer.E[~layer.mask] == 0).all()
            assert (
                layer.sensitivity_A.numel() == layer.uncertainty_E.numel() == 0
            )  # no score update in the final phase


def test_exactly_the_budget_is_kept_where_scores_are_equal() -> None:
    model = adapted()
    allocator = RankAllocator(model)
    for layer in adapter_layers(model).values():
        for name in "AEB":
            (
                getattr(layer, f"sensitivity_{name}").fill_(1.0),
                getattr(layer, f"uncertainty_{name}").fill_(1.0),
            )
    for budget in (56, 41, 28, 1):
        with torch.no_grad():
            allocator._allocate(budget)
        assert sum(kept_triplets(model).values()) == budget


def test_without_a_final_phase_the_budget_is_met_at_the_last_step() -> None:
    model, chosen = trained(tfinal=0, deltaT=7)
    assert [t for t, c in enumerate(chosen, 1) if c] == [7, 11]
    assert sum(kept_triplets(model).values()) == 2 * LAYERS


def test_a_skipped_last_allocation_is_made_up_for() -> None:
    model = adapted()
    allocator, optimizer = RankAllocator(model), optimizer_of(model)
    train(model, allocator, range(1, 8), optimizer)
    assert sum(train(model, allocator, range(9, 10), optimizer)[0].values()) == 2 * LAYERS


def test_without_the_allocator_nothing_is_pruned_and_prune_says_so() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    for t in range(1, 12):
        model(**batch_at(t)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(kept_triplets(model).values()) == {4}
    with pytest.raises(
        ValueError, match=r"56 triplets are kept and the target is 28.*callbacks=\[RankAllocator"
    ):
        prune_triplets(model)


def test_a_step_that_overflowed_is_not_scored() -> None:
    model = adapted()
    allocator = RankAllocator(model)
    train(model, allocator, range(1, 2))
    before = {name: layer.scores() for name, layer in adapter_layers(model).items()}
    model(**batch_at(2)).loss.backward()
    next(iter(adapter_layers(model).values())).B.grad[0, 0] = float("inf")
    allocator.step(2)
    assert all(
        torch.equal(layer.scores(), before[name]) for name, layer in adapter_layers(model).items()
    )


def trainer(model: nn.Module, folder: Path, **fields: object) -> AdapterTrainer:
    ids = torch.randint(97, (64, 12), generator=torch.Generator().manual_seed(7))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format(
        "torch"
    )
    defaults = {
        "max_steps": 11, "per_device_train_batch_size": 2, "learning_rate": 0.1, "optim": "sgd", "save_strategy": "no", "bf16": False,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "disable_tqdm": True, "max_grad_norm": 0.0, "weight_decay": 0.0,
        "use_cpu": True,
    }  # fmt: skip
    args = training_arguments(folder, device="cpu", **{**defaults, **fields})
    return AdapterTrainer(
        model,
        args,
        train_dataset=data,
        callbacks=[RankAllocator(model)],
        auxiliary_loss=regularizer,
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_callback_does_what_the_loop_does(tmp_path: Path, accumulation: int) -> None:
    model, reference = adapted(), adapted().train()
    run = trainer(model, tmp_path, gradient_accumulation_steps=accumulation)
    batches = list(run.get_train_dataloader())
    run.train()
    logged = {entry["step"]: entry["ranks"] for entry in run.state.log_history if "ranks" in entry}

    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    allocator, chosen = RankAllocator(reference), {}
    for t in range(1, 12):
        for micro in batches[(t - 1) * accumulation : t * accumulation]:
            ((reference(**micro).loss + regularizer(reference)) / accumulation).backward()
        optimizer.step()
        if found := allocator.step(t):
            chosen[t] = found
        optimizer.zero_grad()
    assert logged == chosen and list(logged) == [4, 6, 8] and sum(logged[8].values()) == 2 * LAYERS
    for name, tensor in adapter_state(model).items():
        torch.testing.assert_close(tensor, adapter_state(reference)[name], **TRAINED)


@pytest.mark.parametrize("stop", [5, 10])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights_and_ranks(
    tmp_path: Path, stop: int
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            control.should_training_stop = state.global_step == stop

    straight, stopped, resumed = adapted(), adapted(), adapted(seed=9)
    whole = trainer(straight, tmp_path / "whole")
    whole.train()
    first = trainer(stopped, tmp_path / "cut", save_strategy="steps", save_steps=3)
    first.add_callback(Stop())
    first.train()
    second = trainer(resumed, tmp_path / "cut", save_strategy="steps", save_steps=3)
    second.train(resume_from_checkpoint=True)
    expected, found = adapter_state(straight), adapter_state(resumed)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **EXACT)
    assert [e for e in second.state.log_history if "ranks" in e] == [
        e for e in whole.state.log_history if "ranks" in e
    ]


def test_an_adapter_saved_in_the_middle_reloads_with_averages_and_mask(tmp_path: Path) -> None:
    model = adapted()
    train(model, RankAllocator(model), range(1, 6))
    again = load_adapter(qwen(), save_adapter(model, tmp_path))
    assert torch.equal(again(**batch()).logits, model(**batch()).logits) and kept_triplets(
        again
    ) == kept_triplets(model)
    for layer, other in zip(
        adapter_layers(model).values(), adapter_layers(again).values(), strict=True
    ):
        assert torch.equal(layer.scores(), other.scores())
    assert injection_of(again).config.target_r == 2


def test_a_pruned_adapter_is_smaller_of_equal_output_and_goes_on(tmp_path: Path) -> None:
    model, _ = trained()
    expected, kept, before = (
        model(**batch()).logits,
        kept_triplets(model),
        trainable_parameters(model),
    )
    assert prune_triplets(model) is model
    torch.testing.assert_close(model(**batch()).logits, expected, **ROUNDED)
    assert (
        {name: layer.r for name, layer in adapter_layers(model).items()}
        == kept
        == kept_triplets(model)
    )
    assert trainable_parameters(model) < before
    assert {layer.scaling for layer in adapter_layers(model).values()} == {3.0}
    again = load_adapter(qwen(), save_adapter(model, tmp_path))
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    loss = again(**batch()).loss
    (loss + regularizer(again)).backward()
    optimizer_of(again).step()
    assert again(**batch()).loss < loss
    prune_triplets(again)  # nothing is left to take out


def test_modules_of_rank_zero_train_on_save_and_export(tmp_path: Path) -> None:
    model, _ = trained()
    first, *others = adapter_layers(model).values()
    first.mask.fill_(False), first.E.data.zero_()
    expected = prune_triplets(model)(**batch()).logits
    assert first.r == 0 and first.A.shape == (0, 48)
    (model(**batch()).loss + regularizer(model)).backward()
    again = load_adapter(qwen(), save_adapter(model, tmp_path / "ours"))
    torch.testing.assert_close(again(**batch()).logits, expected, **EXACT)
    theirs = PeftModel.from_pretrained(qwen(), export_peft(model, tmp_path / "peft"))
    torch.testing.assert_close(theirs(**batch()).logits, expected, **ROUNDED)
    assert not hasattr(theirs.base_model.model.model.layers[0].self_attn.q_proj, "lora_A")


def test_peft_loads_a_pruned_and_an_unpruned_adapter_with_equal_logits(tmp_path: Path) -> None:
    model, _ = trained()
    expected = model(**batch()).logits
    for folder in ("unpruned", "pruned"):
        theirs = PeftModel.from_pretrained(qwen(), export_peft(model, tmp_path / folder))
        assert theirs.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(theirs(**batch()).logits, expected, **ROUNDED)
        prune_triplets(model)
    size = {
        folder: (tmp_path / folder / "adapter_model.safetensors").stat().st_size
        for folder in ("unpruned", "pruned")
    }
    assert size["pruned"] < 0.8 * size["unpruned"]


def test_it_works_on_a_4bit_base(tmp_path: Path) -> None:
    def base() -> nn.Module:
        return quantize_model(qwen())

    model = randomize(inject(base(), config(), layer=AdaLoRALinear))
    weights = {
        name: layer.base_layer.weight.data.clone() for name, layer in adapter_layers(model).items()
    }
    train(model, RankAllocator(model), range(1, 12))
    assert all(is_4bit(layer.base_layer) for layer in adapter_layers(model).values())
    assert sum(kept_triplets(model).values()) == 2 * LAYERS
    for name, layer in adapter_layers(model).items():
        assert (
            torch.equal(layer.base_layer.weight.data, weights[name])
            and layer.base_layer.weight.grad is None
        )
    model.eval()
    expected = prune_triplets(model)(**batch()).logits
    theirs = PeftModel.from_pretrained(base(), export_peft(model, tmp_path))
    torch.testing.assert_close(theirs(**batch()).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(TypeError, match="4-bit"):
        merge(model)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_scoring_without_gradients_is_refused(set_to_none: bool) -> None:
    model = adapted()
    allocator = RankAllocator(model)
    with pytest.raises(ValueError, match="counted from 1"):
        allocator.step(0)
    model(**batch_at(1)).loss.backward()
    model.zero_grad(set_to_none=set_to_none)
    with pytest.raises(RuntimeError, match=r"after backward\(\) and before zero_grad\(\)"):
        allocator.step(1)
    assert all(layer.scores().max() == 0 for layer in adapter_layers(model).values())
    with pytest.raises(RuntimeError, match="no step has been scored"):
        allocator.step(9)


def test_a_run_shorter_than_the_schedule_and_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set total_step=7"):
        trainer(adapted(), tmp_path, max_steps=7).train()
    other = trainer(adapted(), tmp_path)
    other.add_callback(RankAllocator(adapted()))
    with pytest.raises(ValueError, match="another model"):
        other.train()
    plain = inject(qwen(), LoraConfig(r=2, target_modules="all-linear"))
    for function in (RankAllocator, kept_triplets, prune_triplets, regularizer):
        with pytest.raises(ValueError, match="injected with LoRALinear"):
            function(plain)


def test_pruning_refuses_a_masked_triplet_in_use_and_states_that_do_not_fit() -> None:
    model, _ = trained()
    layer = next(layer for layer in adapter_layers(model).values() if not layer.mask.all())
    layer.E.data.fill_(1.0)
    with pytest.raises(ValueError, match="masked λ is not zero"):
        prune_triplets(model)
    state = adapter_state(model)
    name = next(iter(adapter_layers(model)))
    with pytest.raises(ValueError, match=r"\[4, 1\] is expected"):
        use_adapter(model, state | {f"{name}.E": torch.ones(3, 1)})
