"""QLoRA: the number format against bitsandbytes, bit for bit; loading, protecting and merging 4-bit models."""

import copy
import math
from collections.abc import Iterator

import bitsandbytes as bnb
import pytest
import torch
import torch._dynamo
from bitsandbytes import functional as bnbf
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments

from lora_course import qlora
from lora_course.injection import adapter_layers, inject, merge
from lora_course.qlora import (
    NF4Weight,
    dequantize_model,
    dequantize_nf4,
    load_4bit,
    merge_into,
    merge_requantized,
    nf4_codebook,
    optimizer_name,
    protect,
    quantize_model,
    quantize_nf4,
    storage_bits,
    stored_bytes,
)

SHAPES = [
    (64,),
    (1,),
    (7,),
    (65,),
    (3, 5),
    (33, 31),
    (129, 257),
    (128, 192),
    (256, 704),
    (5, 13108),
    (1000, 577),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread, as on tensors this small two wait for each other; and no compiling: bitsandbytes has a compiled
    fallback for odd widths, seconds for each shape, and computes the same without."""
    threads, disabled = torch.get_num_threads(), torch._dynamo.config.disable
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True
    yield
    torch.set_num_threads(threads)
    torch._dynamo.config.disable = disabled


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape and every bit: 0.0 and -0.0 differ, as `torch.equal` would not tell."""
    view = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(view), b.contiguous().view(view))
    )


def quantize_bnb(
    weight: Tensor, block_size: int = 64, double_quant: bool = True
) -> tuple[Tensor, bnbf.QuantState]:
    return bnbf.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )


def assert_equals_bitsandbytes(
    weight: Tensor, block_size: int = 64, double_quant: bool = True
) -> None:
    ours = quantize_nf4(weight, block_size, double_quant)
    packed, state = quantize_bnb(weight, block_size, double_quant)
    assert same_bits(ours.codes, packed)
    assert same_bits(ours.absmax, state.absmax)
    if double_quant:
        assert same_bits(ours.nested_absmax, state.state2.absmax)
        assert same_bits(ours.offset, state.offset)
    else:
        assert ours.nested_absmax is None and ours.offset is None
    assert same_bits(dequantize_nf4(ours), bnbf.dequantize_4bit(packed, state).view(weight.shape))


# ------------------------------------------------------------------------------------------ the number format


def test_codebooks_derived_from_their_definitions_equal_the_tables_of_bitsandbytes() -> None:
    assert same_bits(nf4_codebook(), bnbf.get_4bit_type("nf4", device="cpu"))
    assert same_bits(qlora.dynamic_codebook(), bnbf.create_dynamic_map())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_constants_equal_bitsandbytes_on_any_shape(
    dtype: torch.dtype, double_quant: bool
) -> None:
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(math.prod(shape))
        assert_equals_bitsandbytes(
            (0.02 * torch.randn(shape, generator=generator)).to(dtype), double_quant=double_quant
        )


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_codes_and_constants_equal_bitsandbytes_at_other_block_sizes(block_size: int) -> None:
    assert_equals_bitsandbytes(
        torch.randn(100, 700, generator=torch.Generator().manual_seed(1)), block_size
    )


@pytest.mark.parametrize("double_quant", [True, False])
def test_special_blocks_equal_bitsandbytes(double_quant: bool) -> None:
    codebook, generator = nf4_codebook(), torch.Generator().manual_seed(0)
    ties = torch.cat([torch.ones(1), (codebook[:-1] + codebook[1:]) / 2]).repeat(4)
    sizes = torch.rand(40, 1, generator=generator)
    special = {
        "ties up to the rounding of a division": (sizes * ties).flatten(),
        **{
            f"the same in the last, partial block, {i}": sizes[i] * ties[:33]
            for i in range(len(sizes))
        },
        "zeros": torch.zeros(200),
        "a block of zeros among others": torch.cat(
            [torch.randn(64, generator=generator), torch.zeros(64), torch.ones(70)]
        ),
        "zeros at the end": torch.cat([torch.randn(64, generator=generator), torch.zeros(9)]),
        "ties": ties,
        "ties in the last, partial block": ties[:33],
        "all blocks alike, so that no constant differs from the mean": torch.ones(64 * 300),
        "subnormal": torch.full((130,), 1e-40),
        "heavy tails: many constants near their mean": torch.randn(64 * 2000, generator=generator)
        ** 5,
        "negative zero": torch.tensor([-0.0, 1.0, -1.0]),
    }
    for name, weight in special.items():
        try:
            assert_equals_bitsandbytes(weight, double_quant=double_quant)
        except AssertionError as error:
            raise AssertionError(name) from error


