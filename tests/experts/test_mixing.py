"""`experts.mixing`: adapters brought in and taken out, the balance loss, gates fixed."""

import math
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.experts import (
    balance_loss,
    expert_state,
    fixed_gates,
    freeze_experts,
    mix_experts,
)
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, injection_of, trainable_parameters
from lora_course.lora import AdapterState
from lora_course.states import adapter_state, factor_state, split_state, use_adapter
from tests.experts.models import CLOSE, IDS, gradients, logits, mixture
from tests.models import config, qwen, randomize
from tests.tolerances import EXACT

pytestmark = pytest.mark.usefixtures("one_thread")


def with_probabilities(p: Tensor, **arguments: object) -> nn.Module:
    model = mixture(p.shape[-1], **arguments)
    model(input_ids=IDS)
    for layer in adapter_layers(model).values():
        layer.gating.probabilities = p.expand(3, 1 if "gate_by" in arguments else 9, -1)
    return model


@pytest.mark.parametrize("arguments", [{}, {"top_k": 2}, {"gate_by": "sequence"}], ids=str)
def test_balance_loss_is_1_at_uniform_and_the_number_of_experts_at_collapse(
    arguments: dict,
) -> None:
    assert balance_loss(
        with_probabilities(torch.full((4,), 0.25), **arguments)
    ).item() == pytest.approx(1)
    collapsed = balance_loss(
        with_probabilities(torch.tensor([0.0, 0, 1, 0]), **arguments), weight=0.5
    ).item()
    assert collapsed == pytest.approx(
        0.5 * (2 if "top_k" in arguments else 4)
    )  # two experts share the choice where k = 2


def test_balance_loss_counts_real_tokens_and_follows_a_forward_pass() -> None:
    model = mixture()
    with pytest.raises(RuntimeError, match="follows a forward pass"):
        balance_loss(model)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    model(input_ids=IDS, attention_mask=mask)
    first = balance_loss(model)
    changed = IDS.clone()
    changed[0, :4] = 5
    model(input_ids=changed, attention_mask=mask)
    torch.testing.assert_close(balance_loss(model), first, **EXACT)
    losses = []
    for router in {
        id(layer.gating): layer.gating for layer in adapter_layers(model).values()
    }.values():
        p = router.probabilities[mask.bool()]
        f = torch.bincount(p.argmax(-1), minlength=3) / len(p)
        losses.append(3 * (f * p.mean(0)).sum())
    torch.testing.assert_close(first, torch.stack(losses).mean())


def test_minimising_the_balance_loss_spreads_the_gates() -> None:
    model = freeze_experts(mixture())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(30):
        model(input_ids=IDS)
        loss = balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (
        loss < 1.2 and sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 3 * 48
    )


def three_adapters(folder: Path) -> tuple[list, list[nn.Module]]:
    """A state, a folder of this course and one of PEFT, of other ranks, scales and modules."""
    fields = [{}, {"r": 5, "lora_alpha": 3}, {"r": 2, "target_modules": ["q_proj", "down_proj"]}]
    models = [randomize(inject(qwen(), config(**f)), seed=i) for i, f in enumerate(fields)]
    given = [
        factor_state(models[0]),
        save_adapter(models[1], folder / "ours"),
        str(export_peft(models[2], folder / "peft")),
    ]
    return given, models


@pytest.mark.parametrize("base_in_4bit", [False, True])
def test_adapters_of_any_origin_become_experts_and_come_out_again(
    tmp_path: Path, base_in_4bit: bool
) -> None:
    given, models = three_adapters(tmp_path)
    if base_in_4bit:
        given, models = given[:2], models[:2]
    mixed = mix_experts(quantised(qwen()) if base_in_4bit else qwen(), given)
    assert {name for name, p in mixed.named_parameters() if p.requires_grad} == {
        f"model.layers.{i}.self_attn.q_proj.router" for i in range(2)
    }
    for index, model in enumerate(models):
        plain = (
            use_adapter(inject(quantised(qwen()), injection_of(model).config), adapter_state(model))
            if base_in_4bit
            else model
        )
        with fixed_gates(mixed, torch.eye(len(given))[index]):
            torch.testing.assert_close(logits(mixed, IDS), logits(plain, IDS), atol=1e-4, rtol=1e-4)
        state, expected = split_state(expert_state(mixed, index)), adapter_layers(model)
        assert state.keys() == expected.keys()
        for name, tensors in state.items():
            delta = tensors["scaling"] * tensors["B"].double() @ tensors["A"].double()
            torch.testing.assert_close(
                delta.float(), expected[name].delta_weight().detach(), **CLOSE
            )
    gradients(mixed)
    saved = load_adapter(
        quantised(qwen()) if base_in_4bit else qwen(),
        save_adapter(shuffle_routers(mixed), tmp_path / "mixed"),
    )
    torch.testing.assert_close(logits(saved, IDS), logits(mixed.eval(), IDS), **EXACT)
    assert trainable_parameters(saved) == trainable_parameters(mixed) == 2 * len(given) * 48
    assert trainable_parameters(freeze_experts(saved, False)) > 5000
    with pytest.raises(ValueError, match="experts 0 to"):
        expert_state(mixed, len(given))


