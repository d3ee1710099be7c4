"""`lora_course.targets`: what a configuration may ask for, and the sentence for what it may not."""

import pytest
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from lora_course.injection import inject
from lora_course.lora import LoRALinear
from tests.models import SHAPE, config, qwen

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
