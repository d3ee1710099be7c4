"""`lora_course.targets`: what a configuration may ask for, and the sentence for what it may not."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lora_course.injection import adapter_layers, inject, merge
from lora_course.lora import LoRALinear
from tests.models import SHAPE, batch, config, pair, qwen, randomize, relative

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


@pytest.mark.parametrize("name", ["q[", "(", "*_proj", r"\9"])
def test_an_expression_that_is_none_is_refused_before_anything_is_read(name: str) -> None:
    model = qwen()
    for fields in ({"target_modules": name}, {"rank_pattern": {name: 2}}):
        with pytest.raises(ValueError, match="is no regular expression"):
            inject(model, config(**fields))
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


class Twice(nn.Module):
    """One linear layer in two places, and one block twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.ModuleDict({"fc": nn.Linear(8, 8)}), nn.ModuleDict()
        self.other["fc"] = self.one["fc"]
        block = nn.ModuleDict({"up": nn.Linear(8, 8)})
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.other["fc"](torch.tanh(self.one["fc"](x)))
        return self.blocks[1]["up"](torch.tanh(self.blocks[0]["up"](x)))


def test_one_layer_in_two_places_is_refused_and_one_block_twice_is_adapted() -> None:
    settings = {"r": 2, "lora_alpha": 6}
    with pytest.raises(TypeError, match="'one.fc' and 'other.fc' are one module"):
        inject(Twice(), LoraConfig(target_modules=["fc"], **settings))
    model = randomize(inject(Twice(), LoraConfig(target_modules=["up"], **settings)))
    (layer,) = adapter_layers(model).values()
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 8)
    before = model(x)
    assert len(calls) == 2
    torch.testing.assert_close(merge(model)(x), before, atol=1e-5, rtol=1e-5)


MIXTURES = {
    "qwen3": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=12,
    )),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_are_refused_with_what_peft_does_and_the_linear_layers_work(
    name: str,
) -> None:
    base = MIXTURES[name]().eval()
    with pytest.raises(TypeError, match="target_parameters") as caught:
        inject(base, config())
    fused = str(caught.value).split("'")[1]
    assert base.get_parameter(fused).ndim == 3 and base.get_parameter(fused).shape[0] == 4
    # what the sentence says of PEFT is true: it adapts the parameter that is named
    settings = LoraConfig(r=3, target_modules=[], target_parameters=[fused])
    theirs = get_peft_model(copy.deepcopy(base), settings)
    trained = [n for n, p in theirs.named_parameters() if p.requires_grad]
    assert len(trained) == 2 and all("lora_" in n for n in trained)
    ours, peft = pair(base, target_modules=["q_proj", "v_proj"])
    torch.testing.assert_close(ours(**batch()).logits, peft(**batch()).logits)
    assert relative(ours(**batch()).logits, base(**batch()).logits) > 1e-3
    # the router is no linear layer, all that are one can be adapted
    with pytest.raises(TypeError, match=r"gate' is a \w+TopKRouter; nn.Linear"):
        inject(copy.deepcopy(base), config(target_modules=["gate"]))
    linear = {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    assert linear == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    ours, peft = pair(base, target_modules=sorted(linear))
    torch.testing.assert_close(ours(**batch()).logits, peft(**batch()).logits)
    ours.train()(**batch()).loss.backward()
    assert all(layer.A.grad.abs().max() > 0 for layer in adapter_layers(ours).values())


def test_a_token_of_three_dimensions_is_no_fused_expert() -> None:
    vision = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
    ))  # fmt: skip
    pixels = torch.randn(2, 3, 8, 8)
    probe = [p for p in vision.parameters() if p.ndim == 3]
    assert probe  # the one that was taken for experts
    before = vision.eval()(pixels).last_hidden_state
    # its pooling head is an nn.MultiheadAttention, which never calls its linear
    settings = config(exclude_modules=["out_proj"], target_modules=["q_proj", "v_proj", "fc1"])
    adapted = randomize(inject(vision, settings))
    assert relative(adapted(pixels).last_hidden_state, before) > 1e-3

    query = InternVLVisionModel(InternVLVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=[8, 8], patch_size=[4, 4],
    ))  # fmt: skip
    assert any(p.ndim == 3 for p in query.parameters())
    inject(query, config())
