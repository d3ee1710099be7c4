"""`lora_course.qlora`: 4-bit models are loaded, protected, trained on and merged, and what is refused."""

import copy
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional as bnbf
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, TrainingArguments

from lora_course import linears, qlora
from lora_course.injection import adapter_layers, inject, injection_of, merge, unload, unmerge
from lora_course.nf4 import NF4Weight, quantize_nf4
from lora_course.progressive import StackedLoRALinear
from lora_course.qlora import (
    dequantize_model,
    load_4bit,
    merge_into,
    merge_requantized,
    optimizer_name,
    protect,
    quantize_model,
)
from lora_course.quantized import QuantizedLoRALinear, quantize_after_training
from tests.models import relative, same_bits
from tests.tolerances import TRAINED

pytestmark = pytest.mark.usefixtures("uncompiled")


def tiny_qwen(tied: bool = True) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.15,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def adapted(model: nn.Module, size: float = 0.1) -> nn.Module:
    """`model` with an adapter whose factors look trained: none is zero."""
    inject(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(7)
    for layer in adapter_layers(model).values():
        layer.A.data.normal_(std=layer.in_features**-0.5, generator=generator)
        layer.B.data.normal_(std=size, generator=generator)
    return model


TOKENS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(5))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def base_bytes(model: nn.Module) -> dict[str, list[Tensor]]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            s = module.weight.quant_state
            found[name] = [
                t.clone() for t in (module.weight.data, s.absmax, s.offset, s.state2.absmax)
            ]
    return found


def assert_same_bytes(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> None:
    assert before and before.keys() == after.keys()
    for name in before:
        assert all(same_bits(a, b) for a, b in zip(before[name], after[name], strict=True)), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    tiny_qwen().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_loads_a_folder_with_all_linears_but_the_head_in_4_bits(
    saved: str, quant_type: str, double_quant: bool
) -> None:
    model = load_4bit(saved, quant_type=quant_type, double_quant=double_quant)
    kinds = {
        name: isinstance(m, Linear4bit)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    }
    assert kinds.pop("lm_head") is False and len(kinds) == 21 and all(kinds.values())
    for module in model.modules():
        if isinstance(module, Linear4bit):
            assert (
                module.weight.quant_state.quant_type == quant_type
                and module.weight.quant_state.nested == double_quant
            )
            assert module.support_avx512bf16_for_cpu is False
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(
        p.dtype in (torch.float32, torch.uint8) and not p.requires_grad for p in model.parameters()
    )


def test_loaded_codes_are_those_of_our_own_format(saved: str) -> None:
    original, model = tiny_qwen().to(torch.bfloat16), load_4bit(saved, compute_dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            ours: NF4Weight = quantize_nf4(original.get_submodule(name).weight)
            assert same_bits(ours.codes, module.weight.data) and same_bits(
                ours.absmax, module.weight.quant_state.absmax
            )


def test_default_compute_type_is_the_devices_and_a_given_one_is_obeyed(saved: str) -> None:
    default = qlora.fastest_dtype()
    for given, expected in (
        (None, default),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        model = load_4bit(saved, compute_dtype=given)
        assert model.model.layers[0].mlp.up_proj.compute_dtype == expected
        with torch.no_grad():
            assert torch.isfinite(model(input_ids=TOKENS).logits).all()


def test_gradient_checkpointing_recomputes_the_layers_and_gives_the_same_gradients(
    saved: str,
) -> None:
    calls = {}
    grads = {}
    for on in (True, False):
        model = adapted(load_4bit(saved, compute_dtype=torch.float32, gradient_checkpointing=on))
        assert model.is_gradient_checkpointing is on
        count = calls.setdefault(on, [])
        model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(
            lambda *_, count=count: count.append(1)
        )
        grads[on] = gradients(model)
    assert (len(calls[True]), len(calls[False])) == (2, 1)
    # The recomputation repeats the same operations on the same numbers.
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, rtol=1e-6, atol=1e-8)
        assert grad.abs().max() > 0


def test_remote_code_and_unknown_types_are_refused_by_name(saved: str) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_4bit(saved, trust_remote_code=True)
    with pytest.raises(ValueError, match="quant_type='int4'"):
        load_4bit(saved, quant_type="int4")
    with pytest.raises(ValueError, match="quant_type='int4'"):
        quantize_model(tiny_qwen(), quant_type="int4")


def test_quantising_in_memory_equals_loading(saved: str) -> None:
    loaded = load_4bit(saved, compute_dtype=torch.float32)
    ours = quantize_model(Qwen2ForCausalLM.from_pretrained(saved, dtype=torch.float32))
    assert_same_bytes(base_bytes(loaded), base_bytes(ours))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=TOKENS).logits, ours(input_ids=TOKENS).logits)


