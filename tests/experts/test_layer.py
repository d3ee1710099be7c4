"""`experts.layer`: the mixture against its equation, plain LoRA and PEFT's X-LoRA; training and saving."""

import functools
from pathlib import Path

import pytest
import torch
from peft import XLoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from lora_course.arguments import training_arguments
from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.experts import (
    ExpertsLinear,
    GateExperts,
    balance_loss,
    expert_state,
    fixed_gates,
    freeze_experts,
    latest_gates,
    mix_experts,
)
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, disabled, inject, merge, trainable_parameters
from lora_course.lora import LoRALinear
from lora_course.states import adapter_state, factor_state, use_adapter
from lora_course.training import AdapterTrainer
from tests.experts.models import CLOSE, IDS, MODES, gradients, logits, mixture, shuffle
from tests.models import batch, config, qwen, randomize
from tests.tolerances import EXACT

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_expert_is_lora_from_the_first_weight_through_training() -> None:
    models = []
    for arguments in ({"layer": ExpertsLinear, "num_experts": 1}, {}):
        base = qwen()
        torch.manual_seed(4)
        model = inject(base, config(lora_alpha=7), **arguments)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            model(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for one, plain in zip(*(adapter_layers(m).values() for m in models), strict=True):
        torch.testing.assert_close(one.A, plain.A, **CLOSE)
        torch.testing.assert_close(one.B, plain.B, **CLOSE)
        assert plain.B.abs().max() > 1e-3
    torch.testing.assert_close(logits(models[0], IDS), logits(models[1], IDS), **CLOSE)


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_one_hot_gates_choose_that_expert(arguments: dict) -> None:
    model = mixture(**arguments)
    for index in range(3):
        plain = use_adapter(inject(qwen(), config()), expert_state(model, index))
        with fixed_gates(model, torch.eye(3)[index]):
            torch.testing.assert_close(logits(model, IDS), logits(plain, IDS), **CLOSE)
    assert not torch.allclose(logits(model, IDS), logits(plain, IDS), atol=1e-2)


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_identical_experts_leave_the_router_without_effect_or_gradient(arguments: dict) -> None:
    model = mixture(**arguments)
    for layer in adapter_layers(model).values():
        layer.A.data = layer.A.data[:3].repeat(3, 1)
        layer.B.data = layer.B.data[:, :3].repeat(1, 3)
    plain = use_adapter(inject(qwen(), config()), expert_state(model, 1))
    torch.testing.assert_close(logits(model, IDS), logits(plain, IDS), **CLOSE)
    model(**batch()).loss.backward()
    for layer in adapter_layers(model).values():
        if hasattr(layer, "router"):
            assert layer.router.grad.abs().max() < 1e-6 < layer.A.grad.abs().max()


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_it_starts_as_the_base_whatever_the_router(arguments: dict) -> None:
    model = inject(qwen(), config(), ExpertsLinear, num_experts=3, **arguments)
    for layer in adapter_layers(model).values():
        if hasattr(layer, "router"):
            nn.init.normal_(layer.router, std=50)
    torch.testing.assert_close(logits(model, IDS), logits(qwen(), IDS), **EXACT)


@pytest.mark.parametrize(
    ("arguments", "count"), [({}, 2), ({"routing": "shared"}, 1), ({"top_k": 2}, 2)], ids=str
)
def test_gates_and_layer_are_those_of_the_equation(arguments: dict, count: int) -> None:
    model = shuffle(mixture(**arguments), size=3)  # gates so soft that a dropped one is missed
    hidden, inputs, outputs = {}, {}, {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda _, args, i=i: hidden.__setitem__(i, args[0]))
    layer = model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(
        lambda _, args, y: inputs.update({0: args[0]}) or outputs.update({0: y})
    )
    model(input_ids=IDS)
    assert sum(hasattr(layer, "router") for layer in adapter_layers(model).values()) == count
    h = hidden[0] if arguments.get("routing") else hidden[1]
    router = model.model.layers[0 if arguments.get("routing") else 1].self_attn.q_proj.router
    p = torch.softmax(h / h.norm(dim=-1, keepdim=True) @ router.T, -1)
    if arguments.get("top_k"):
        least = p.argmin(-1, keepdim=True)
        p = p.scatter(-1, least, 0)
        p = p / p.sum(-1, keepdim=True)
    found = list(latest_gates(model).values())[-1]
    torch.testing.assert_close(found, p.detach(), **CLOSE)
    assert (
        (found >= 0).all()
        and torch.allclose(found.sum(-1), torch.ones(3, 9))
        and found.std(1).max() > 1e-2
    )
    x = inputs[0]
    parts = [
        4 * p[..., e : e + 1] * (x @ layer.A[3 * e : 3 * e + 3].T @ layer.B[:, 3 * e : 3 * e + 3].T)
        for e in range(3)
    ]
    torch.testing.assert_close(outputs[0], layer.base_layer(x) + sum(parts), **CLOSE)


def test_gradients_are_those_of_the_equation() -> None:
    h, gates = (
        torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True),
        torch.rand(2, 5, 3, dtype=torch.float64, requires_grad=True),
    )
    ranks = torch.tensor([4, 0, 3])
    assert torch.autograd.gradcheck(lambda a, b: GateExperts.apply(a, b, ranks), (h, gates))
    equal = torch.rand(
        2, 5, 7, dtype=torch.float64, requires_grad=True
    )  # seven experts of rank 1, said as one number or as a list
    assert torch.autograd.gradcheck(lambda a, b: GateExperts.apply(a, b, 1), (h, equal))
    two = torch.cat([h, h], -1).detach()
    torch.testing.assert_close(
        GateExperts.apply(two, equal, 2),
        GateExperts.apply(two, equal, torch.full((7,), 2)),
        **EXACT,
    )


