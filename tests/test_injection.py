"""`lora_course.injection`: adapters go in, are switched off, merged and taken out, and the base stays what it was."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_course.injection import adapter_layers, disabled, inject, merge, unload, unmerge
from lora_course.lora import LoRALinear
from lora_course.states import adapter_state
from tests.models import SHAPE, batch, config, pair, qwen, randomize


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
