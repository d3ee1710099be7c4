"""`sparse.gates`: gates that reach zero, open again, and are pruned."""

import functools
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, trainable_parameters
from lora_course.runs import read_mark
from lora_course.sparse import (
    GatedLoRALinear,
    GateSparsity,
    open_gates,
    prune_gates,
    soft_threshold,
)
from lora_course.states import adapter_state
from tests.models import batch, config, qwen
from tests.sparse.models import adapted, trained_parameters, trainer
from tests.tolerances import ROUNDED, TRAINED


def test_the_threshold_is_the_proximal_operator_and_its_zeros_are_exact() -> None:
    x = torch.tensor([-1.5, -0.3, -0.1, 0.0, 0.2, 0.3, 0.30001, 0.5, 2.0])
    by_hand = torch.tensor([-1.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.00001, 0.2, 1.7])
    torch.testing.assert_close(soft_threshold(x, 0.3), by_hand, atol=1e-7, rtol=0)
    assert (soft_threshold(x, 0.3)[1:6] == 0).all() and torch.equal(soft_threshold(x, 0.0), x)
    # argmin over z of (z − x)²/2 + τ|z|, on a grid
    grid = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    objective = (grid[:, None] - x.double()).square() / 2 + 0.3 * grid.abs()[:, None]
    torch.testing.assert_close(
        soft_threshold(x, 0.3).double(), grid[objective.argmin(0)], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
], ids=["sgd", "adamw"])  # fmt: skip
def test_a_step_is_the_optimisers_and_then_the_threshold_at_its_rate(make) -> None:
    model, plain = adapted(GatedLoRALinear), adapted(GatedLoRALinear)
    sparsity = GateSparsity(model, lambda t: 0.5 * t)
    optimizer, reference = make(trained_parameters(model)), make(trained_parameters(plain))
    for t in range(1, 4):
        for one, other in ((model, optimizer), (plain, reference)):
            one(**batch()).loss.backward()
            other.step()
            other.zero_grad()
        rate = optimizer.param_groups[0]["lr"]
        opened = sparsity.step(optimizer, t)
        for layer in adapter_layers(plain).values():
            g = layer.gate.data
            layer.gate.data = torch.where(
                g.abs() > rate * 0.5 * t, g - g.sign() * rate * 0.5 * t, torch.zeros_like(g)
            )
        for layer, other in zip(
            adapter_layers(model).values(), adapter_layers(plain).values(), strict=True
        ):
            torch.testing.assert_close(layer.gate, other.gate)
            assert torch.equal(layer.gate == 0, other.gate == 0)
            (
                torch.testing.assert_close(layer.A, other.A),
                torch.testing.assert_close(layer.B, other.B),
            )
        assert (
            opened
            == sum(open_gates(model).values())
            == sum(int((layer.gate != 0).sum()) for layer in adapter_layers(model).values())
        )
    assert 0 < opened < 3 * 14


def test_each_gate_is_thresholded_at_the_rate_of_its_own_group() -> None:
    model = adapted(GatedLoRALinear, gate_init="ones")
    layers = list(adapter_layers(model).values())
    for layer in layers:
        layer.gate.data.fill_(1.0)
    optimizer = torch.optim.SGD(
        [
            {"params": [layers[0].gate], "lr": 0.5},
            {"params": [l.gate for l in layers[1:]], "lr": 0.01},
        ],
        lr=1.0,
    )
    GateSparsity(model, 1.0).step(optimizer)
    assert layers[0].gate.tolist() == [0.5] * 3
    torch.testing.assert_close(layers[1].gate, torch.full((3,), 0.99))


def test_a_closed_rank_stands_still_and_its_gate_can_open_again() -> None:
    model = adapted(GatedLoRALinear)
    layer = next(iter(adapter_layers(model).values()))
    layer.gate.data[1] = 0
    model(**batch()).loss.backward()
    assert layer.A.grad[1].abs().max() == layer.B.grad[:, 1].abs().max() == 0
    assert layer.A.grad[0].abs().max() > 0 and layer.gate.grad[1] != 0
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    optimizer.step()
    before = open_gates(model)
    GateSparsity(model, 0.0).step(optimizer)
    assert layer.gate[1] != 0 and open_gates(model) == before


def test_gates_start_normal_or_at_one_and_then_the_layer_is_lora() -> None:
    torch.manual_seed(0)
    gate = GatedLoRALinear(nn.Linear(4, 4), r=4000, lora_alpha=1).gate
    assert abs(gate.mean().item()) < 0.06 and gate.std().item() == pytest.approx(
        1, abs=0.05
    )  # four standard errors
    torch.manual_seed(0)
    ours = inject(qwen(), config(), layer=GatedLoRALinear, gate_init="ones")
    torch.manual_seed(0)
    plain = inject(qwen(), config())
    for model in (ours, plain):
        for layer in adapter_layers(model).values():
            nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(2))
    for layer, other in zip(
        adapter_layers(ours).values(), adapter_layers(plain).values(), strict=True
    ):
        other.A.data.copy_(layer.A)
    torch.testing.assert_close(ours(**batch()).logits, plain(**batch()).logits)


def closed(model: nn.Module) -> nn.Module:
    """Some gates at zero, all of the first module's."""
    for i, layer in enumerate(adapter_layers(model).values()):
        layer.gate.data[: 3 if i == 0 else i % 3] = 0
    return model


