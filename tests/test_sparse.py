"""`lora_course.sparse`: gates that reach zero and are pruned, masks that hold, parity with PEFT's SHiRA, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.export import export_peft
from lora_course.injection import (
    adapter_layers,
    disabled,
    inject,
    merge,
    trainable_parameters,
    unload,
)
from lora_course.linears import is_4bit
from lora_course.lora import LoRALinear
from lora_course.qlora import quantize_model
from lora_course.sparse import (
    GatedLoRALinear,
    GateSparsity,
    Places,
    SparseDeltaLinear,
    SparseLoRALinear,
    SparseProduct,
    prune,
    random_places,
    ranks,
    soft_threshold,
)
from lora_course.states import adapter_state, factor_state, use_adapter
from lora_course.training import AdapterTrainer, training_arguments
from tests.models import Calls, batch, config, qwen, relative

KINDS = [GatedLoRALinear, SparseLoRALinear, SparseDeltaLinear]
MASKED = [SparseLoRALinear, SparseDeltaLinear]


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Trained numbers as after training: none is zero, so that nothing agrees by accident."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer."):
                parameter.data.normal_(std=1.0 if name == "gate" else 0.2, generator=generator)
    return model


def adapted(
    kind: type[LoRALinear], seed: int = 1, base: nn.Module | None = None, **fields: object
) -> nn.Module:
    arguments = {key: fields.pop(key) for key in ("sparsity", "mask", "gate_init") if key in fields}
    return randomize(inject(base or qwen(), config(**fields), layer=kind, **arguments), seed)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_and_then_learns(kind: type) -> None:
    base = qwen()
    reference = base(**batch()).logits
    model = inject(base, config(), layer=kind)
    torch.testing.assert_close(model(**batch()).logits, reference, atol=0, rtol=0)
    optimizer = torch.optim.Adam(trained_parameters(model), lr=0.01)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(3):
        losses.append(model(**batch()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert all(
        not torch.equal(p, start[name]) for name, p in model.named_parameters() if p.requires_grad
    )


@pytest.mark.parametrize("kind", KINDS)
def test_layer_computes_its_equation_on_any_shape_merges_and_unmerges(kind: type) -> None:
    torch.manual_seed(0)
    base = nn.Linear(11, 7, bias=True)
    weight = base.weight.detach().clone()
    layer = kind(base, r=3, lora_alpha=12)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    if kind is GatedLoRALinear:
        delta = 4 * layer.B @ torch.diag(layer.gate) @ layer.A
    elif kind is SparseLoRALinear:
        delta = 4 * layer.matrix("B") @ layer.matrix("A")
    else:
        delta = 4 * layer.matrix("delta")
    for shape in ((11,), (4, 11), (2, 3, 11), (0, 11)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), base(x) + x @ delta.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.delta_weight(), delta, atol=1e-5, rtol=1e-5)
    x = torch.randn(4, 11)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(base.weight, weight + delta, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(base.weight, weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_accumulation_autocast_cache_and_dropout(kind: type) -> None:
    model = adapted(kind).train()
    model(**batch(), use_cache=False).loss.backward()
    expected = [p.grad.clone() for p in trained_parameters(model)]
    assert all(gradient.abs().max() > 0 for gradient in expected)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for i in range(2):
        (
            model(**{k: v[i : i + 1] for k, v in batch().items()}, use_cache=False).loss / 2
        ).backward()
    for parameter, gradient in zip(trained_parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    model.gradient_checkpointing_disable()
    model.eval()
    exact = model(**batch())
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**batch())
    assert relative(rounded.logits.float(), exact.logits) < 0.02  # bf16 keeps 8 bits
    rounded.loss.backward()
    found = [p.grad.flatten() for p in trained_parameters(model)]
    assert {gradient.dtype for gradient in found} == {torch.float32}
    assert (
        relative(torch.cat(found), torch.cat([gradient.flatten() for gradient in expected])) < 0.1
    )
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with sdpa_kernel(SDPBackend.MATH):
        ids = batch(1, 6)["input_ids"]
        assert torch.equal(
            model.generate(ids, use_cache=True, **kwargs),
            model.generate(ids, use_cache=False, **kwargs),
        )
    layer = kind(nn.Linear(6, 5), r=2, lora_alpha=6, lora_dropout=0.5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.ones(64, 6)
    spread = lambda y: (y - y[0]).abs().max().item()  # noqa: E731
    assert spread(layer(x)) > 0.1 and spread(layer.eval()(x)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_reloaded_switched_and_taken_out(kind: type, tmp_path: Path) -> None:
    model = adapted(kind, rank_pattern={"q_proj": 2}, use_rslora=True)
    expected = model(**batch()).logits
    torch.manual_seed(123)  # the masks of the model that loads are drawn anew, and then replaced
    again = load_adapter(qwen(), save_adapter(model, tmp_path))
    assert torch.equal(again(**batch()).logits, expected)
    state, reloaded = adapter_state(model), adapter_state(again)
    assert state.keys() == reloaded.keys() and all(
        torch.equal(state[k], reloaded[k]) and state[k].dtype == reloaded[k].dtype for k in state
    )
    other = adapted(kind, seed=5, rank_pattern={"q_proj": 2}, use_rslora=True)
    assert relative(other(**batch()).logits, expected) > 0.01
    assert torch.equal(use_adapter(other, state)(**batch()).logits, expected)
    with disabled(other):
        assert torch.equal(other(**batch()).logits, qwen()(**batch()).logits)
    assert torch.equal(unload(other)(**batch()).logits, qwen()(**batch()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_on_a_4bit_base(kind: type, tmp_path: Path) -> None:
    model = adapted(kind, base=quantize_model(qwen())).train()
    weights = [layer.base_layer.weight.data.clone() for layer in adapter_layers(model).values()]
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=0.01)
    losses = []
    for _ in range(3):
        losses.append(model(**batch()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for layer, weight in zip(adapter_layers(model).values(), weights, strict=True):
        assert is_4bit(layer.base_layer) and torch.equal(layer.base_layer.weight.data, weight)
    model.eval()
    again = load_adapter(quantize_model(qwen()), save_adapter(model, tmp_path))
    torch.testing.assert_close(
        again.eval()(**batch()).logits, model(**batch()).logits, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(TypeError, match="4-bit"):
        merge(model)


@pytest.mark.parametrize("kind", [GatedLoRALinear, SparseLoRALinear])
def test_peft_loads_the_exported_factors_with_equal_logits(kind: type, tmp_path: Path) -> None:
    model = adapted(kind, rank_pattern={"q_proj": 2})
    theirs = PeftModel.from_pretrained(qwen(), export_peft(model, tmp_path))
    assert theirs.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(
        theirs(**batch()).logits, model(**batch()).logits, atol=1e-5, rtol=1e-5
    )


# ------------------------------------------------------------------------------------------------- gates


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
            == sum(ranks(model).values())
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
    before = ranks(model)
    GateSparsity(model, 0.0).step(optimizer)
    assert layer.gate[1] != 0 and ranks(model) == before


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
    expected, kept, before = model(**batch()).logits, ranks(model), trainable_parameters(model)
    assert prune(model) is model
    torch.testing.assert_close(model(**batch()).logits, expected, atol=1e-5, rtol=1e-5)
    layers = adapter_layers(model)
    assert (
        {name: layer.r for name, layer in layers.items()} == kept == ranks(model)
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
    assert torch.equal(again(**batch()).logits, model(**batch()).logits) and ranks(again) == kept
    loss = again(**batch()).loss
    loss.backward()
    torch.optim.SGD(trained_parameters(again), lr=0.1).step()
    assert again(**batch()).loss < loss
    theirs = PeftModel.from_pretrained(qwen(), export_peft(model, tmp_path / "pruned"))
    torch.testing.assert_close(theirs(**batch()).logits, expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(theirs.base_model.model.model.layers[0].self_attn.q_proj, "lora_A")  # rank 0
    export_peft(closed(adapted(GatedLoRALinear)), tmp_path / "unpruned")
    size = {
        f: (tmp_path / f / "adapter_model.safetensors").stat().st_size
        for f in ("unpruned", "pruned")
    }
    assert size["pruned"] < 0.8 * size["unpruned"]


def trainer(
    model: nn.Module, folder: Path, *callbacks: TrainerCallback, **fields: object
) -> AdapterTrainer:
    ids = torch.randint(97, (64, 12), generator=torch.Generator().manual_seed(7))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format(
        "torch"
    )
    defaults = {
        "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 0.1, "save_strategy": "no", "bf16": False, "warmup_steps": 2,
        "lr_scheduler_type": "linear", "disable_tqdm": True, "max_grad_norm": 0.0, "weight_decay": 0.0,
    }  # fmt: skip
    args = training_arguments(folder, device="cpu", **{**defaults, **fields})
    return AdapterTrainer(model, args, train_dataset=data, callbacks=list(callbacks))


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
    assert ranks(model) == ranks(reference) and 0 < sum(ranks(model).values()) < 42
    for name, tensor in adapter_state(model).items():
        torch.testing.assert_close(tensor, adapter_state(reference)[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights_and_masks(
    kind: type, tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            control.should_training_stop = state.global_step == 5

    def run(
        model: nn.Module, folder: str, *more: TrainerCallback, resume: bool = False
    ) -> nn.Module:
        callbacks = [GateSparsity(model, lambda t: 0.3 * t)] if kind is GatedLoRALinear else []
        one = trainer(
            model,
            tmp_path / folder,
            *callbacks,
            *more,
            save_strategy="steps",
            save_steps=3,
            weight_decay=0.1,
        )
        one.train(resume_from_checkpoint=resume)
        return model

    straight = run(adapted(kind), "whole")
    run(adapted(kind), "cut", Stop())
    resumed = run(adapted(kind, seed=9), "cut", resume=True)
    expected, found = adapter_state(straight), adapter_state(resumed)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=0, rtol=0)


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


# ------------------------------------------------------------------------------------------------- masks


def test_the_masks_have_the_stated_number_of_places_and_differ_between_layers() -> None:
    model = adapted(SparseLoRALinear, r=8, sparsity=0.75)
    for layer in adapter_layers(model).values():
        for name, (m, n) in {"A": (8, layer.in_features), "B": (layer.out_features, 8)}.items():
            mask, matrix = layer.mask(name), layer.matrix(name)
            assert mask.shape == matrix.shape == (m, n) and mask.dtype == torch.bool
            assert (
                int(mask.sum()) == round(0.25 * m * n) == getattr(layer, f"values_{name}").numel()
            )
            assert torch.equal(matrix != 0, mask)
    expected = sum(
        round(8 * l.in_features / 4) + round(8 * l.out_features / 4)
        for l in adapter_layers(model).values()
    )
    assert trainable_parameters(model) == expected
    layers = list(adapter_layers(model).values())
    assert not torch.equal(layers[0].mask("A"), layers[7].mask("A"))


def test_nnz_of_delta_w_is_the_size_of_the_mask_and_its_rank_is_not_bounded_by_r() -> None:
    model = adapted(SparseDeltaLinear, r=2)
    for layer in adapter_layers(model).values():
        delta, count = layer.delta_weight(), 2 * (layer.in_features + layer.out_features)
        assert (
            int((delta != 0).sum())
            == int(layer.mask("delta").sum())
            == layer.values_delta.numel()
            == count
        )
        assert torch.linalg.matrix_rank(delta) > 20
    plain = inject(qwen(), config(r=2))
    assert trainable_parameters(model) == trainable_parameters(plain)


def test_the_magnitude_mask_takes_the_largest_weights() -> None:
    model = inject(qwen(), config(r=2), layer=SparseDeltaLinear, mask="magnitude")
    for layer in adapter_layers(model).values():
        size, mask = layer.base_layer.weight.abs(), layer.mask("delta")
        assert size[mask].min() >= size[~mask].max()


def test_places_are_distinct_and_every_one_is_as_likely() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(2000):
        places = random_places(20, 7)
        assert len(places.unique()) == 7
        counts[places] += 1
    assert (counts - 700).abs().max() < 5 * (2000 * 0.35 * 0.65) ** 0.5
    assert sorted(random_places(50, 50).tolist()) == list(range(50))


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
], ids=["adamw", "sgd"])  # fmt: skip
def test_masked_entries_never_move_and_masks_stay(kind: type, make) -> None:
    model = adapted(kind)
    layers = adapter_layers(model).values()
    masks = [{name: layer.mask(name) for name in layer.shapes()} for layer in layers]
    before = [{name: layer.matrix(name).detach() for name in layer.shapes()} for layer in layers]
    optimizer = make(trained_parameters(model))
    for t in range(4):
        model(**batch(length=9 + t)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, mask, old in zip(layers, masks, before, strict=True):
        for name in layer.shapes():
            now = layer.matrix(name)
            assert torch.equal(layer.mask(name), mask[name])
            assert (now[~mask[name]] == 0).all() and (
                now[mask[name]] != old[name][mask[name]]
            ).all()
    states = sum(
        v.numel()
        for state in optimizer.state.values()
        for v in state.values()
        if torch.is_tensor(v) and v.numel() > 1
    )
    assert states in (trainable_parameters(model), 2 * trainable_parameters(model))


@pytest.mark.parametrize("kind", MASKED)
def test_masks_are_buffers_that_move_and_keep_their_type(kind: type) -> None:
    model = adapted(kind)
    layer = next(iter(adapter_layers(model).values()))
    name = next(iter(layer.shapes()))
    mask = layer.mask(name)
    assert (
        f"indices_{name}" in dict(layer.named_buffers()) and f"indices_{name}" in layer.state_dict()
    )
    assert not any("indices" in n for n, _ in layer.named_parameters())
    double = copy.deepcopy(model).to(torch.float64)
    moved = next(iter(adapter_layers(double).values()))
    assert getattr(moved, f"indices_{name}").dtype == torch.int32 and torch.equal(
        moved.mask(name), mask
    )
    torch.testing.assert_close(
        double(**batch()).logits.float(), model(**batch()).logits, atol=1e-4, rtol=1e-4
    )
    meta = copy.deepcopy(layer).to("meta")
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}


def test_the_sparse_products_gradients_are_those_of_a_masked_dense_matrix() -> None:
    torch.manual_seed(0)
    x, values = torch.randn(2, 3, 6, dtype=torch.double), torch.randn(9, dtype=torch.double)
    indices = random_places(30, 9).sort().values.int()
    places = Places.of(indices.long(), 5, 6)
    assert (
        len(places.rows.unique()) < 5 or len(places.columns.unique()) < 6
    )  # a row or column without entries is among them
    x.requires_grad_(), values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: SparseProduct.apply(x, v, places), (x, values))
    dense = torch.zeros(30, dtype=torch.double)
    dense[indices.long()] = values.detach()
    dense = dense.view(5, 6).requires_grad_()
    (x @ dense.T).square().sum().backward()
    of_x = x.grad.clone()
    x.grad = None
    SparseProduct.apply(x, values, places).square().sum().backward()
    torch.testing.assert_close(values.grad, dense.grad.flatten()[indices.long()])
    torch.testing.assert_close(x.grad, of_x)


@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_forward_and_trained_steps_equal_pefts_shira_with_the_same_mask(scaling: float) -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ours = adapted(SparseDeltaLinear, r=3, lora_alpha=3 * scaling, base=qwen().double()).double()
    theirs = get_peft_model(qwen().double(), ShiraConfig(r=3, target_modules=names)).double()
    for name, layer in adapter_layers(ours).items():
        peft = theirs.base_model.model.get_submodule(name)
        places = layer.mask("delta").nonzero().T.int()  # rows, columns
        assert places.shape == peft.shira_indices["default"].shape
        peft.shira_indices["default"] = places
        peft.shira_weight["default"].data = layer.values_delta.data.clone()
        peft.set_scale("default", scaling)
    optimizers = [
        torch.optim.AdamW(trained_parameters(m), lr=0.02, weight_decay=0.1) for m in (ours, theirs)
    ]
    for t in range(4):
        mine, other = ours(**batch(length=8 + t)), theirs(**batch(length=8 + t))
        torch.testing.assert_close(mine.logits, other.logits, atol=1e-9, rtol=1e-9)
        for out, optimizer in zip((mine, other), optimizers, strict=True):
            out.logits.square().mean().backward()  # a loss in 64 bits, which transformers' own is not
            optimizer.step()
            optimizer.zero_grad()
    for name, layer in adapter_layers(ours).items():
        found = theirs.base_model.model.get_submodule(name).shira_weight["default"]
        torch.testing.assert_close(
            layer.values_delta, found, atol=1e-8, rtol=1e-7
        )  # Adam divides by the gradient's size


def test_training_makes_no_dense_delta_w() -> None:
    layer = SparseDeltaLinear(nn.Linear(40, 30), r=1, lora_alpha=1)
    nn.init.normal_(layer.values_delta)
    x = torch.randn(2, 40, requires_grad=True)
    with Calls() as calls:
        layer(x).sum().backward()
    computed = [
        out for name, _, out in calls.made if name != "aten.t.default"
    ]  # the base's weight, seen from the other side
    sizes = [
        t.numel()
        for out in computed
        for t in (out if isinstance(out, (tuple, list)) else [out])
        if isinstance(t, torch.Tensor)
    ]
    assert x.grad is not None and len(sizes) > 20 and max(sizes) < 30 * 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_of_16_bits_is_summed_in_32(dtype: torch.dtype) -> None:
    layer = SparseDeltaLinear(nn.Linear(12, 10).to(dtype), r=2, lora_alpha=2)
    nn.init.normal_(layer.values_delta)
    x = torch.randn(3, 12).to(dtype).requires_grad_()
    with Calls() as calls:
        layer(x).float().square().sum().backward()
    assert [
        args[0].dtype for name, args, _ in calls.made if "per_sample_weights_backward" in name
    ] == [torch.float32]
    assert x.grad.dtype == dtype and layer.values_delta.grad.dtype == torch.float32
    exact = copy.deepcopy(layer).double()
    exact(x.detach().double()).square().sum().backward()
    torch.testing.assert_close(
        layer.values_delta.grad.double(), exact.values_delta.grad, atol=0.1, rtol=0.05
    )  # y has 8 bits


def test_a_mask_that_is_loaded_or_moved_after_a_forward_pass_is_the_one_that_counts() -> None:
    torch.manual_seed(0)
    one, other = (SparseDeltaLinear(nn.Linear(12, 10), r=2, lora_alpha=2) for _ in range(2))
    nn.init.normal_(other.values_delta)
    x = torch.randn(3, 12)
    one(x)
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one(x), other(x), atol=0, rtol=0)
    torch.testing.assert_close(one(x), one.base_layer(x) + x @ one.delta_weight().T)
    with torch.inference_mode():  # a mask met first in evaluation can be trained afterwards
        fresh = copy.deepcopy(one)
        fresh(x)
    fresh = copy.deepcopy(one)
    with torch.inference_mode():
        fresh(x)
    fresh(x).sum().backward()
    fresh.load_state_dict(
        {
            **one.state_dict(),
            "indices_delta": one.indices_delta.flip(0).sub(119).neg().contiguous(),
        },
        assign=True,
    )
    torch.testing.assert_close(fresh(x), fresh.base_layer(x) + x @ fresh.delta_weight().T)
    for indices in (
        torch.arange(44),
        torch.arange(60, 104),
    ):  # two that are equal in version, and perhaps in place of memory
        fresh.load_state_dict({**fresh.state_dict(), "indices_delta": indices.int()}, assign=True)
        torch.testing.assert_close(fresh(x), fresh.base_layer(x) + x @ fresh.delta_weight().T)
    twin = copy.deepcopy(one).double()
    torch.testing.assert_close(
        twin(x.double()),
        twin.base_layer(x.double()) + x.double() @ twin.delta_weight().double().T,
        atol=1e-6,
        rtol=1e-6,
    )


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("kind", "fields", "words"), [
    (GatedLoRALinear, {"gate_init": "zeros"}, "gate_init='zeros'.*'normal' or 'ones'"),
    (SparseLoRALinear, {"sparsity": 1.0}, r"sparsity=1.0.*\[0, 1\)"),
    (SparseLoRALinear, {"sparsity": -0.1}, "sparsity=-0.1"),
    (SparseDeltaLinear, {"mask": "snip"}, "mask='snip'.*'random' or 'magnitude'"),
    (SparseDeltaLinear, {"r": 25}, "asks for 2400 trained weights of the 2304.*up to 24"),
    (SparseDeltaLinear, {"init_lora_weights": "gaussian"}, "ΔW starts at zero"),
    (SparseLoRALinear, {"r": 0}, "PEFT|r=0|positive"),
])  # fmt: skip
def test_impossible_arguments_are_refused_and_nothing_is_changed(
    kind: type, fields: dict, words: str
) -> None:
    model = qwen()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=words):
        adapted(kind, base=model, **fields)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names


def test_what_a_mask_on_delta_w_has_not_is_refused_by_name(tmp_path: Path) -> None:
    model = adapted(SparseDeltaLinear)
    for function in (factor_state, lambda m: export_peft(m, tmp_path)):
        with pytest.raises(NotImplementedError, match="no low-rank factors.*save_adapter"):
            function(model)
    with pytest.raises(TypeError, match="4-bit base holds codes"):
        inject(quantize_model(qwen()), config(), layer=SparseDeltaLinear, mask="magnitude")


def test_gates_refuse_other_models_optimisers_and_penalties(tmp_path: Path) -> None:
    plain = inject(qwen(), LoraConfig(r=2, target_modules="all-linear"))
    for function in (ranks, prune, lambda m: GateSparsity(m, 1.0)):
        with pytest.raises(ValueError, match="injected with LoRALinear.*GatedLoRALinear"):
            function(plain)
    model = adapted(GatedLoRALinear)
    for penalty in (-1.0, float("nan"), float("inf"), lambda t: -t):
        with pytest.raises(ValueError, match="finite number of 0 or more"):
            GateSparsity(model, penalty)
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    sparsity = GateSparsity(model, 1.0)
    sparsity.step(optimizer)
    prune(closed(model))
    with pytest.raises(ValueError, match="does not train the gate of.*anew after prune"):
        sparsity.step(optimizer)
    with pytest.raises(ValueError, match="another model"):
        trainer(adapted(GatedLoRALinear), tmp_path, sparsity).train()


@pytest.mark.parametrize("kind", MASKED)
def test_states_that_do_not_fit_are_refused(kind: type) -> None:
    model = adapted(kind)
    name, layer = next(iter(adapter_layers(model).items()))
    state, key = adapter_state(model), f"{name}.indices_{next(iter(layer.shapes()))}"
    for damaged in (
        state[key].flip(0),
        state[key] + 48 * 48,
        state[key] - 48 * 48,
        state[key].float(),
    ):
        with pytest.raises(ValueError, match="mask is damaged"):
            use_adapter(model, state | {key: damaged})
    other = adapter_state(adapted(kind, r=2))
    with pytest.raises(ValueError, match="own r and sparsity"):
        use_adapter(model, other)
    with pytest.raises(ValueError, match="another kind of layer"):
        use_adapter(model, adapter_state(adapted(GatedLoRALinear)))
    gated = adapted(GatedLoRALinear)
    with pytest.raises(ValueError, match=r"gate for .* is \[4\]; \[3\]"):
        use_adapter(gated, adapter_state(gated) | {f"{name}.gate": torch.ones(4)})