def test_quantising_leaves_the_head_the_adapter_and_what_is_skipped() -> None:
    untied = quantize_model(tiny_qwen(tied=False), skip=("down_proj",))
    assert (
        isinstance(untied.lm_head, Linear4bit)
        and type(untied.model.layers[0].mlp.down_proj) is nn.Linear
    )
    layers = [module for module in untied.modules() if isinstance(module, Linear4bit)]
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    tied = quantize_model(tiny_qwen(), skip=())
    assert type(tied.lm_head) is nn.Linear
    model = adapted(tiny_qwen())
    expected = {
        name: (layer.A.clone(), layer.B.clone()) for name, layer in adapter_layers(model).items()
    }
    quantize_model(model)
    for name, layer in adapter_layers(model).items():
        assert isinstance(layer.base_layer, Linear4bit)
        assert torch.equal(layer.A, expected[name][0]) and torch.equal(layer.B, expected[name][1])
    with pytest.raises(ValueError, match="no nn.Linear to quantise"):
        quantize_model(model)
    targets = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"])
    on_the_head = quantize_model(inject(tiny_qwen(tied=False), targets), skip=("lm_head", "v_proj"))
    for name, layer in adapter_layers(on_the_head).items():
        assert isinstance(layer.base_layer, Linear4bit) is name.endswith("q_proj"), name


def test_quantising_refuses_a_merged_model_which_can_still_be_unmerged() -> None:
    model, base = merge(adapted(tiny_qwen())), tiny_qwen()
    with pytest.raises(RuntimeError, match="q_proj' is merged"):
        quantize_model(model)
    unmerge(model)
    for name, layer in adapter_layers(model).items():
        torch.testing.assert_close(layer.base_layer.weight, base.get_submodule(name).weight)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    staged = merge(inject(tiny_qwen(), config, layer=StackedLoRALinear))
    for layer in adapter_layers(staged).values():
        layer.freeze()  # the next stage begins on top: the base holds the first
    with pytest.raises(RuntimeError, match="q_proj' is merged, wholly or in part"):
        quantize_model(staged)


def test_an_adapter_from_before_quantising_is_taken_out_or_quantised_afterwards() -> None:
    for take_out in (unload, merge_requantized):
        model = take_out(quantize_model(adapted(tiny_qwen())))
        assert not hasattr(model, "lora_course") and len(base_bytes(model)) == 21
        # trainable again is what was before inject and can be: all that did not become codes
        assert all(p.requires_grad is p.is_floating_point() for p in model.parameters())
        gradients(model)
    model = quantize_after_training(quantize_model(adapted(tiny_qwen())))
    assert injection_of(model).layer is QuantizedLoRALinear
    assert gradients(model).keys() == {f"{n}.{f}" for n in adapter_layers(model) for f in "AB"}


def test_training_moves_the_adapter_and_no_bit_of_the_base(saved: str) -> None:
    model = adapted(load_4bit(saved))
    before, head = base_bytes(model), model.lm_head.weight.clone()
    factors = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1 and len(trained) == 42
    assert all(not torch.equal(p, factors[n]) for n, p in model.named_parameters() if n in factors)
    assert_same_bytes(before, base_bytes(model))
    assert torch.equal(head, model.lm_head.weight)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.fixture
def avx512bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes finds on a CPU with AVX512-BF16, where the tests below are real; elsewhere its repacking runs
    all the same (it is written in torch) and only the fast kernel that would read the new order is missing."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