def test_experts_of_unequal_rank_that_load_state_dict_brings_keep_their_gates() -> None:
    config_of = {"layer": ExpertsLinear, "num_experts": 2}
    model, other = (shuffle(inject(qwen(), config(r=4), **config_of), seed) for seed in (1, 2))
    state = other.state_dict()
    for name in [n for n in state if n.endswith(".ranks")]:
        state[name] = torch.tensor([6, 2])
    model.load_state_dict(state)
    layer = next(iter(adapter_layers(model).values()))
    gates, h = torch.rand(2, 5, 2), torch.randn(2, 5, 8)
    layer.gating.gates = gates
    torch.testing.assert_close(
        layer.transform_hidden(h), h * gates.repeat_interleave(torch.tensor([6, 2]), -1), **EXACT
    )
    assert layer.r == 6


def test_the_base_runs_once_and_two_products_serve_all_experts() -> None:
    model = mixture(8)
    calls = []
    for layer in adapter_layers(model).values():
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=IDS)
    assert len(calls) == len(adapter_layers(model)) == 14


def test_the_mixture_equals_pefts_xlora(tmp_path: Path) -> None:
    folders, states = {}, []
    for i in range(2):
        plain = randomize(inject(qwen(), config(r=3 + i, lora_alpha=7 + i)), seed=i)
        states.append(factor_state(plain))
        folders[str(i)] = str(
            export_peft(plain, tmp_path / str(i))
        )  # X-LoRA runs only with these names
    base = qwen()
    base.config.use_cache = False
    theirs = get_peft_model(
        base, XLoraConfig(task_type="CAUSAL_LM", hidden_size=48, adapters=folders)
    ).eval()
    gates = torch.rand(3, 9, 2, generator=torch.Generator().manual_seed(1))
    classifier = theirs.base_model.internal_xlora_classifier
    classifier.forward = lambda *_, **__: gates[:, :, None].expand(-1, -1, classifier.n_layers, -1)
    ours = mix_experts(qwen(), [folders["0"], states[1]])
    with fixed_gates(ours, gates), torch.no_grad():
        torch.testing.assert_close(logits(ours, IDS), theirs(input_ids=IDS).logits, **CLOSE)


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_gradient_checkpointing_changes_no_gradient(arguments: dict) -> None:
    model = mixture(**arguments)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model)
    assert found.keys() == expected.keys() and any(name.endswith("router") for name in found)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


