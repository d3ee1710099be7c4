"""`quantized.layer`: LoRA at the quantised factors, its gradient, and quantising after training."""

import copy
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn

from lora_course.arguments import training_arguments
from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, merge, unmerge
from lora_course.linears import is_4bit
from lora_course.lora import LoRALinear
from lora_course.qlora import quantize_model
from lora_course.quantized import (
    QuantizedLoRALinear,
    fake_quantize,
    load_quantized,
    quantize_after_training,
    save_quantized,
)
from lora_course.states import adapter_state, factor_state, use_adapter
from lora_course.training import AdapterTrainer
from tests.models import batch, config, qwen, randomize, relative
from tests.quantized.models import GRIDS, PATTERNS, adapted
from tests.tolerances import EXACT, ROUNDED


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 8}, {"bits": 2}, {"bits_A": 2, "bits_B": 8}, *({"bits": 3} | grid for grid in GRIDS)],
    ids=str,
)
def test_forward_and_gradients_are_loras_at_the_quantised_factors(arguments: dict) -> None:
    ours = adapted(**arguments)
    plain = use_adapter(inject(qwen(), config()), factor_state(ours))
    mine, other = ours(**batch()), plain(**batch())
    torch.testing.assert_close(mine.logits, other.logits, **EXACT)
    mine.loss.backward()
    other.loss.backward()
    for name, layer in adapter_layers(ours).items():
        for key in "AB":
            assert torch.equal(
                getattr(layer, key).grad, getattr(adapter_layers(plain)[name], key).grad
            )
        assert relative(layer.factors()[0], layer.A) > 1e-3


def test_layer_computes_its_equation_with_scales_along_components() -> None:
    torch.manual_seed(0)
    base = nn.Linear(7, 5, bias=True)
    layer = QuantizedLoRALinear(base, r=3, lora_alpha=12, bits=3, granularity="channel")
    layer.B.data.normal_()
    with (
        torch.no_grad()
    ):  # components of very different size: a scale that spans them would lose the small one
        layer.A[1] *= 1e4
        layer.B[:, 1] *= 1e-4
    A, B, scaling = layer.factors()
    assert scaling == 4
    for i in range(3):
        assert relative(A[i], layer.A[i]) < 0.3 and relative(B[:, i], layer.B[:, i]) < 0.3
    for shape in ((7,), (4, 7), (2, 3, 7), (0, 7)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), base(x) + 4 * x @ A.T @ B.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.delta_weight(), 4 * B @ A)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_starts_as_the_base_without_nan_and_the_first_gradient_reaches_b(bits: int) -> None:
    base = qwen()
    reference = base(**batch()).logits
    model = inject(base, config(), layer=QuantizedLoRALinear, bits=bits)
    out = model(**batch())
    torch.testing.assert_close(out.logits, reference, **EXACT)
    out.loss.backward()
    for layer in adapter_layers(model).values():
        assert (
            layer.B.grad.isfinite().all()
            and (layer.B.grad != 0).float().mean() > 0.99
            and not layer.A.grad.any()
        )


def test_more_bits_come_closer_and_thirty_two_are_lora() -> None:
    plain = randomize(inject(qwen(), config()))
    reference = plain(**batch()).logits
    errors = {}
    for bits in (2, 3, 4, 8, 16, 32):
        model = use_adapter(
            inject(qwen(), config(), layer=QuantizedLoRALinear, bits=bits), adapter_state(plain)
        )
        errors[bits] = relative(model(**batch()).logits, reference)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert errors[2] > 10 * errors[8] and errors[16] < errors[8] / 100 and errors[32] == 0


def test_training_moves_the_parameters_between_grid_points_and_lowers_the_loss() -> None:
    model = adapted(bits=3).train()
    before, losses = adapter_state(model), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(12):
        loss = model(**batch(), use_cache=False).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (
        losses[-1] < losses[0] - 0.2
    )  # without a straight-through gradient nothing would move at all
    assert all(
        (before[key] != value).any()
        for key, value in adapter_state(model).items()
        if not key.endswith("scaling")
    )