def exposed(model: nn.Module) -> nn.Module:
    """`model` as bitsandbytes leaves it, without the cure."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = Linear4bit(32, 32).support_avx512bf16_for_cpu
    return model


def evaluate(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=TOKENS)


def test_an_evaluation_leaves_bytes_and_gradients_as_they_were(avx512bf16: None) -> None:
    model = quantize_model(tiny_qwen())
    before = base_bytes(model)
    evaluate(model)
    assert_same_bytes(before, base_bytes(model))
    before, expected = base_bytes(adapted(model)), gradients(model)
    evaluate(model)
    assert_same_bytes(before, base_bytes(model))
    for name, grad in gradients(model).items():
        assert torch.equal(grad, expected[name]), name


def test_without_the_cure_an_evaluation_corrupts_weights_and_gradients(avx512bf16: None) -> None:
    model = exposed(adapted(quantize_model(tiny_qwen())))
    name = "model.layers.1.mlp.up_proj"
    expected = gradients(model)
    layer = adapter_layers(model)[name].base_layer
    weight, codes = linears.dequantized(layer).clone(), layer.weight.data.flatten().clone()
    evaluate(model)
    assert layer.weight.quant_state.packing_format_for_cpu
    assert not torch.equal(layer.weight.data.flatten(), codes)
    garbage = bnbf.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert (garbage - weight).norm() / weight.norm() > 0.5
    lowest = "model.layers.0.self_attn.q_proj.A"
    try:  # the fast kernel, where the CPU has it, gives no gradient at all; torch's stand-in a wrong one
        got = gradients(model)[lowest]
    except RuntimeError as error:
        assert "requires grad" in str(error)
    else:
        assert (got - expected[lowest]).norm() / expected[lowest].norm() > 0.1
    for refuses in (protect, dequantize_model, merge_requantized):
        with pytest.raises(RuntimeError, match="repacked by a forward in eval mode"):
            refuses(model)


def test_injecting_protects_a_base_that_was_quantised_elsewhere(avx512bf16: None) -> None:
    model = adapted(exposed(quantize_model(tiny_qwen())))
    before = base_bytes(model)
    evaluate(model)
    assert_same_bytes(before, base_bytes(model))


def output_error(model: nn.Module, expected: Tensor) -> float:
    with torch.no_grad():
        return ((model.eval()(input_ids=TOKENS).logits - expected).norm() / expected.norm()).item()


def test_only_merging_into_the_dequantised_base_keeps_the_function() -> None:
    original = tiny_qwen()
    model = adapted(quantize_model(copy.deepcopy(original)))
    with torch.no_grad():
        expected = model.eval()(input_ids=TOKENS).logits
    into_original = output_error(merge_into(copy.deepcopy(original), model), expected)
    requantised = output_error(merge_requantized(copy.deepcopy(model)), expected)
    dequantised = output_error(merge(dequantize_model(copy.deepcopy(model))), expected)
    assert output_error(model, expected) == 0, "the model itself must not have been changed"
    # fp32 rounding of one sum a weight; the other two are off by a quantisation error each.
    assert dequantised < 5e-6
    assert 0.03 < into_original < 0.6
    assert 0.03 < requantised < 0.6


def test_dequantised_weights_are_those_that_the_4_bit_layers_computed_with(saved: str) -> None:
    model = adapted(load_4bit(saved, compute_dtype=torch.float32))
    with torch.no_grad():
        expected = model.eval()(input_ids=TOKENS).logits
    plain = dequantize_model(model, torch.float32)
    assert (
        not any(isinstance(m, Linear4bit) for m in plain.modules())
        and len(adapter_layers(plain)) == 21
    )
    assert output_error(plain, expected) < 1e-6
    assert not getattr(plain, "is_quantized", False)
    assert getattr(plain.config, "quantization_config", None) is None
    assert not any(
        p.requires_grad for n, p in plain.named_parameters() if not n.endswith((".A", ".B"))
    )
    with pytest.raises(ValueError, match="no 4-bit layer"):
        dequantize_model(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dequantised_model_runs_in_the_type_that_was_asked_for(
    saved: str, dtype: torch.dtype
) -> None:
    for base in (load_4bit(saved), quantize_model(tiny_qwen().to(torch.bfloat16))):
        model = adapted(base)
        with torch.no_grad():
            expected = model.eval()(input_ids=TOKENS).logits.float()
            found = dequantize_model(model, dtype)(input_ids=TOKENS).logits
        # weights and sums of three layers, rounded to 2⁻⁹ where they are in bf16
        assert found.dtype == dtype and relative(found.float(), expected) < 0.05
        kinds = {name.endswith((".A", ".B")): p.dtype for name, p in model.named_parameters()}
        assert kinds == {True: torch.float32, False: dtype}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_requantised_merge_is_the_quantised_sum_in_the_bases_own_type(
    quant_type: str, double_quant: bool
) -> None:
    model = adapted(quantize_model(tiny_qwen(), quant_type=quant_type, double_quant=double_quant))
    name = "model.layers.2.mlp.down_proj"
    layer = adapter_layers(model)[name]
    total = linears.dequantized(layer.base_layer) + layer.delta_weight().detach()
    packed, state = bnbf.quantize_4bit(
        total, compress_statistics=double_quant, quant_type=quant_type
    )
    merged = merge_requantized(model).get_submodule(name)
    assert isinstance(merged, Linear4bit) and merged.weight.quant_state.nested == double_quant
    assert same_bits(linears.dequantized(merged), bnbf.dequantize_4bit(packed, state))
    with pytest.raises(ValueError, match="carries no adapter"):
        adapter_layers(model)


def test_merges_that_make_no_sense_are_refused_before_anything_changes() -> None:
    plain = adapted(tiny_qwen())
    with pytest.raises(TypeError, match="not a Linear4bit"):
        merge_requantized(plain)
    other = tiny_qwen()
    other.model.layers[2].mlp.down_proj = nn.Linear(120, 64)
    first = other.model.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(ValueError, match=r"down_proj' is \[64, 128\] in the model and \[64, 120\]"):
        merge_into(other, plain)
    assert torch.equal(first, other.model.layers[0].mlp.down_proj.weight)


def test_a_diverged_update_and_a_shared_weight_are_refused_before_anything_changes() -> None:
    original = tiny_qwen()
    model = adapted(quantize_model(copy.deepcopy(original)))
    before, weights = base_bytes(model), copy.deepcopy(original.state_dict())
    shared = copy.deepcopy(original)
    shared.model.layers[2].mlp.up_proj.weight = shared.model.layers[1].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match=r"1.mlp.up_proj' shares its weight with .*2.mlp.up"):
        merge_into(shared, model)
    assert torch.equal(
        shared.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight
    )
    last = adapter_layers(model)["model.layers.2.mlp.down_proj"]
    last.B.data[0, 0] = torch.nan
    for refused in (merge_requantized, lambda model: merge_into(original, model)):
        with pytest.raises(ValueError, match=r"2.mlp.down_proj' is not finite"):
            refused(model)
    assert_same_bytes(before, base_bytes(model))
    assert len(adapter_layers(model)) == 21
    assert all(torch.equal(value, weights[key]) for key, value in original.state_dict().items())


def test_an_update_is_merged_into_an_original_once() -> None:
    original = tiny_qwen()
    model = adapted(quantize_model(tiny_qwen()))
    merge_into(original, model)
    once = copy.deepcopy(original.state_dict())
    with pytest.raises(RuntimeError, match="holds this update already"):
        merge_into(original, model)
    assert all(torch.equal(value, once[key]) for key, value in original.state_dict().items())
    original.load_state_dict(tiny_qwen().state_dict())
    merge_into(original, model)
    assert all(torch.equal(value, once[key]) for key, value in original.state_dict().items())
    merge_into(original, adapted(tiny_qwen(), size=0.2))  # another update


@pytest.mark.parametrize("skip", [("lm_head",), ("down_proj", "q_proj")])
def test_a_model_quantised_in_memory_is_saved_and_loaded(
    tmp_path: Path, skip: tuple[str, ...]
) -> None:
    model = quantize_model(tiny_qwen(), skip=skip)
    model.save_pretrained(tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": "cpu"})
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        assert torch.equal(protect(packed)(input_ids=TOKENS).logits, expected)
    assert_same_bytes(base_bytes(model), base_bytes(packed))
    dequantize_model(model).save_pretrained(tmp_path / "wide")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    with torch.no_grad():
        assert torch.equal(wide(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_optimizer_names_are_ones_that_transformers_knows() -> None:
    assert optimizer_name("cpu") == optimizer_name(torch.device("cpu"), bits=8) == "adamw_torch"
    assert (
        optimizer_name("cuda:0") == "paged_adamw_32bit"
        and optimizer_name("cuda", bits=8) == "paged_adamw_8bit"
    )
    for name in (optimizer_name("cpu"), optimizer_name("cuda"), optimizer_name("cuda", bits=8)):
        assert TrainingArguments(output_dir="unused", optim=name, use_cpu=True).optim == name
    with pytest.raises(ValueError, match="bits=4"):
        optimizer_name("cuda", bits=4)


def test_the_paged_optimiser_takes_torchs_steps() -> None:
    results = []
    for make in (torch.optim.AdamW, bnb.optim.PagedAdamW32bit):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(40, 30))
        optimizer = make([parameter], lr=1e-2, weight_decay=0.1)
        for _ in range(20):
            parameter.grad = torch.sin(3 * parameter.detach())
            optimizer.step()
        results.append(parameter.detach())
    # The same equations in another order of fp32 operations.
    torch.testing.assert_close(results[0], results[1], **TRAINED)


@pytest.mark.gpu
def test_on_a_gpu_a_4_bit_model_trains_generates_from_its_cache_and_merges(saved: str) -> None:
    model = inject(
        qlora.load_4bit(saved), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")
    )
    packed = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    ids = torch.arange(24, device="cuda").view(2, 12)
    optimizer = bnb.optim.PagedAdamW32bit(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2
    )
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)
    model.eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(ids[:1], use_cache=True, **settings),
        model.generate(ids[:1], use_cache=False, **settings),
    )
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        after = merge(qlora.dequantize_model(model))(input_ids=ids).logits.float()
    # The merged weights are fp32; the unmerged layer computes in 16 bits, 2⁻⁸ relative, over the model's depth.
    assert (after - before).norm() / before.norm() < 0.05