def test_checkpointing_that_would_lose_or_mix_up_gates_is_refused() -> None:
    model = mixture()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="Reentrant"):
        gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch(), use_cache=False).loss
    with disabled(model), torch.no_grad():
        model(**batch(), use_cache=False)  # the base's own pass disturbs nothing
    loss.backward()
    loss = model(**batch(), use_cache=False).loss
    model(input_ids=IDS[:2].flip(1), use_cache=False)
    with pytest.raises(RuntimeError, match="later forward pass"):
        loss.backward()
    model.gradient_checkpointing_disable()
    loss = model(**batch(), use_cache=False).loss
    model(input_ids=IDS[:2].flip(1), use_cache=False)
    loss.backward()  # without checkpointing nothing is computed again


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_: object) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_run_that_is_killed_resumes_to_the_same_experts_and_routers(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in batch(8, 9)["input_ids"]]
    states = []
    for callbacks in ([], [Stop()]):
        folder = tmp_path / str(len(callbacks))
        arguments = training_arguments(
            folder, "cpu", max_steps=4, save_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, lr_scheduler_type="constant", bf16=False, disable_tqdm=True,
        )  # fmt: skip
        loss = functools.partial(balance_loss, weight=0.1)
        AdapterTrainer(
            mixture(), arguments, train_dataset=rows, auxiliary_loss=loss, callbacks=callbacks
        ).train()
        again = AdapterTrainer(mixture(), arguments, train_dataset=rows, auxiliary_loss=loss)
        again.train(resume_from_checkpoint=True)
        states.append(adapter_state(again.model))
    assert sum(key.endswith("router") for key in states[0]) == 2
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(
        states[0]["model.layers.1.self_attn.q_proj.router"],
        adapter_state(mixture())["model.layers.1.self_attn.q_proj.router"],
    )


def test_saved_experts_are_loaded_with_their_router_and_arguments(tmp_path: Path) -> None:
    model = mixture(top_k=2, gate_by="sequence", prefix=3, routing="shared")
    loaded = load_adapter(qwen(), save_adapter(model, tmp_path))
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), **EXACT)
    assert trainable_parameters(loaded) == trainable_parameters(model)
    frozen = load_adapter(qwen(), save_adapter(freeze_experts(mixture()), tmp_path / "frozen"))
    assert trainable_parameters(frozen) == 2 * 3 * 48
    with pytest.raises(ValueError, match="3 experts of ranks"):
        use_adapter(mixture(4, routing="shared"), adapter_state(model))
    with pytest.raises(ValueError, match="another kind of layer"):
        use_adapter(mixture(), adapter_state(model))


REFUSED = [
    ({"num_experts": 0}, "num_experts=0"), ({"routing": "block"}, "routing='block'"), ({"gate_by": "text"}, "gate_by='text'"),
    ({"prefix": 0}, "prefix=0"), ({"top_k": 5}, "top_k=5"), ({"top_k": 1}, "learn nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=str)
def test_arguments_that_make_no_sense_are_refused_and_nothing_is_changed(
    arguments: dict, words: str
) -> None:
    model = qwen()
    with pytest.raises(ValueError, match=words):
        inject(model, config(), ExpertsLinear, **arguments)
    assert not any(isinstance(m, LoRALinear) for m in model.modules()) and all(
        p.requires_grad for p in model.parameters()
    )


def test_what_no_fixed_matrix_equals_is_refused_by_name(tmp_path: Path) -> None:
    model = mixture()
    layer = next(iter(adapter_layers(model).values()))
    for refused in (
        merge,
        factor_state,
        lambda m: export_peft(m, tmp_path),
        lambda m: layer.delta_weight(),
        lambda m: layer.merge(),
    ):
        with pytest.raises(NotImplementedError, match=r"depends on the input.*expert_state"):
            refused(model)
    assert not layer.merged
