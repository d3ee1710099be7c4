"""`lora_course.states`: adapters out of a model and into it, their sums, cuts and distances."""

from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lora_course import lora
from lora_course.injection import adapter_layers, inject
from lora_course.merging import dare, ties
from lora_course.states import (
    adapter_state,
    concatenate,
    factor_state,
    split_state,
    truncate,
    use_adapter,
)
from tests.models import SHAPE, batch, config, qwen, randomize


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


def test_an_adapter_that_accelerate_has_offloaded_is_not_read() -> None:
    """Its tensors have no numbers then; a copy of them would look like a state."""
    model = cpu_offload(randomize(inject(qwen(), config())), execution_device=torch.device("cpu"))
    for take in (adapter_state, factor_state):
        with pytest.raises(RuntimeError, match="offloaded.*inject then"):
            take(model)
    remove_hook_from_submodules(model)
    expected = adapter_state(randomize(inject(qwen(), config())))
    found = adapter_state(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "fold",
    [
        lambda state: concatenate([state, state], [0.3, -0.7]),
        lambda state: truncate(state, 1),
        lambda state: ties([state, state], r=2).state,
        lambda state: dare([state, state], r=2).state,
    ],
    ids=["concatenate", "truncate", "ties", "dare"],
)
def test_factors_in_half_precision_are_folded_as_their_numbers_in_fp32(
    fold: Callable, dtype: torch.dtype
) -> None:
    model = randomize(inject(qwen(), config(target_modules=["q_proj", "down_proj"])))
    halves = {
        name: t if name.endswith(".scaling") else t.to(dtype)
        for name, t in factor_state(model).items()
    }
    floats = {name: t if name.endswith(".scaling") else t.float() for name, t in halves.items()}
    found, expected = fold(halves), fold(floats)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])