def test_a_pruned_adapter_is_smaller_of_equal_output_and_goes_on(tmp_path: Path) -> None:
    model = closed(adapted(GatedLoRALinear))
    expected, kept, before = model(**batch()).logits, open_gates(model), trainable_parameters(model)
    assert prune_gates(model) is model
    torch.testing.assert_close(model(**batch()).logits, expected, **ROUNDED)
    layers = adapter_layers(model)
    assert (
        {name: layer.r for name, layer in layers.items()} == kept == open_gates(model)
        and 0 in kept.values()
        and 3 in kept.values()
    )
    assert (
        trainable_parameters(model)
        == sum(l.r * (l.in_features + l.out_features + 1) for l in layers.values())
        < before
    )
    assert {layer.scaling for layer in layers.values()} == {4.0}
    again = load_adapter(qwen(), save_adapter(model, tmp_path / "ours"))
    assert (
        torch.equal(again(**batch()).logits, model(**batch()).logits) and open_gates(again) == kept
    )
    loss = again(**batch()).loss
    loss.backward()
    torch.optim.SGD(trained_parameters(again), lr=0.1).step()
    assert again(**batch()).loss < loss
    theirs = PeftModel.from_pretrained(qwen(), export_peft(model, tmp_path / "pruned"))
    torch.testing.assert_close(theirs(**batch()).logits, expected, **ROUNDED)
    assert not hasattr(theirs.base_model.model.model.layers[0].self_attn.q_proj, "lora_A")  # rank 0
    export_peft(closed(adapted(GatedLoRALinear)), tmp_path / "unpruned")
    size = {
        f: (tmp_path / f / "adapter_model.safetensors").stat().st_size
        for f in ("unpruned", "pruned")
    }
    assert size["pruned"] < 0.8 * size["unpruned"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_callback_does_what_the_loop_does_under_a_schedule_of_rates(
    tmp_path: Path, accumulation: int
) -> None:
    model, reference = adapted(GatedLoRALinear), adapted(GatedLoRALinear).train()
    penalty = lambda t: 0.3 * t  # noqa: E731
    run = trainer(
        model,
        tmp_path,
        GateSparsity(model, penalty),
        optim="sgd",
        gradient_accumulation_steps=accumulation,
    )
    batches = list(run.get_train_dataloader())
    run.train()
    optimizer = torch.optim.SGD(trained_parameters(reference), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: t / 2 if t < 2 else (8 - t) / 6
    )
    sparsity = GateSparsity(reference, penalty)
    for t in range(1, 9):
        for micro in batches[(t - 1) * accumulation : t * accumulation]:
            (reference(**micro).loss / accumulation).backward()
        optimizer.step()
        sparsity.step(optimizer, t)
        schedule.step()
        optimizer.zero_grad()
    assert open_gates(model) == open_gates(reference) and 0 < sum(open_gates(model).values()) < 42
    for name, tensor in adapter_state(model).items():
        torch.testing.assert_close(tensor, adapter_state(reference)[name], **TRAINED)


def test_a_step_that_overflowed_shrinks_no_gate() -> None:
    model = adapted(GatedLoRALinear)
    optimizer = torch.optim.SGD(trained_parameters(model), lr=1.0)
    optimizer.step_was_skipped = True
    before = [layer.gate.clone() for layer in adapter_layers(model).values()]
    GateSparsity(model, 0.5).step(optimizer)
    assert all(
        torch.equal(layer.gate, gate)
        for layer, gate in zip(adapter_layers(model).values(), before, strict=True)
    )


def ramp(t: int, top: float) -> float:
    return top * min(1.0, t / 4)


@pytest.mark.parametrize(
    ("penalty", "described"),
    [
        (functools.partial(ramp, top=2.0), "ramp(top=2.0)"),
        (numpy.float32(2.0), 2.0),
        (torch.tensor(2.0), 2.0),
    ],
)
def test_a_penalty_of_any_kind_is_described_as_json_holds_it(
    tmp_path: Path, penalty: Any, described: object
) -> None:
    model = adapted(GatedLoRALinear)
    fields = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(model, tmp_path, GateSparsity(model, penalty), **fields).train()
    run = read_mark(tmp_path / "checkpoint-2")["run"]
    assert run["callbacks"] == {"GateSparsity": {"penalty": described}}


def test_gates_refuse_other_models_optimisers_and_penalties(tmp_path: Path) -> None:
    plain = inject(qwen(), LoraConfig(r=2, target_modules="all-linear"))
    for function in (open_gates, prune_gates, lambda m: GateSparsity(m, 1.0)):
        with pytest.raises(ValueError, match="injected with LoRALinear.*GatedLoRALinear"):
            function(plain)
    model = adapted(GatedLoRALinear)
    for penalty in (-1.0, float("nan"), float("inf"), lambda t: -t):
        with pytest.raises(ValueError, match="finite number of 0 or more"):
            GateSparsity(model, penalty)
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    sparsity = GateSparsity(model, 1.0)
    sparsity.step(optimizer)
    prune_gates(closed(model))
    with pytest.raises(ValueError, match="does not train the gate of.*anew after prune"):
        sparsity.step(optimizer)
    with pytest.raises(ValueError, match="another model"):
        trainer(adapted(GatedLoRALinear), tmp_path, sparsity).train()