def shuffle_routers(model: nn.Module) -> nn.Module:
    for layer in adapter_layers(model).values():
        if hasattr(layer, "router"):
            nn.init.normal_(layer.router, std=9)
    return model


def quantised(model: nn.Module) -> nn.Module:
    """The attention's linear layers in 4 bits, deterministically."""
    for block in model.model.layers:
        for name in ("q_proj", "o_proj"):
            old = getattr(block.self_attn, name)
            new = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                old.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            new.load_state_dict(old.state_dict())
            setattr(block.self_attn, name, new.to("cpu"))
    return model


def test_one_expert_leaves_as_a_plain_peft_adapter(tmp_path: Path) -> None:
    model = mixture()
    plain = use_adapter(inject(qwen(), config()), expert_state(model, 2))
    back = mix_experts(qwen(), [export_peft(plain, tmp_path)])
    torch.testing.assert_close(logits(back, IDS), logits(plain, IDS), **CLOSE)


def test_bad_experts_and_gates_are_refused(tmp_path: Path) -> None:
    plain = qwen()
    with pytest.raises(ValueError, match="experts is empty"):
        mix_experts(plain, [])
    with pytest.raises(ValueError, match="plain LoRA"):
        mix_experts(plain, [adapter_state(mixture())])
    with pytest.raises(FileNotFoundError, match="save_adapter"):
        mix_experts(plain, [tmp_path / "nothing"])
    state = factor_state(randomize(inject(qwen(), config())))
    with pytest.raises(ValueError, match="another base model"):
        mix_experts(
            plain, [{key: t[:, :-1] if key.endswith(".A") else t for key, t in state.items()}]
        )
    assert not hasattr(plain, "lora_course") and all(p.requires_grad for p in plain.parameters())
    model = mix_experts(plain, [state, state])
    with pytest.raises(ValueError, match="E = 2"), fixed_gates(model, [1.0, 0, 0]):
        pass
    with pytest.raises(ValueError, match="injected with LoRALinear.*layer=ExpertsLinear"):
        balance_loss(inject(qwen(), config()))
    fresh = mix_experts(qwen(), [state])
    with pytest.raises(RuntimeError, match="Run the model, not the layer"):
        fresh.model.layers[0].mlp.up_proj(torch.ones(1, 2, 48))


def test_fixed_gates_within_fixed_gates_give_the_outer_ones_back() -> None:
    model = mixture()
    with fixed_gates(model, [1.0, 0.0, 0.0]):
        first = logits(model, IDS)
        with fixed_gates(model, [0.0, 0.0, 1.0]):
            assert not torch.allclose(logits(model, IDS), first)
        torch.testing.assert_close(logits(model, IDS), first, atol=0, rtol=0)


@pytest.mark.parametrize("gates", [[math.nan, 0, 1], [-1.0, 1, 1], [math.inf, 0, 0]])
def test_gates_that_are_no_weights_are_refused(gates: list[float]) -> None:
    with (
        pytest.raises(ValueError, match="negative, NaN or infinite"),
        fixed_gates(mixture(), gates),
    ):
        pass


def test_modules_of_rank_zero_in_one_expert_or_in_all_add_nothing() -> None:
    def pruned(seed: int, *endings: str) -> AdapterState:
        state = factor_state(randomize(inject(qwen(), config()), seed))
        for name, tensors in split_state(state).items():
            if name.endswith(endings):
                state |= {f"{name}.A": tensors["A"][:0], f"{name}.B": tensors["B"][:, :0]}
        return state

    states = [pruned(1, "0.mlp.up_proj", "q_proj"), pruned(2, "0.mlp.up_proj")]
    mixed = mix_experts(qwen(), states)
    for index, state in enumerate(states):
        plain = use_adapter(inject(qwen(), config()), state)
        with fixed_gates(mixed, torch.eye(2)[index]):
            torch.testing.assert_close(logits(mixed, IDS), logits(plain, IDS), **CLOSE)
    base = qwen()
    with pytest.raises(ValueError, match="rank 0"):
        mix_experts(base, [pruned(1, "proj")])
    assert not hasattr(base, "lora_course")
