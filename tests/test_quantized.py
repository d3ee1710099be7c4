"""`lora_course.quantized`: the grid, the straight-through gradient, torch's fake quantisation, packed files, and what is refused."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, merge, unmerge
from lora_course.linears import is_4bit
from lora_course.lora import LoRALinear
from lora_course.qlora import quantize_model
from lora_course.quantized import (
    FILE,
    GRANULARITIES,
    QuantizedLoRALinear,
    dequantize,
    fake_quantize,
    load_quantized,
    pack,
    quantize,
    quantize_after_training,
    save_quantized,
    unpack,
)
from lora_course.states import adapter_state, factor_state, use_adapter
from lora_course.training import AdapterTrainer, training_arguments
from tests.models import batch, config, qwen, randomize, relative

# 48, 80 and 24 are no multiples of 20: the last group of a row is shorter
GRIDS = [
    {"granularity": "tensor"},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 20},
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapted(
    seed: int = 1, base: nn.Module | None = None, fields: dict | None = None, **arguments: object
) -> nn.Module:
    arguments = {"bits": 4, "group_size": 20} | arguments
    return randomize(
        inject(base or qwen(), config(**fields or {}), layer=QuantizedLoRALinear, **arguments), seed
    )


# -------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_error_is_at_most_half_a_step_and_quantising_twice_changes_nothing(
    grid: dict, bits: int
) -> None:
    x = normal(7, 48) * torch.logspace(-6, 3, 7)[:, None]  # rows of very different size
    codes, scale = quantize(x, bits, **grid)
    step = dequantize(torch.ones_like(codes), scale, **grid)
    values = fake_quantize(x, bits, **grid)
    # x / step and code · step are rounded: 2^-24 of a number that is up to 2^bits half steps
    assert ((x - values).abs() <= step / 2 * (1 + 2.0 ** (bits - 22))).all() and (
        x - values
    ).abs().max() > 0
    assert codes.abs().max() == 2 ** (bits - 1) - 1 and (scale > 0).all()
    assert scale.numel() == {"tensor": 1, "channel": 7, "group": 21}[grid["granularity"]]
    assert torch.equal(values, dequantize(codes, scale, **grid))
    if (
        bits <= 8
    ):  # codes · scale is exact: whoever multiplies, in whatever order, gets these numbers
        assert torch.equal(values.double(), codes.double() * step.double())
    again = fake_quantize(values, bits, **grid)
    assert torch.equal(again, values) if bits <= 8 else relative(again, values) < 2.0 ** -(bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantising_twice_is_exact_for_every_size_of_the_largest_number(bits: int) -> None:
    largest = torch.linspace(1, 2, 2**16 + 1)[:, None]  # a row each, over a whole power of two
    x = torch.cat(
        [largest, largest * torch.rand(largest.shape, generator=torch.Generator().manual_seed(0))],
        1,
    )
    values = fake_quantize(x, bits, "channel")
    assert torch.equal(fake_quantize(values, bits, "channel"), values)


def test_groups_lie_within_a_row_and_each_has_a_scale_of_its_own() -> None:
    x = normal(3, 10)
    x[1, 4:8] *= 1000
    large = fake_quantize(x, 3, "group", 4)
    alone = torch.cat(
        [
            torch.cat([fake_quantize(part, 3, "tensor") for part in row[None].split(4, 1)], 1)
            for row in x
        ]
    )
    assert torch.equal(large, alone)
    rest = torch.ones(3, 10, dtype=torch.bool)
    rest[1, 4:8] = False
    assert relative(large[rest], x[rest]) < 0.25  # one large group spoils no other …
    assert not fake_quantize(x, 3, "tensor")[rest].any()  # … which one scale for all does


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tiny", [0.0, 1e-42, 3e-39, 1e-30])
def test_zeros_and_the_smallest_numbers_give_no_nan(grid: dict, tiny: float) -> None:
    x = torch.full((4, 48), tiny, requires_grad=True)
    values = fake_quantize(x, 4, **grid)
    values.sum().backward()
    assert values.isfinite().all() and (quantize(x.detach(), 4, **grid)[1] > 0).all()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert (values - x).abs().max() <= max(tiny, 1e-38)


def test_what_is_not_finite_stays_visible() -> None:
    x = normal(2, 8)
    x[1, 3] = float("inf")
    assert (
        fake_quantize(x, 4, "channel")[1].isnan().any()
        and fake_quantize(x, 4, "channel")[0].isfinite().all()
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_and_gradients_equal_torchs_fake_quantisation(bits: int) -> None:
    x = normal(6, 40).requires_grad_()
    weight, top = normal(6, 40, seed=1), 2 ** (bits - 1) - 1
    for clip in (1.0, 0.4):
        for granularity in ("tensor", "channel"):
            _, scale = quantize(x.detach(), bits, granularity, clip=clip)
            if granularity == "tensor":
                theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), 0, -top, top)
            else:
                theirs = torch.fake_quantize_per_channel_affine(
                    x, scale, torch.zeros(6, dtype=torch.int32), 0, -top, top
                )
            ours = fake_quantize(x, bits, granularity, clip=clip)
            torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
            (expected,) = torch.autograd.grad((theirs * weight).sum(), x)
            (found,) = torch.autograd.grad((ours * weight).sum(), x)
            assert torch.equal(found, expected)
            assert bool((found == 0).any()) == (
                clip < 1
            )  # what is cut gets no gradient; with clip 1 nothing is cut


def test_recorded_errors_of_a_random_update_come_out() -> None:
    """Relative error of B A, r = 8, normal factors: figures from one random pair of another shape, so to a fifth."""
    errors = {}
    for bits, granularity in ((8, "tensor"), (4, "tensor"), (4, "group"), (2, "tensor")):
        found = []
        for seed in range(4):
            A, B = normal(8, 256, seed=seed), normal(256, 8, seed=10 + seed)
            quantised = fake_quantize(B.T, bits, granularity).T @ fake_quantize(
                A, bits, granularity
            )
            found.append(relative(quantised, B @ A))
        errors[bits, granularity] = sum(found) / 4
    expected = {
        (8, "tensor"): 0.012,
        (4, "tensor"): 0.209,
        (4, "group"): 0.149,
        (2, "tensor"): 1.05,
    }
    assert errors == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("bits", range(2, 17))
def test_packing_takes_exactly_these_bits_and_gives_the_integers_back(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (5, 7), generator=torch.Generator().manual_seed(bits)).to(
        torch.int16
    )
    codes[0, :2] = torch.tensor([-top, top])
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-35 * bits // 8)
    assert torch.equal(unpack(packed, bits, codes.shape), codes)
    with pytest.raises(ValueError, match="bytes are no 36 numbers"):
        unpack(pack(torch.zeros(100), bits), bits, (36,))


def test_two_numbers_of_four_bits_lie_in_a_byte_lowest_first() -> None:
    assert pack(torch.tensor([-7, 7, 0]), 4).tolist() == [0 + 16 * 14, 7]


# ------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 8}, {"bits": 2}, {"bits_A": 2, "bits_B": 8}, *({"bits": 3} | grid for grid in GRIDS)],
    ids=str,
)
def test_forward_and_gradients_are_loras_at_the_quantised_factors(arguments: dict) -> None:
    ours = adapted(**arguments)
    plain = use_adapter(inject(qwen(), config()), factor_state(ours))
    mine, other = ours(**batch()), plain(**batch())
    torch.testing.assert_close(mine.logits, other.logits, atol=0, rtol=0)
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
    torch.testing.assert_close(out.logits, reference, atol=0, rtol=0)
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
    torch.testing.assert_close(model(**batch()).logits, reference, atol=1e-5, rtol=1e-5)
    unmerge(model)
    torch.testing.assert_close(model(**batch()).logits, reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        copy.deepcopy(model).to("cpu").to(torch.float32)(**batch()).logits, model(**batch()).logits
    )
    half = copy.deepcopy(model).bfloat16()
    assert half(**batch()).logits.isfinite().all()


# --------------------------------------------------------------------------------------- files, after training


PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 7}, "use_rslora": True}


@pytest.mark.parametrize(
    "arguments",
    [{"bits": b} for b in (2, 3, 4, 8)] + [{"bits_A": 2, "bits_B": 32}, {"clip": 0.5}, *GRIDS[:2]],
    ids=str,
)
def test_what_is_loaded_computes_what_was_saved_bit_for_bit(
    arguments: dict, tmp_path: Path
) -> None:
    model = adapted(fields=PATTERNS, **arguments)
    reference = model(**batch()).logits
    save_quantized(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_quantized(qwen(), tmp_path)
    assert torch.equal(loaded(**batch()).logits, reference)
    found, expected = factor_state(loaded), factor_state(model)
    assert found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in found
    )
    assert {type(layer) for layer in adapter_layers(loaded).values()} == {LoRALinear}
    assert all(
        p.requires_grad for layer in adapter_layers(loaded).values() for p in (layer.A, layer.B)
    )


def test_files_are_as_small_as_the_bits_say(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(512, 640))
    sizes = {}
    for bits in (2, 3, 4, 8, 32):
        model = inject(
            copy.deepcopy(base),
            config(r=8, target_modules=["0"], task_type=None),
            layer=QuantizedLoRALinear,
            bits=bits,
        )
        sizes[bits] = save_quantized(model, tmp_path / str(bits)).stat().st_size
    numbers, header = 8 * (512 + 640), 1200
    for bits, size in sizes.items():
        payload = numbers * (bits + (32 / 64 if bits < 32 else 0)) / 8
        assert payload < size < payload + header, bits
    plain = save_adapter(
        inject(copy.deepcopy(base), config(r=8, target_modules=["0"], task_type=None)),
        tmp_path / "plain",
    )
    assert sizes[4] < (plain / "adapter.safetensors").stat().st_size / 5.5


def test_the_stored_integers_are_those_of_quantize(tmp_path: Path) -> None:
    model = adapted(bits_A=4, bits_B=2)
    tensors = load_file(save_quantized(model, tmp_path))
    for name, layer in adapter_layers(model).items():
        for key, rows, bits in (("A", layer.A.detach(), 4), ("B", layer.B.detach().T, 2)):
            codes, scale = quantize(rows, bits, "group", 20)
            assert torch.equal(unpack(tensors[f"{name}.{key}.codes"], bits, rows.shape), codes)
            assert torch.equal(tensors[f"{name}.{key}.scale"], scale)
    assert len(tensors) == 4 * len(adapter_layers(model))


def test_exported_to_peft_logits_are_equal(tmp_path: Path) -> None:
    model = adapted(fields=PATTERNS, bits=3)
    export_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(qwen(), tmp_path)
    torch.testing.assert_close(
        theirs(**batch()).logits, model(**batch()).logits, atol=1e-5, rtol=1e-5
    )


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


# ------------------------------------------------------------------------------------------ what is refused


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


def test_other_layers_merged_models_and_lost_trainings_are_refused(tmp_path: Path) -> None:
    plain, model = randomize(inject(qwen(), config())), adapted()
    with pytest.raises(ValueError, match="quantize_after_training"):
        save_quantized(plain, tmp_path)
    with pytest.raises(ValueError, match="QuantizedLoRALinear"):
        quantize_after_training(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        quantize_after_training(merge(plain))
    next(iter(adapter_layers(model).values())).B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        save_quantized(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_that_are_missing_cut_changed_foreign_or_for_another_base_are_refused(
    tmp_path: Path,
) -> None:
    model, base = adapted(), qwen()
    with pytest.raises(FileNotFoundError, match="save_quantized"):
        load_quantized(base, tmp_path)
    path = save_quantized(model, tmp_path)
    assert path == tmp_path / FILE
    whole = path.read_bytes()
    for content, message in (
        (whole[:-100], "cut short"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged"),
        (whole.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'), "version 9"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_quantized(base, tmp_path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not written by save_quantized"):
        load_quantized(base, tmp_path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="matches no linear layer"):
        load_quantized(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    wider = qwen()
    wider.set_submodule("model.layers.0.mlp.up_proj", nn.Linear(48, 96))
    with pytest.raises(ValueError, match="another base model"):
        load_quantized(wider, tmp_path)
    assert not any(isinstance(module, LoRALinear) for m in (base, wider) for module in m.modules())
    with pytest.warns(UserWarning, match="not those that the adapter"):
        load_quantized(qwen(seed=5), tmp_path)
    assert load_quantized(base, tmp_path)(**batch()).logits.shape == (2, 9, 97)


def test_description_is_json_in_the_file_and_says_the_grid(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(save_quantized(adapted(bits_A=2, bits_B=4), tmp_path), "pt") as file:
        description = json.loads(file.metadata()["lora_course"])
    assert description["grid"] == {
        "bits_A": 2,
        "bits_B": 4,
        "granularity": "group",
        "group_size": 20,
    }
    assert set(GRANULARITIES) == {grid["granularity"] for grid in GRIDS}
