"""`lora_course.lora`: parity with PEFT on the same weights, the algebra of adapters, and what is refused."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from lora_course import lora
from lora_course.injection import adapter_layers, disabled, inject, merge, unload, unmerge
from lora_course.lora import LoRALinear
from lora_course.states import adapter_state, concatenate, split_state, truncate, use_adapter

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def qwen(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()  # q, k, v have a bias


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Factors as after training: none is zero, so that nothing agrees by accident."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for factor in (layer.A, layer.B):
            factor.data.normal_(std=0.1, generator=generator)
    return model


def config(**fields: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | fields
    )


def pair(base: nn.Module | None = None, **fields: object) -> tuple[nn.Module, PeftModel]:
    """The same base with the same random factors, in this package's layers and in PEFT's."""
    base = base or qwen()
    ours = randomize(inject(copy.deepcopy(base), config(**fields)))
    theirs = get_peft_model(copy.deepcopy(base), config(**fields))
    names = set()
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            layer = adapter_layers(ours)[name]
            module.lora_A["default"].weight.data.copy_(layer.A)
            module.lora_B["default"].weight.data.copy_(layer.B)
            assert module.scaling["default"] == pytest.approx(layer.scaling)
            names.add(name)
    assert names == set(adapter_layers(ours))
    return ours, theirs


def batch(rows: int = 2, length: int = 9, vocab: int = 97) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


class Calls(TorchDispatchMode):
    """Everything that torch computes within the block: (name, arguments, result), in `made`."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple, object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
        out = function(*args, **(kwargs or {}))
        self.made.append((str(function), args, out))
        return out


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_merged_equals_unmerged_and_unmerge_restores(dtype: torch.dtype, tolerance: float) -> None:
    model = randomize(inject(qwen().to(dtype), config()))
    before = {n: layer.base_layer.weight.clone() for n, layer in adapter_layers(model).items()}
    unmerged = model(**batch()).logits
    merge(model)
    torch.testing.assert_close(model(**batch()).logits, unmerged, atol=tolerance, rtol=tolerance)
    with pytest.raises(RuntimeError, match="merged already"):
        merge(model)
    with pytest.raises(RuntimeError, match="merged"), disabled(model):
        pass
    unmerge(model)
    for name, layer in adapter_layers(model).items():
        torch.testing.assert_close(
            layer.base_layer.weight, before[name], atol=tolerance / 10, rtol=tolerance / 10
        )
    with pytest.raises(RuntimeError, match="merged"):
        unmerge(model)


def test_disabled_and_unload_give_the_base_back() -> None:
    base = qwen()
    for parameter in base.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    names, flags = (
        [n for n, _ in base.named_parameters()],
        [p.requires_grad for p in base.parameters()],
    )
    reference = base(**batch()).logits
    model = randomize(inject(base, config()))
    adapted = model(**batch()).logits
    assert (adapted - reference).abs().max() > 0.01
    with disabled(model):
        torch.testing.assert_close(model(**batch()).logits, reference, atol=0, rtol=0)
    torch.testing.assert_close(model(**batch()).logits, adapted, atol=0, rtol=0)
    unload(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert [p.requires_grad for p in model.parameters()] == flags
    torch.testing.assert_close(model(**batch()).logits, reference, atol=0, rtol=0)
    unload(merge(randomize(inject(model, config()))))
    torch.testing.assert_close(model(**batch()).logits, adapted, atol=1e-5, rtol=1e-5)


def test_states_switch_and_are_copies() -> None:
    model = randomize(inject(qwen(), config()), seed=1)
    first, logits = adapter_state(model), model(**batch()).logits
    second = adapter_state(randomize(model, seed=2))
    assert (model(**batch()).logits - logits).abs().max() > 0.01
    use_adapter(model, first)
    torch.testing.assert_close(model(**batch()).logits, logits, atol=0, rtol=0)
    randomize(model, seed=3)
    assert torch.equal(
        first["model.layers.0.mlp.up_proj.A"],
        adapter_state(use_adapter(model, first))["model.layers.0.mlp.up_proj.A"],
    )
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.A"], second["model.layers.0.mlp.up_proj.A"]
    )


def states(
    count: int = 3,
) -> tuple[nn.Module, list[lora.AdapterState], list[dict[str, torch.Tensor]]]:
    """`count` adapters of different rank and scale on one base, and their ΔW."""
    made, deltas = [], []
    for seed in range(count):
        model = randomize(inject(qwen(), config(r=2 + seed, lora_alpha=5 * (seed + 1))), seed)
        made.append(adapter_state(model))
        deltas.append({name: layer.delta_weight() for name, layer in adapter_layers(model).items()})
    return model, made, deltas