def test_every_entry_of_the_table_behind_the_constants_equals_bitsandbytes() -> None:
    edges = ((torch.arange(1, 65536).double() - 0.5) / 65535 * 2 - 1).float()
    for values in (edges, edges.nextafter(torch.tensor(-2.0)), edges.nextafter(torch.tensor(2.0))):
        blocks = nn.functional.pad(values, (0, 1)).view(-1, 256)
        blocks = torch.cat(
            [torch.ones(256, 1), -torch.ones(256, 1), blocks[:, 2:]], 1
        )  # every constant 1, the mean about 0
        absmax = torch.cat([blocks.flatten(), -blocks.flatten()])
        codes, nested, offset = qlora._quantize_constants(absmax)
        expected, state = bnbf.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
        assert (
            same_bits(codes, expected)
            and same_bits(nested, state.absmax)
            and same_bits(offset, absmax.mean())
        )


def test_error_is_at_most_half_the_widest_gap_without_double_quantisation() -> None:
    weight = torch.randn(512, 640, generator=torch.Generator().manual_seed(3))
    error = (dequantize_nf4(quantize_nf4(weight, double_quant=False)) - weight).abs().view(-1, 64)
    worst = (error / weight.view(-1, 64).abs().amax(1, keepdim=True)).max().item()
    # 0.15190 is (1 − 0.69619) / 2, plus rounding; with 5,120 blocks the worst case is nearly met.
    assert 0.14 < worst <= 0.1519037


def test_quantising_again_changes_nothing_without_double_quantisation() -> None:
    weight = torch.randn(300, 130, generator=torch.Generator().manual_seed(4))
    once = quantize_nf4(weight, double_quant=False)
    again = quantize_nf4(dequantize_nf4(once), double_quant=False)
    assert same_bits(once.codes, again.codes) and same_bits(once.absmax, again.absmax)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "n", [1, 7, 64, 65, 128, 1000, 64 * 256, 64 * 256 + 1, 256 * 704, 3 * 64 * 256 + 5]
)
def test_stored_bytes_equal_the_formula_exactly(n: int, double_quant: bool) -> None:
    weight = torch.randn(1, n)
    bits = storage_bits(n, double_quant=double_quant)
    assert 8 * quantize_nf4(weight, double_quant=double_quant).nbytes == pytest.approx(
        bits * n, abs=1e-6
    )
    model = nn.ModuleDict({"linear": nn.Linear(n, 1, bias=False)})
    assert 8 * stored_bytes(quantize_model(model, double_quant=double_quant)) == pytest.approx(
        bits * n, abs=1e-6
    )


def test_storage_is_the_formula_of_the_paper_for_whole_blocks() -> None:
    for n in (64, 4096, 64 * 257, 3584 * 3584):
        assert storage_bits(n) == pytest.approx(
            4 + 8 / 64 + 32 * (math.ceil(n / 64 / 256) + 1) / n, rel=1e-15
        )
        assert storage_bits(n, double_quant=False) == 4.5
    assert storage_bits(3584 * 18944) == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.tensor([1.0, math.nan]), ValueError, "inf or nan"),
        (torch.tensor([1.0, math.inf]), ValueError, "inf or nan"),
        (torch.zeros(0), ValueError, "empty"),
        (torch.zeros(4, dtype=torch.float64), TypeError, "float64"),
    ],
)
def test_weights_that_have_no_codes_are_refused(
    weight: Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        quantize_nf4(weight)
    with pytest.raises(ValueError, match="block_size=0"):
        quantize_nf4(torch.ones(4), block_size=0)
    with pytest.raises(ValueError, match="n=0"):
        storage_bits(0)


# ------------------------------------------------------------------------------------------ 4-bit models


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


# ------------------------------------------------------------------------------------------ the CPU trap


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
    weight, codes = qlora._dequantized(layer).clone(), layer.weight.data.flatten().clone()
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


# ------------------------------------------------------------------------------------------ merging


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


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_requantised_merge_is_the_quantised_sum_in_the_bases_own_type(
    quant_type: str, double_quant: bool
) -> None:
    model = adapted(quantize_model(tiny_qwen(), quant_type=quant_type, double_quant=double_quant))
    name = "model.layers.2.mlp.down_proj"
    layer = adapter_layers(model)[name]
    total = qlora._dequantized(layer.base_layer) + layer.delta_weight().detach()
    packed, state = bnbf.quantize_4bit(
        total, compress_statistics=double_quant, quant_type=quant_type
    )
    merged = merge_requantized(model).get_submodule(name)
    assert isinstance(merged, Linear4bit) and merged.weight.quant_state.nested == double_quant
    assert same_bits(qlora._dequantized(merged), bnbf.dequantize_4bit(packed, state))
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


# ------------------------------------------------------------------------------------------ optimisers


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
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


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
