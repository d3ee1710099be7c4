"""`sparse.masks`: masks that hold, parity with PEFT's SHiRA, and what masked layers refuse."""

import copy
from pathlib import Path

import pytest
import torch
from peft import ShiraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, trainable_parameters
from lora_course.qlora import quantize_model
from lora_course.sparse import (
    GatedLoRALinear,
    GateSparsity,
    SparseDeltaLinear,
    SparseLoRALinear,
    random_places,
)
from lora_course.states import adapter_state, factor_state, use_adapter
from tests.models import batch, config, qwen
from tests.sparse.models import KINDS, adapted, trained_parameters, trainer
from tests.tolerances import EXACT

MASKED = [SparseLoRALinear, SparseDeltaLinear]


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
        torch.testing.assert_close(found[name], expected[name], **EXACT)


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


def test_a_mask_that_is_loaded_or_moved_after_a_forward_pass_is_the_one_that_counts() -> None:
    torch.manual_seed(0)
    one, other = (SparseDeltaLinear(nn.Linear(12, 10), r=2, lora_alpha=2) for _ in range(2))
    nn.init.normal_(other.values_delta)
    x = torch.randn(3, 12)
    one(x)
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one(x), other(x), **EXACT)
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