def test_concatenation_is_the_weighted_sum_of_updates() -> None:
    model, made, deltas = states()
    use_adapter(model, concatenate(made, [0.5, -1.0, 2.0]))
    for name, layer in adapter_layers(model).items():
        expected = 0.5 * deltas[0][name] - deltas[1][name] + 2 * deltas[2][name]
        assert layer.r == 2 + 3 + 4
        torch.testing.assert_close(layer.delta_weight(), expected, atol=1e-5, rtol=1e-5)


def test_truncation_is_the_best_cut_and_exact_at_full_rank() -> None:
    model, made, _ = states()
    whole = concatenate(made)
    deltas = {
        n: layer.delta_weight() for n, layer in adapter_layers(use_adapter(model, whole)).items()
    }
    for r in (9, 4, 1):
        for name, layer in adapter_layers(use_adapter(model, truncate(whole, r))).items():
            U, S, Vh = torch.linalg.svd(deltas[name])
            best = U[:, :r] * S[:r] @ Vh[:r]
            assert layer.r == r
            torch.testing.assert_close(layer.delta_weight(), best, atol=1e-4, rtol=1e-4)


def test_pattern_for_one_module_of_the_state_only() -> None:
    _, made, _ = states(2)
    partial = {k: v for k, v in made[1].items() if "q_proj" in k}
    modules = split_state(concatenate([made[0], partial]))
    assert modules["model.layers.0.self_attn.q_proj"]["A"].shape[0] == 5
    assert modules["model.layers.0.mlp.up_proj"]["A"].shape[0] == 2


def linear4bit(quant_type: str = "nf4") -> nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        128, 192, bias=True, compute_dtype=torch.float32, quant_type=quant_type
    )
    return layer.to("cpu").requires_grad_(False)


def test_4bit_base_forward_and_gradients_equal_the_dequantised_base() -> None:
    base = linear4bit()
    bytes_before = base.weight.data.clone()
    plain = nn.Linear(128, 192)
    plain.weight.data = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    plain.bias.data = base.bias.data.clone()
    layers = [LoRALinear(b, r=4, lora_alpha=12) for b in (base, plain)]
    for layer in layers:
        for factor, seed in ((layer.A, 1), (layer.B, 2)):
            factor.data.normal_(generator=torch.Generator().manual_seed(seed))
    outputs, gradients = [], []
    for layer in layers:
        x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(4), requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        outputs.append(y)
        gradients.append((x.grad, layer.A.grad, layer.B.grad))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < 1e-5
    assert torch.equal(base.weight.data, bytes_before) and base.weight.grad is None
    with pytest.raises(TypeError, match="4-bit.*dequantize_model"):
        layers[0].merge()


def test_4bit_base_is_kept_from_the_cpu_kernel_that_repacks() -> None:
    base = linear4bit()
    base.support_avx512bf16_for_cpu = True
    assert LoRALinear(base, r=2, lora_alpha=2).base_layer.support_avx512bf16_for_cpu is False
    packed = linear4bit()
    packed.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked"):
        LoRALinear(packed, r=2, lora_alpha=2)


REFUSED = [
    ({"target_modules": ["q_proj", "q_prj"]}, ValueError, r"q_prj.*down_proj, gate_proj, k_proj"),
    ({"target_modules": ".*nothing"}, ValueError, "matches no linear layer"),
    ({"target_modules": None}, ValueError, "target_modules is not set"),
    ({"target_modules": ["mlp"]}, TypeError, "Qwen2MLP"),
    ({"target_modules": ["embed_tokens"]}, TypeError, "Embedding"),
    ({"exclude_modules": ["o_prj"]}, ValueError, "exclude_modules.*o_prj"),
    ({"rank_pattern": {"q_prj": 4}}, ValueError, "rank_pattern.*q_prj"),
    ({"rank_pattern": {"q_proj": 0}}, ValueError, "r=0"),
    ({"use_dora": True}, ValueError, "use_dora=True"),
    ({"bias": "lora_only"}, ValueError, "bias='lora_only'"),
    ({"modules_to_save": ["lm_head"]}, ValueError, "modules_to_save"),
    ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights='pissa'"),
    ({"lora_dropout": 1.5}, ValueError, "lora_dropout=1.5"),
    ({"lora_alpha": 0}, ValueError, "lora_alpha=0"),
]


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED, ids=str)
def test_what_cannot_be_honoured_is_refused_and_nothing_is_changed(
    fields: dict, error: type, message: str
) -> None:
    model = qwen()
    with pytest.raises(error, match=message):
        inject(model, config(**fields))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    inject(model, config())  # and the model can still be used


