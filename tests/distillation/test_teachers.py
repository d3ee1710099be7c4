"""`distillation.teachers`: adapters that take turns on one base, and leave the student as it was."""

import bitsandbytes as bnb
import pytest
import torch
from peft import AdaLoraConfig
from torch import nn

from lora_course.adalora import AdaLoRALinear
from lora_course.distillation import (
    DistillationConfig,
    Teachers,
    distill,
    distillation_loss,
    distillation_step,
)
from lora_course.experts import ExpertsLinear
from lora_course.injection import inject, merge, unmerge
from lora_course.lora import LoRALinear
from lora_course.progressive import begin_stage
from lora_course.states import adapter_state, concatenate, factor_state
from tests.distillation.models import KINDS, adapted, student
from tests.models import batch, config, qwen, randomize
from tests.progressive.models import STAGES, stacked
from tests.tolerances import EXACT, ROUNDED, TRAINED

pytestmark = pytest.mark.usefixtures("one_thread")


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, t in model.state_dict().items()
    }


TEACHERS = {
    "plain": {},
    "higher rank, other scale": {"r": 6, "lora_alpha": 3, "use_rslora": True},
    "fewer modules": {"target_modules": ["q_proj", "down_proj"]},
    "a module the student lacks": {"target_modules": "all-linear", "rank_pattern": {"v_proj": 5}},
}


@pytest.mark.parametrize("fields", TEACHERS.values(), ids=TEACHERS)
def test_a_switched_model_computes_what_the_teacher_alone_does(fields: dict) -> None:
    alone = adapted(lora_dropout=0.5, **fields).eval()
    model = student(target_modules=["q_proj", "up_proj"], lora_dropout=0.3).train()
    teachers = Teachers(model, {"one": adapter_state(alone), "other": adapter_state(adapted(5))})
    with teachers.switched("other"):
        pass
    with teachers.switched("one") as switched:
        assert switched is model and not model.training
        torch.testing.assert_close(switched(**batch()).logits, alone(**batch()).logits, **ROUNDED)
    assert model.training


@pytest.mark.parametrize("layer", [AdaLoRALinear, ExpertsLinear])
def test_students_may_have_another_layer_and_teachers_have_had_one(layer: type[LoRALinear]) -> None:
    model = inject(
        qwen(),
        AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=4, target_modules="all-linear", total_step=10
        )
        if layer is AdaLoRALinear
        else config(),
        layer,
    )
    randomize(model, 1).train()
    own = model.eval()(**batch()).logits
    plain = adapted(2).eval()
    teachers = Teachers(model, {"plain": adapter_state(plain)})
    with teachers.switched("plain"):
        torch.testing.assert_close(model(**batch()).logits, plain(**batch()).logits, **ROUNDED)
    torch.testing.assert_close(model(**batch()).logits, own, **EXACT)
    if layer is AdaLoRALinear:
        with pytest.raises(ValueError, match="another kind of layer.*factor_state"):
            Teachers(student(), {"a": adapter_state(model)})
        back = student()
        with Teachers(back, {"a": factor_state(model)}).switched("a"):
            torch.testing.assert_close(back(**batch()).logits, own, rtol=1e-4, atol=1e-4)


def test_neither_building_nor_switching_touches_the_student() -> None:
    model = student(lora_dropout=0.4).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(True)  # trained beside the adapter
    everything = lambda: (  # noqa: E731
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()],
        bits(model),
        id(model.lora_course),
    )
    before = everything()
    teachers = Teachers(
        model, {"one": adapter_state(adapted(2)), "other": adapter_state(adapted(3, r=5))}
    )
    assert everything() == before
    for name in teachers.names:
        with teachers.switched(name):
            model(**batch())
    with pytest.raises(ZeroDivisionError), teachers.switched("other"):
        _ = 1 / 0
    assert everything() == before
    with pytest.raises(ValueError, match="another base"):
        Teachers(model, {"x": {"model.layers.9.q_proj.A": torch.ones(1, 1)}})
    assert everything() == before