def test_checkpointing_accumulation_autocast_and_cache_change_nothing() -> None:
    model = adapted().train()
    model(**batch(), use_cache=False).loss.backward()
    expected = [layer.A.grad.clone() for layer in adapter_layers(model).values()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for i in range(2):
        (
            model(**{k: v[i : i + 1] for k, v in batch().items()}, use_cache=False).loss / 2
        ).backward()
    for layer, gradient in zip(adapter_layers(model).values(), expected, strict=True):
        assert relative(layer.A.grad, gradient) < 1e-5
    model.gradient_checkpointing_disable()
    model.eval()
    reference = model(**batch()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert 0 < relative(model(**batch()).logits.float(), reference) < 0.02
        A = next(iter(adapter_layers(model).values())).factors()[0]
    assert A.dtype == torch.float32 and torch.equal(
        A, next(iter(adapter_layers(model).values())).factors()[0]
    )
    ids = batch()["input_ids"][:1, :4]
    kept = [
        model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*kept)


def test_a_four_bit_base_trains_and_keeps_its_factors_in_fp32() -> None:
    model = adapted(base=quantize_model(qwen(), compute_dtype=torch.float32)).train()
    model(**batch(), use_cache=False).loss.backward()
    for layer in adapter_layers(model).values():
        assert (
            is_4bit(layer.base_layer)
            and layer.A.dtype == torch.float32
            and layer.A.grad.abs().sum() > 0
        )
    with pytest.raises(TypeError, match="4-bit"):
        merge(model)


def test_merge_unmerge_and_moving_keep_the_function() -> None:
    model = adapted(bits=3)
    reference = model(**batch()).logits
    merge(model)
    torch.testing.assert_close(model(**batch()).logits, reference, **ROUNDED)
    unmerge(model)
    torch.testing.assert_close(model(**batch()).logits, reference, **ROUNDED)
    assert torch.equal(
        copy.deepcopy(model).to("cpu").to(torch.float32)(**batch()).logits, model(**batch()).logits
    )
    half = copy.deepcopy(model).bfloat16()
    assert half(**batch()).logits.isfinite().all()


def test_exported_to_peft_logits_are_equal(tmp_path: Path) -> None:
    model = adapted(fields=PATTERNS, bits=3)
    export_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(qwen(), tmp_path)
    torch.testing.assert_close(theirs(**batch()).logits, model(**batch()).logits, **ROUNDED)


def test_quantising_after_training_keeps_the_factors_and_rounds_them_in_use(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config(**PATTERNS))).eval()
    state = adapter_state(model)
    assert quantize_after_training(model, bits=4, group_size=20) is model
    kept = adapter_state(model)
    assert all(torch.equal(kept[key], state[key]) for key in state)
    layers = adapter_layers(model)
    assert {type(layer) for layer in layers.values()} == {
        QuantizedLoRALinear
    } and not model.training
    for layer in layers.values():
        A, B, _ = layer.factors()
        assert torch.equal(A, fake_quantize(layer.A, 4, "group", 20)) and torch.equal(
            B, fake_quantize(layer.B.T, 4, "group", 20).T
        )
        assert layer.A.requires_grad
    reference = model(**batch()).logits
    save_quantized(model, tmp_path)
    assert torch.equal(load_quantized(qwen(), tmp_path)(**batch()).logits, reference)


def test_own_checkpoint_keeps_parameters_and_grid_and_a_run_resumes_to_the_same_weights(
    tmp_path: Path,
) -> None:
    model = adapted(bits_A=3, bits_B=8, granularity="channel", clip=0.7)
    save_adapter(model, tmp_path / "a")
    again = load_adapter(qwen(), tmp_path / "a")
    layer = next(iter(adapter_layers(again).values()))
    assert (layer.bits_A, layer.bits_B, layer.granularity, layer.clip) == (3, 8, "channel", 0.7)
    assert all(
        torch.equal(value, adapter_state(model)[key]) for key, value in adapter_state(again).items()
    )
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)

    ids = torch.randint(97, (32, 8), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})

    def trainer(model: nn.Module) -> AdapterTrainer:
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 3,
            "seed": 4,
        }
        return AdapterTrainer(
            model,
            training_arguments(
                str(tmp_path / "run"), save_strategy="steps", disable_tqdm=True, **settings
            ),
            train_dataset=rows,
        )

    trainer(whole := adapted(bits=3)).train()
    trainer(resumed := adapted(seed=9, bits=3)).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")
    )
    expected = adapter_state(whole)
    assert all(torch.equal(value, expected[key]) for key, value in adapter_state(resumed).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "symmetric range of 1 bit"),
        ({"bits": 17}, "2 to 16"),
        ({"bits": 4.0}, "whole number"),
        ({"bits_B": 0}, "bits=0"),
        ({"granularity": "row"}, "tensor, channel, group"),
        ({"group_size": 0}, "share a scale"),
        ({"clip": 0.0}, "in (0, 1]"),
    ],
    ids=str,
)
def test_a_grid_that_makes_no_sense_is_refused_before_anything_changes(
    arguments: dict, message: str
) -> None:
    model = qwen()
    with pytest.raises(ValueError, match=re.escape(message)):
        inject(model, config(), layer=QuantizedLoRALinear, **arguments)
    assert not any(isinstance(module, LoRALinear) for module in model.modules()) and all(
        p.requires_grad for p in model.parameters()
    )
    plain = randomize(inject(qwen(), config()))
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize_after_training(plain, **arguments)
    assert {type(layer) for layer in adapter_layers(plain).values()} == {LoRALinear}
