"""`lora_course.lora`: the layer, in parity with PEFT on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5ForConditionalGeneration

from lora_course import lora
from lora_course.injection import adapter_layers, disabled, inject, merge, unmerge
from lora_course.lora import LoRALinear
from lora_course.states import adapter_state, use_adapter
from tests.models import Calls, batch, config, pair, qwen, randomize, relative

PARITY = [
    {},
    {"r": lora.LARGEST_COPIED_RANK + 2},  # B is multiplied as it lies, up to that rank transposed
    {"use_rslora": True},
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": r".*layers\.1\..*(gate|v)_proj"},
    {"rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"k_proj": 7}},
    {
        "exclude_modules": ["o_proj"],
        "layers_to_transform": [1],
        "target_modules": ["o_proj", "up_proj"],
    },
]


@pytest.mark.parametrize("fields", PARITY, ids=str)
def test_forward_gradients_and_merged_weights_equal_pefts(fields: dict) -> None:
    ours, theirs = pair(**fields)
    mine, other = ours(**batch()), theirs(**batch())
    torch.testing.assert_close(mine.logits, other.logits, atol=1e-5, rtol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    merge(ours)
    theirs.merge_adapter()
    for name, layer in adapter_layers(ours).items():
        peft = theirs.base_model.model.get_submodule(name)
        assert relative(layer.A.grad, peft.lora_A["default"].weight.grad) < 1e-5
        assert relative(layer.B.grad, peft.lora_B["default"].weight.grad) < 1e-5
        torch.testing.assert_close(
            layer.base_layer.weight, peft.base_layer.weight, atol=1e-6, rtol=1e-6
        )


def test_trained_steps_equal_pefts() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            model(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, layer in adapter_layers(ours).items():
        peft = theirs.base_model.model.get_submodule(name)
        # Adam divides by the gradient's own size, which amplifies the last bits of small gradients.
        torch.testing.assert_close(layer.A, peft.lora_A["default"].weight, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(layer.B, peft.lora_B["default"].weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        ours(**batch()).logits, theirs(**batch()).logits, atol=1e-4, rtol=1e-4
    )


def test_dropout_drops_the_same_elements_as_pefts_and_none_in_eval() -> None:
    ours, theirs = pair(lora_dropout=0.4, target_modules=["v_proj"], layers_to_transform=[0])
    ours.train(), theirs.train()
    torch.manual_seed(5)
    mine = ours(**batch()).logits
    torch.manual_seed(5)
    torch.testing.assert_close(mine, theirs(**batch()).logits, atol=1e-5, rtol=1e-5)
    ours.eval()
    assert not torch.allclose(mine, ours(**batch()).logits, atol=1e-3)
    torch.testing.assert_close(ours(**batch()).logits, ours(**batch()).logits, atol=0, rtol=0)


def test_layer_computes_its_equation_on_any_shape() -> None:
    torch.manual_seed(0)
    base = nn.Linear(7, 5, bias=True)
    layer = LoRALinear(base, r=3, lora_alpha=12)
    layer.B.data.normal_()
    for shape in ((7,), (4, 7), (2, 3, 7), (0, 7)):
        x = torch.randn(shape)
        expected = base(x) + x @ (12 / 3 * layer.B @ layer.A).t()
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert LoRALinear(base, r=4, lora_alpha=12, use_rslora=True).scaling == pytest.approx(6)


@pytest.mark.parametrize("r", [lora.LARGEST_COPIED_RANK, lora.LARGEST_COPIED_RANK + 1])
def test_a_thin_gradient_of_B_is_computed_transposed(r: int) -> None:
    layer = randomize_layer(LoRALinear(nn.Linear(31, 47), r, 8))
    with Calls() as calls:
        layer(torch.randn(5, 31)).square().sum().backward()
    shapes = {tuple(out.shape) for name, _, out in calls.made if name == "aten.mm.default"}
    assert ((r, 47) in shapes, (47, r) in shapes) == (
        (True, False) if r <= lora.LARGEST_COPIED_RANK else (False, True)
    )


def randomize_layer(layer: LoRALinear) -> LoRALinear:
    for factor in (layer.A, layer.B):
        nn.init.normal_(factor)
    return layer


def test_it_starts_as_the_base_and_both_factors_learn() -> None:
    base = qwen()
    reference = base(**batch()).logits
    model = inject(base, config())
    torch.testing.assert_close(model(**batch()).logits, reference, atol=0, rtol=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):
        model(**batch()).loss.backward()
        for layer in adapter_layers(model).values():
            assert layer.B.grad.abs().max() > 0
            assert (layer.A.grad.abs().max() > 0) == (
                step > 0
            )  # A's gradient passes through B, which was zero
            assert layer.base_layer.weight.grad is None
        optimizer.step()
        optimizer.zero_grad()


def test_gaussian_initialisation_has_deviation_one_over_r() -> None:
    layer = LoRALinear(nn.Linear(4000, 3), r=8, lora_alpha=8, init_lora_weights="gaussian")
    assert layer.A.std().item() == pytest.approx(
        1 / 8, rel=0.05
    )  # 32,000 draws: 0.4% standard error
    assert layer.B.abs().max() == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = randomize(inject(qwen(), config())).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch(), use_cache=False).loss.backward()
        gradients.append([layer.A.grad for layer in adapter_layers(model).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


def test_autocast_keeps_factors_in_fp32_and_agrees_with_peft() -> None:
    ours, theirs = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, other = ours(**batch()), theirs(**batch())
    # Both round every product to bf16 (2⁻⁸), at different places.
    torch.testing.assert_close(mine.logits, other.logits, atol=0.05, rtol=0.05)
    mine.loss.backward()
    for layer in adapter_layers(ours).values():
        assert layer.A.dtype == layer.A.grad.dtype == layer.B.grad.dtype == torch.float32


def test_bf16_base_keeps_its_type_and_factors_stay_fp32() -> None:
    ours, theirs = pair(qwen().to(torch.bfloat16))
    mine = ours(**batch())
    assert mine.logits.dtype == torch.bfloat16
    torch.testing.assert_close(mine.logits, theirs(**batch()).logits, atol=0.05, rtol=0.05)
    assert {layer.A.dtype for layer in adapter_layers(ours).values()} == {torch.float32}


def test_cached_generation_equals_full_forward() -> None:
    model = randomize(inject(qwen(), config()))
    ids = batch(1, 6)["input_ids"]
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with sdpa_kernel(SDPBackend.MATH):
        cached = model.generate(ids, use_cache=True, **kwargs)
        full = model.generate(ids, use_cache=False, **kwargs)
    assert torch.equal(cached, full)
    with disabled(model):
        assert not torch.equal(cached, model.generate(ids, **kwargs))


def test_gradient_accumulation_adds_up() -> None:
    whole, parts = (randomize(inject(qwen(), config())) for _ in range(2))
    rows = batch(4)
    whole(**rows).loss.backward()
    for i in range(2):
        (parts(**{k: v[2 * i : 2 * i + 2] for k, v in rows.items()}).loss / 2).backward()
    for a, b in zip(adapter_layers(whole).values(), adapter_layers(parts).values(), strict=True):
        torch.testing.assert_close(a.B.grad, b.B.grad, atol=1e-6, rtol=1e-4)


def test_a_state_dict_says_its_scale_and_whether_the_base_holds_the_update() -> None:
    """With the tensors alone a merged model's would add its update twice, and another scale than the configuration's be lost."""
    model = randomize(inject(qwen(), config()))
    state = {n: t * 2 if n.endswith("scaling") else t for n, t in adapter_state(model).items()}
    use_adapter(model, state)
    expected = model(**batch()).logits
    again = inject(qwen(seed=4), config())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(**batch()).logits, expected, atol=0, rtol=0)
    merge(model)
    merged = inject(qwen(seed=4), config())
    merged.load_state_dict(model.state_dict())
    torch.testing.assert_close(merged(**batch()).logits, model(**batch()).logits, atol=0, rtol=0)
    torch.testing.assert_close(unmerge(merged)(**batch()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_asked_for_its_weights_type_works(dtype: torch.dtype) -> None:
    """T5 casts its input to `wo.weight.dtype`."""
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(**shape, vocab_size=97, decoder_start_token_id=0))
    base = base.to(dtype).eval()
    ours, theirs = pair(base, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wi", "wo"])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03  # 8 bits of a mantissa, over few layers
    assert relative(ours(**batch()).logits, theirs(**batch()).logits) < tolerance
    layer = ours.encoder.block[0].layer[1].DenseReluDense.wo
    assert layer.weight.dtype == dtype and layer.weight.shape == (16, 24)


def test_a_layers_weight_is_not_computed_with() -> None:
    """Mamba's kernels multiply by `dt_proj.weight` themselves: with a plain tensor its adapter would be passed over without a word."""
    layer = adapter_layers(inject(qwen(), config(target_modules=["q_proj"])))
    shown = next(iter(layer.values())).weight
    for compute in (lambda: shown @ torch.randn(48), lambda: F.linear(torch.randn(2, 48), shown), shown.float):  # fmt: skip
        with pytest.raises(RuntimeError, match="past the adapter: leave this layer out"):
            compute()
    assert repr(shown).startswith("ShownWeight(") and shown.numel() == 48 * 48