def test_training_changes_the_student_alone_and_the_optimiser_goes_on_with_the_same_tensors() -> (
    None
):
    model = student(lora_dropout=0.2)
    teachers = Teachers(
        model, {"a": adapter_state(adapted(2, r=5)), "b": adapter_state(adapted(3))}
    )
    given, base = [bits(nn.ModuleList(layers.values())) for layers in teachers.layers], bits(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    history = distill(
        teachers, [batch()] * 20, optimizer, DistillationConfig(alpha=1.0, temperature=2.0)
    )
    assert all(
        one is other
        for one, other in zip(
            parameters, (p for p in model.parameters() if p.requires_grad), strict=True
        )
    )
    assert len(optimizer.state) == len(parameters) and model.training
    assert [bits(nn.ModuleList(layers.values())) for layers in teachers.layers] == given
    after = bits(model)
    assert all(after[name] == base[name] for name in base if not name.endswith((".A", ".B")))
    assert all(after[name] != base[name] for name in base if name.endswith((".A", ".B")))
    assert _halved([entry["divergence"] for entry in history])


def _halved(values: list[float]) -> bool:
    return sum(values[-3:]) < 0.5 * sum(values[:3])


def test_a_teacher_drops_nothing_while_the_student_trains_and_takes_no_random_number_from_it() -> (
    None
):
    model = student(lora_dropout=0.5).train()
    teachers = Teachers(model, {"a": adapter_state(adapted(2, lora_dropout=0.5))})
    settings = DistillationConfig()
    one, other = teachers.log_probs(batch(), settings), teachers.log_probs(batch(), settings)
    assert torch.equal(one, other)
    torch.manual_seed(0)
    mine = distillation_step(teachers, batch(), settings).task
    torch.manual_seed(0)
    torch.testing.assert_close(mine, model(**batch()).loss.detach())


def test_an_equal_student_has_nothing_to_learn() -> None:
    model = student()
    state = adapter_state(model)
    loss = distillation_step(
        Teachers(model, {"a": state, "b": state}),
        batch(),
        DistillationConfig(alpha=1.0, temperature=2.0),
    )
    loss.loss.backward()
    assert abs(loss.loss.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in model.parameters() if p.requires_grad) < 1e-6


def ragged(rows: int = 4) -> dict[str, torch.Tensor]:
    inputs = batch(rows=rows)
    labels = inputs["labels"].clone()
    for row in range(rows):
        labels[row, : row + 1] = -100
    return {
        "input_ids": inputs["input_ids"],
        "labels": labels,
        "attention_mask": torch.ones_like(labels),
    }


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_teachers_on_one_base_are_the_loss_of_their_own_models(kind: dict) -> None:
    model = student()
    others = [adapted(seed, r=seed) for seed in (2, 3, 4)]
    inputs, settings = ragged(), DistillationConfig(alpha=0.6, temperature=2.0, **kind)
    teachers = Teachers(
        model, {str(i): adapter_state(m) for i, m in enumerate(others)}, weights=[1, 2, 5]
    )
    model(**inputs)
    with torch.no_grad():
        given = [m(input_ids=inputs["input_ids"]).logits for m in others]
    expected = distillation_loss(
        model(input_ids=inputs["input_ids"]).logits, given, inputs["labels"], settings, [1, 2, 5]
    )
    found = distillation_step(teachers, inputs, settings)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TRAINED)


def test_by_domain_each_teacher_runs_on_its_rows_alone() -> None:
    model = student()
    others = [adapted(seed) for seed in (2, 3, 4)]
    table = [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]
    teachers = Teachers(
        model, {str(i): adapter_state(m) for i, m in enumerate(others)}, weights=table
    )
    inputs, settings = (
        ragged() | {"domain": torch.tensor([1, 0, 1, 1])},
        DistillationConfig(alpha=0.6),
    )
    rows = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = distillation_step(teachers, inputs, settings)
    handle.remove()
    assert rows == [1, 3, 3, 4]
    with torch.no_grad():
        given = [m(input_ids=inputs["input_ids"]).logits for m in others]
    labels, z, expected = inputs["labels"], model(input_ids=inputs["input_ids"]).logits, 0.0
    for row, weights in enumerate(torch.tensor(table)[inputs["domain"]].tolist()):
        one = slice(row, row + 1)
        loss = distillation_loss(
            z[one], [t[one] for t in given], labels[one], settings, weights
        ).loss
        expected = expected + loss * (labels[one, 1:] != -100).sum()
    torch.testing.assert_close(found.loss, expected / (labels[:, 1:] != -100).sum(), **TRAINED)


