"""`lora_course.experts`: the mixture against plain LoRA and PEFT's X-LoRA, causality, caching, and what is saved and refused."""

import copy
import functools
import pickle
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.experts import (
    ExpertsLinear,
    Weigh,
    balance_loss,
    expert_state,
    fixed_gates,
    freeze_experts,
    latest_gates,
    mask_prefix,
    mix_experts,
)
from lora_course.export import export_peft
from lora_course.injection import (
    adapter_layers,
    disabled,
    inject,
    injection_of,
    merge,
    trainable_parameters,
    unload,
)
from lora_course.lora import LoRALinear
from lora_course.states import adapter_state, factor_state, split_state, use_adapter
from lora_course.training import AdapterTrainer, training_arguments
from tests.models import batch, config, qwen, randomize

MODES = [
    {}, {"top_k": 2}, {"routing": "shared"}, {"gate_by": "sequence", "prefix": 3},
    {"gate_by": "sequence", "prefix": 4, "routing": "shared", "top_k": 2},
]  # fmt: skip
EXACT = {"atol": 0, "rtol": 0}
CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # the same sums in another order


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shuffle(model: nn.Module, seed: int = 1, size: float = 20.0) -> nn.Module:
    """Random non-zero factors, and routers whose gates differ from token to token."""
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        if hasattr(layer, "router"):
            layer.router.data.normal_(std=size, generator=generator)
    return model


def mixture(num_experts: int = 3, base: nn.Module | None = None, **arguments: object) -> nn.Module:
    return shuffle(
        inject(base or qwen(), config(), ExpertsLinear, num_experts=num_experts, **arguments)
    )


def logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


IDS = batch(3, 9)["input_ids"]


# ------------------------------------------------------------------------------------------ what it computes


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
    assert torch.autograd.gradcheck(lambda a, b: Weigh.apply(a, b, ranks), (h, gates))
    equal = torch.rand(
        2, 5, 7, dtype=torch.float64, requires_grad=True
    )  # seven experts of rank 1, said as one number or as a list
    assert torch.autograd.gradcheck(lambda a, b: Weigh.apply(a, b, 1), (h, equal))
    two = torch.cat([h, h], -1).detach()
    torch.testing.assert_close(
        Weigh.apply(two, equal, 2), Weigh.apply(two, equal, torch.full((7,), 2)), **EXACT
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


# ------------------------------------------------------------------------------------------ the balance loss


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


# ------------------------------------------------------------------------------------------ time, padding, caches


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_no_future_token_changes_an_earlier_logit(arguments: dict) -> None:
    model = mixture(**arguments)
    before = logits(model, IDS)
    for position in range(1, 9):
        changed = IDS.clone()
        changed[:, position] = (changed[:, position] + 1) % 97
        after = logits(model, changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], **EXACT)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-3)


def test_a_sequence_gate_is_one_for_all_tokens_after_the_prefix_and_equal_within_it() -> None:
    model = mixture(gate_by="sequence", prefix=4)
    logits(model, IDS)
    for gates in latest_gates(model).values():
        torch.testing.assert_close(gates[:, :4], torch.full((3, 4, 3), 1 / 3))
        torch.testing.assert_close(gates[:, 4:], gates[:, 4:5].expand(-1, 5, -1), **EXACT)
        assert gates[:, 4].std(0).max() > 1e-3