def test_a_variant_names_its_own_rank_and_factors() -> None:
    class Halved(LoRALinear):
        """Rank from another field than r; computes with factors of its own."""

        @classmethod
        def initial_rank(cls, config: LoraConfig) -> int:
            if config.r == 7:
                raise ValueError("seven is refused")
            return config.r * 2

        def factors(self) -> tuple[torch.Tensor, torch.Tensor, float]:
            return self.A, self.B / 2, self.scaling

    base = qwen()
    with pytest.raises(ValueError, match="seven"):
        inject(base, config(r=7), layer=Halved)
    assert not hasattr(base, "lora_course") and all(p.requires_grad for p in base.parameters())
    model = randomize(inject(base, config(rank_pattern={"q_proj": 5}), layer=Halved))
    assert {layer.r for layer in adapter_layers(model).values()} == {5, 6}
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 48)
    torch.testing.assert_close(
        layer(x), layer.base_layer(x) + x @ layer.delta_weight().T, atol=1e-5, rtol=1e-5
    )


def test_rank_below_one_second_injection_and_foreign_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="r=0"):
        LoRALinear(nn.Linear(2, 2), r=0, lora_alpha=1)
    model = inject(qwen(), config())
    with pytest.raises(ValueError, match="carries an adapter already"):
        inject(model, config())
    with pytest.raises(ValueError, match="PEFT adapter already"):
        inject(get_peft_model(qwen(), config()), config())
    with pytest.raises(ValueError, match="inject"):
        adapter_state(qwen())
    with pytest.raises(TypeError, match="peft.LoraConfig"):
        inject(qwen(), {"r": 8})


def test_layers_that_are_no_linear_are_refused_by_name() -> None:
    gpt2 = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16)
    )
    with pytest.raises(TypeError, match="Conv1D"):
        inject(gpt2, config(target_modules=["c_attn"]))
    with pytest.raises(TypeError, match="Conv1D"):
        inject(gpt2, config())
    moe = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    ))  # fmt: skip
    with pytest.raises(TypeError, match="fused weight of several experts"):
        inject(moe, config())
    with pytest.raises(ValueError, match="fused weight of several experts"):
        inject(moe, config(target_modules=["gate_up_proj"]))
    inject(moe, config(target_modules=["q_proj", "v_proj"]))
    tied = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))
    with pytest.raises(TypeError, match="shares its weight"):
        inject(tied, config(target_modules=["lm_head", "q_proj"]))
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(TypeError, match="nn.MultiheadAttention"):
        inject(nn.ModuleDict({"attention": attention}), config(target_modules=["out_proj"]))


def test_states_of_other_models_are_refused_before_anything_changes() -> None:
    model = randomize(inject(qwen(), config()))
    before, other = (
        adapter_state(model),
        Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"intermediate_size": 96})),
    )
    with pytest.raises(ValueError, match=r"\[48, r\].*|A \[r, "):
        use_adapter(model, adapter_state(inject(other, config())))
    with pytest.raises(ValueError, match="same layers"):
        use_adapter(model, adapter_state(inject(qwen(), config(target_modules=["q_proj"]))))
    with pytest.raises(ValueError, match="another kind of layer"):
        use_adapter(model, before | {"model.layers.1.mlp.up_proj.gate": torch.ones(3)})
    after = adapter_state(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match="2 states and 1 weights"):
        concatenate([before, before], [1.0])


def test_other_architectures_work_as_they_are() -> None:
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=False)).eval()
    ours, theirs = pair(base)
    torch.testing.assert_close(
        ours(**batch()).logits, theirs(**batch()).logits, atol=1e-5, rtol=1e-5
    )
    assert "lm_head" not in adapter_layers(ours)
    copied = copy.deepcopy(ours)
    torch.testing.assert_close(ours(**batch()).logits, copied(**batch()).logits, atol=0, rtol=0)


def test_a_variant_can_weigh_components_and_connect_its_layers() -> None:
    calls = []

    class Half(LoRALinear):
        def transform_hidden(self, h: torch.Tensor) -> torch.Tensor:
            return h / 2

        @classmethod
        def after_inject(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
            assert layers == adapter_layers(model)
            calls.append("in")
            if len(layers) < 4:
                raise ValueError("too few")

        @classmethod
        def before_unload(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
            assert layers == adapter_layers(model)
            calls.append("out")

    halved, whole = randomize(inject(qwen(), config(), Half)), randomize(inject(qwen(), config()))
    for layer in adapter_layers(whole).values():
        layer.scaling /= 2
    torch.testing.assert_close(
        halved(**batch()).logits, whole(**batch()).logits, atol=1e-5, rtol=1e-5
    )
    unload(halved)
    model = qwen()
    with pytest.raises(ValueError, match="too few"):
        inject(model, config(target_modules=["q_proj"]), Half)
    assert calls == ["in", "out", "in", "out"]
    assert not any(isinstance(m, LoRALinear) for m in model.modules()) and all(
        p.requires_grad for p in model.parameters()
    )