def test_a_4bit_base_serves_teachers_and_student() -> None:
    def base() -> nn.Module:
        model = qwen()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                four = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                )
                four.load_state_dict(module.state_dict())
                model.set_submodule(name, four.to("cpu"))
        return model

    model, alone = adapted(7, base(), r=2), adapted(2, base(), r=5)
    teachers = Teachers(model, {"a": adapter_state(alone)})
    with teachers.switched("a"):
        torch.testing.assert_close(model(**batch()).logits, alone(**batch()).logits, **EXACT)
    codes = {
        name: m.weight.data.clone()
        for name, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = distill(teachers, [batch()] * 12, optimizer, DistillationConfig(alpha=1.0))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert all(
        torch.equal(model.get_submodule(name).weight.data, code) for name, code in codes.items()
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_student_and_not_a_teacher(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = student(lora_dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        teachers = Teachers(model, {"a": adapter_state(adapted(2)), "b": adapter_state(adapted(3))})
        torch.manual_seed(0)
        loss = distillation_step(teachers, batch()).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_under_autocast_the_loss_is_computed_in_fp32() -> None:
    model = student().train()
    teachers = Teachers(model, {"a": adapter_state(adapted(2)), "b": adapter_state(adapted(3))})
    expected = distillation_step(teachers, batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_step(teachers, batch())
    assert found.loss.dtype == torch.float32
    found.loss.backward()
    # logits that were computed in bf16: 8 bits of mantissa
    torch.testing.assert_close(found.loss, expected.loss, rtol=3e-2, atol=1e-3)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_pruned_module_and_a_merged_teacher_state_are_taken() -> None:
    states = [adapter_state(adapted(seed)) for seed in (2, 3)]
    both = concatenate(states, [0.7, -0.2])
    empty = {key: t for key, t in both.items() if not key.startswith("model.layers.0.mlp.up_proj.")}
    pruned = both | {
        "model.layers.0.mlp.up_proj.A": torch.zeros(0, 48),
        "model.layers.0.mlp.up_proj.B": torch.zeros(80, 0),
    }
    model = student()
    teachers = Teachers(model, {"empty": empty, "pruned": pruned, "both": both})
    found = []
    for name in teachers.names:
        with teachers.switched(name):
            found.append(model(**batch()).logits)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[1], found[2])


@pytest.mark.parametrize(("sources", "weights", "message"), [
    (lambda s: {}, None, "by name"),
    (lambda s: [s], None, "by name"),
    (lambda s: s, None, "by name"),
    (lambda s: {"a": s}, [1, 2], r"weights are \[2\] for 1 teachers \['a'\]"),
    (lambda s: {"a": s}, [-1], "numbers of 0 or more"),
    (lambda s: {"a": s | {"model.layers.7.self_attn.q_proj.A": torch.ones(1, 2)}}, None, "'a' adapts .*layers.7.* made for another base"),
    (lambda s: {"a": s | {"model.layers.0.self_attn.q_proj.A": torch.ones(3, 2)}}, None, r"A \[r, 48\]"),
    (lambda s: {"a": {"model.norm.A": torch.ones(1, 48)}}, None, "a Qwen2RMSNorm; nn.Linear"),
])  # fmt: skip
def test_wrong_teachers_are_refused_with_a_sentence(sources, weights: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Teachers(student(), sources(adapter_state(adapted())), weights)


def test_merged_models_and_incomplete_batches_are_refused() -> None:
    model, state = student(), adapter_state(adapted())
    teachers = Teachers(model, {"a": state, "b": state}, weights=[[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="no column 'domain'"):
        teachers.log_probs(batch(), DistillationConfig())
    with pytest.raises(ValueError, match=r"domain=\[0, 2\]"):
        teachers.log_probs(batch() | {"domain": torch.tensor([0, 2])}, DistillationConfig())
    with pytest.raises(ValueError, match="'labels' is expected"):
        distillation_step(teachers, {"input_ids": batch()["input_ids"]})
    merge(model)
    with pytest.raises(RuntimeError, match="merged"), teachers.switched("a"):
        pass


def test_a_base_that_holds_earlier_stages_of_the_student_carries_no_teacher() -> None:
    model = begin_stage(stacked(mode="merge"), STAGES[0])
    alone = adapted(2).eval()
    teachers = Teachers(model, {"a": adapter_state(alone)})
    with (
        pytest.raises(RuntimeError, match=r"merge\(model\) and unmerge\(model\)"),
        teachers.switched("a"),
    ):
        pass
    unmerge(merge(model))
    with teachers.switched("a"):
        torch.testing.assert_close(model(**batch()).logits, alone(**batch()).logits, **ROUNDED)