def padded(side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows = [IDS[0], IDS[1, :6], IDS[2, :2]]
    ids, mask = torch.full((3, 9), 7), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask, rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_padding_changes_nothing(arguments: dict, side: str) -> None:
    model = mixture(**arguments)
    ids, mask, rows = padded(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            together[i][mask[i].bool()], logits(model, row[None])[0], **CLOSE
        )


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_cached_generation_equals_the_full_forward(arguments: dict) -> None:
    """Left-padded prompts of 9, 6 and 2 tokens: the last one's prefix ends among the tokens it writes."""
    model = mixture(**arguments)
    ids, mask, rows = padded("left")
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i, row in enumerate(rows):
        text = torch.cat([row, written.sequences[i, 9:]])
        full = logits(model, text[None])[0, len(row) - 1 : -1]
        torch.testing.assert_close(torch.stack([step[i] for step in written.logits]), full, **CLOSE)


def test_beam_search_moves_the_sums_of_short_prompts_with_their_rows() -> None:
    model = mixture(gate_by="sequence", prefix=6)
    model.generation_config.pad_token_id = 0
    for length in (1, 2, 9):
        found = model.generate(
            IDS[:, :length], attention_mask=torch.ones(3, length, dtype=torch.long), num_beams=4, max_new_tokens=8,
            do_sample=False, eos_token_id=None, length_penalty=1.0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for row, score in zip(found.sequences, found.sequences_scores, strict=True):
            full = logits(model, row[None]).log_softmax(-1)[0, length - 1 : -1]
            expected = full.gather(1, row[length:, None]).sum() / 8
            torch.testing.assert_close(score, expected, **CLOSE)


def test_a_cache_can_be_copied_and_one_that_the_gates_did_not_see_is_refused() -> None:
    model = mixture(gate_by="sequence", prefix=4)
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
        again = model(input_ids=IDS[:, 5:], past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(again, logits(model, IDS)[:, 5:], **CLOSE)
        torch.testing.assert_close(
            model(input_ids=IDS[:, 5:], past_key_values=cache).logits, again, **EXACT
        )
        with disabled(model):
            foreign = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="filled with the experts off"):
            model(input_ids=IDS[:, 5:], past_key_values=foreign)
        cache.crop(-7)
        with pytest.raises(RuntimeError, match=r"holds \[2, 2, 2\].*have seen \[4, 4, 4\]"):
            model(input_ids=IDS[:, 2:], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask \[3, 9\]"):
            model(input_ids=IDS, attention_mask=torch.ones(3, 1, 9, 9, dtype=torch.bool))


def test_labels_of_prefix_and_padding_are_not_scored() -> None:
    labels = torch.arange(10).reshape(2, 5)
    assert mask_prefix(labels, 2).tolist() == [[-100, -100, 2, 3, 4], [-100, -100, 7, 8, 9]]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert mask_prefix(labels, 2, mask).tolist() == [
        [-100, -100, -100, -100, 4],
        [-100, -100, 7, 8, -100],
    ]


# ------------------------------------------------------------------------------------------ training


def gradients(model: nn.Module, with_balance: bool = True) -> dict[str, Tensor]:
    model.train().zero_grad()
    loss = model(**batch(), use_cache=False).loss
    (loss + balance_loss(model) if with_balance else loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_gradient_checkpointing_changes_no_gradient(arguments: dict) -> None:
    model = mixture(**arguments)
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(model)
    assert found.keys() == expected.keys() and any(name.endswith("router") for name in found)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


def test_checkpointing_that_would_lose_or_mix_up_gates_is_refused() -> None:
    model = mixture()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="Reentrant"):
        gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch(), use_cache=False).loss
    with disabled(model), torch.no_grad():
        model(**batch(), use_cache=False)  # the base's own pass disturbs nothing
    loss.backward()
    loss = model(**batch(), use_cache=False).loss
    model(input_ids=IDS[:2].flip(1), use_cache=False)
    with pytest.raises(RuntimeError, match="later forward pass"):
        loss.backward()
    model.activation_checkpointing_disable()
    loss = model(**batch(), use_cache=False).loss
    model(input_ids=IDS[:2].flip(1), use_cache=False)
    loss.backward()  # without checkpointing nothing is computed again


def test_autocast_leaves_the_router_in_fp32() -> None:
    model = mixture()
    expected = model(**batch()).loss
    first = latest_gates(model)["model.layers.0"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    torch.testing.assert_close(
        latest_gates(model)["model.layers.0"], first, **EXACT
    )  # the embeddings are in fp32 either way
    assert abs(loss - expected) < 0.05  # bf16 keeps 8 bits
    assert all(
        p.grad.dtype == torch.float32 and p.grad.abs().max() > 0
        for p in model.parameters()
        if p.requires_grad
    )


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


# ------------------------------------------------------------------------------------------ adapters brought in, saved, taken out


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


def test_copies_and_pickles_are_independent_and_unload_leaves_nothing() -> None:
    model = mixture(gate_by="sequence", prefix=3)
    expected = logits(model, IDS)
    gradients(model)  # gates with a graph, which torch does not copy
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(other.eval(), IDS), expected, **EXACT)
        for layer in adapter_layers(other).values():
            nn.init.zeros_(layer.B)
        torch.testing.assert_close(logits(other, IDS), logits(qwen(), IDS), **EXACT)
        unload(other)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in other.modules())
        torch.testing.assert_close(logits(other, IDS), logits(qwen(), IDS), **EXACT)
    torch.testing.assert_close(logits(model.eval(), IDS), expected, **EXACT)
    with disabled(model):
        torch.testing.assert_close(logits(model, IDS), logits(qwen(), IDS), **EXACT)


def test_a_base_that_is_kept_elsewhere_works() -> None:
    offloaded = cpu_offload(qwen(), execution_device="cpu")
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    model = mixture(base=offloaded)
    torch.testing.assert_close(logits(model, IDS), logits(mixture(), IDS), **CLOSE)
    gradients(model)


# ------------------------------------------------------------------------------------------ refusals


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


def test_models_without_one_stack_of_blocks_are_refused_and_left_as_they_were() -> None:
    plain = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="decoder blocks"):
        inject(plain, LoraConfig(r=2, target_modules=["a", "b"]), ExpertsLinear)
    model = qwen()
    with pytest.raises(ValueError, match="decoder blocks"):
        inject(model, config(target_modules=["q_proj", "lm_head"]), ExpertsLinear)
    for module in (plain, model):
        assert not any(isinstance(m, LoRALinear) or m._forward_pre_hooks for m in module.modules())
        assert all(p.requires_grad for p in module.parameters()) and not hasattr(
            module, "lora_course"
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
    with pytest.raises(ValueError, match="no experts"):
        balance_loss(inject(qwen(), config()))
    fresh = mix_experts(qwen(), [state])
    with pytest.raises(RuntimeError, match="Run the model, not the layer"):
        fresh.model.layers[0].mlp.up_proj(torch.ones(1, 2, 48))
