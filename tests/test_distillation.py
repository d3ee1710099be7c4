"""`lora_course.distillation`: the loss against independent ones, teachers that take turns on one base, loop and Trainer."""

import math
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import datasets
import pytest
import torch
from peft import AdaLoraConfig
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from lora_course.adalora import AdaLoRALinear
from lora_course.distillation import (
    DistillationConfig,
    DistillationTrainer,
    Teachers,
    distill,
    distillation_loss,
    distillation_step,
    mixture_log_probs,
)
from lora_course.experts import ExpertsLinear
from lora_course.injection import adapter_layers, inject, merge
from lora_course.lora import LoRALinear
from lora_course.states import adapter_state, concatenate, factor_state
from lora_course.training import AdapterTrainer, training_arguments
from tests.models import batch, config, qwen, randomize

KINDS = [{}, {"divergence": "reverse"}, {"mixture": "logits"}]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The batches are too small for a second thread, which on a busy machine only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(
    *shape: int, seed: int = 0, size: float = 2.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def masked(rows: int = 3, length: int = 7, vocab: int = 11) -> torch.Tensor:
    """Labels of which some are ignored: a prompt, padding, one in the middle."""
    labels = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(9))
    labels[0, :3] = labels[1, 5:] = labels[2, 4] = -100
    return labels


def by_hand(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, alpha: float, T: float
) -> torch.Tensor:
    """Hinton's loss with one teacher, from torch's own pieces, token by token."""
    kl, ce, count = 0.0, 0.0, 0
    for row in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[row, t] != -100:
                p = F.softmax(teacher[row, t - 1] / T, -1)
                kl = kl + F.kl_div(F.log_softmax(student[row, t - 1] / T, -1), p, reduction="sum")
                ce = ce + F.cross_entropy(student[row, t - 1], labels[row, t])
                count += 1
    return ((1 - alpha) * ce + alpha * T**2 * kl) / count


# --- mixtures -----------------------------------------------------------------------------------------------------------


def test_the_more_confident_teacher_wins_where_logits_are_averaged_and_not_where_probabilities_are() -> (
    None
):
    sharp, flat = torch.tensor([10.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    probabilities = mixture_log_probs([sharp, flat]).exp()
    averaged = mixture_log_probs([sharp, flat], None, DistillationConfig(mixture="logits")).exp()
    # from first principles: the sharp one gives e¹⁰/(e¹⁰+2) and 1/(e¹⁰+2), the flat one 1/(e³+2) and e³/(e³+2)
    a, b = math.exp(10), math.exp(3)
    assert probabilities.tolist() == pytest.approx(
        [
            (a / (a + 2) + 1 / (b + 2)) / 2,
            (1 / (a + 2) + b / (b + 2)) / 2,
            (1 / (a + 2) + 1 / (b + 2)) / 2,
        ],
        rel=1e-5,
    )
    # the mean of the logits is (5, 1.5, 0)
    total = math.exp(5) + math.exp(1.5) + 1
    assert averaged.tolist() == pytest.approx(
        [math.exp(5) / total, math.exp(1.5) / total, 1 / total], rel=1e-5
    )
    assert [round(x, 2) for x in probabilities[:2].tolist()] == [0.52, 0.45]
    assert [round(x, 2) for x in averaged[:2].tolist()] == [0.96, 0.03]


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mixtures_equal_their_definition(weights: list | None, temperature: float) -> None:
    given = [logits(4, 11, seed=k, dtype=torch.float64) for k in range(3)]
    w = torch.as_tensor(weights or [1.0, 1.0, 1.0], dtype=torch.float64)
    w = w / w.sum()
    p = sum(w[k] * F.softmax(z / temperature, -1) for k, z in enumerate(given))
    q = F.softmax(sum(w[k] * z / temperature for k, z in enumerate(given)), -1)
    for mixture, expected in [("probabilities", p), ("logits", q)]:
        found = mixture_log_probs(
            given, weights, DistillationConfig(mixture=mixture, temperature=temperature)
        )
        torch.testing.assert_close(found.exp(), expected, rtol=1e-12, atol=1e-14)


def test_probabilities_that_underflow_keep_their_logarithm_also_from_half_precision() -> None:
    given = [torch.tensor([0.0, -500.0, -1000.0]), torch.tensor([0.0, -700.0, -900.0])]
    expected = torch.tensor([0.0, -500.0 - math.log(2), -900.0 - math.log(2)])
    torch.testing.assert_close(mixture_log_probs(given), expected)
    rough = [z.bfloat16() for z in (logits(5, 11), logits(5, 11, seed=1))]
    found = mixture_log_probs(rough)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, mixture_log_probs([z.double() for z in rough]).float(), atol=1e-5, rtol=1e-5
    )


# --- the loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_teacher_is_standard_distillation(alpha: float, temperature: float) -> None:
    student, teacher, labels = logits(3, 7, 11), logits(3, 7, 11, seed=1), masked()
    mine, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = distillation_loss(
        mine, [teacher], labels, DistillationConfig(alpha=alpha, temperature=temperature)
    )
    expected = by_hand(other, teacher, labels, alpha, temperature)
    loss.total.backward()
    expected.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        loss.task, by_hand(student, teacher, labels, 0, 1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        loss.divergence,
        by_hand(student, teacher, labels, 1, temperature) / temperature**2,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_divergences_equal_those_of_torch_distributions(divergence: str) -> None:
    student, teachers, labels = (
        logits(3, 7, 11),
        [logits(3, 7, 11, seed=k) for k in (1, 2)],
        masked(),
    )
    keep = labels[:, 1:] != -100
    q = F.softmax(student[:, :-1][keep].double(), -1)
    p = sum(F.softmax(z[:, :-1][keep].double(), -1) for z in teachers) / 2
    first, second = (p, q) if divergence == "forward" else (q, p)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(first), torch.distributions.Categorical(second)
    ).mean()
    loss = distillation_loss(
        student, teachers, labels, DistillationConfig(alpha=1.0, divergence=divergence)
    )
    assert loss.divergence.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_no_loss_and_no_gradient_where_the_student_is_the_teacher(
    kind: dict, temperature: float
) -> None:
    z = logits(3, 7, 11, dtype=torch.float64)
    student = z.clone().requires_grad_()
    settings = DistillationConfig(alpha=1.0, temperature=temperature, **kind)
    loss = distillation_loss(student, [z, z.clone()], masked(), settings, weights=[0.3, 0.7])
    loss.total.backward()
    assert abs(loss.total.item()) < 1e-14 and student.grad.abs().max() < 1e-14
    other = logits(3, 7, 11, seed=1, dtype=torch.float64).requires_grad_()
    loss = distillation_loss(other, [z], masked(), settings)
    loss.total.backward()
    assert loss.total > 0.1 and other.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_equal_finite_differences(kind: dict) -> None:
    teachers = [logits(1, 3, 4, seed=k, dtype=torch.float64) for k in (1, 2)]
    labels = torch.tensor([[0, 2, 3]])
    student = logits(1, 3, 4, dtype=torch.float64).requires_grad_()
    settings = DistillationConfig(alpha=0.4, temperature=1.7, **kind)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(z, teachers, labels, settings, [1, 3]).total, student
    )


def test_t_squared_keeps_the_gradients_size_and_without_it_it_vanishes() -> None:
    sizes: dict[bool, list[float]] = {True: [], False: []}
    for squared, found in sizes.items():
        for temperature in (1.0, 4.0, 16.0):
            student = logits(8, 33, 101, size=1.0).requires_grad_()
            settings = DistillationConfig(
                alpha=1.0, temperature=temperature, temperature_squared=squared
            )
            labels = torch.zeros(8, 33, dtype=torch.long)
            distillation_loss(
                student, [logits(8, 33, 101, seed=1, size=1.0)], labels, settings
            ).total.backward()
            found.append(student.grad.norm().item())
    assert max(sizes[True]) / min(sizes[True]) < 2
    assert 200 < sizes[False][0] / sizes[False][2] < 500
    assert sizes[True][2] / sizes[False][2] == pytest.approx(256, rel=1e-4)


def test_the_gradient_is_alpha_t_times_the_difference_of_the_distributions() -> None:
    student, teachers, labels = (
        logits(3, 7, 11).requires_grad_(),
        [logits(3, 7, 11, seed=k) for k in (1, 2)],
        masked(),
    )
    distillation_loss(
        student, teachers, labels, DistillationConfig(alpha=1.0, temperature=3.0), [1, 3]
    ).total.backward()
    keep = labels[:, 1:] != -100
    p = sum(w * F.softmax(z / 3, -1) for w, z in zip((0.25, 0.75), teachers, strict=True))
    expected = 3 * (F.softmax(student.detach() / 3, -1) - p)[:, :-1] * keep[..., None] / keep.sum()
    torch.testing.assert_close(student.grad[:, :-1], expected, rtol=1e-4, atol=1e-7)
    assert (student.grad[:, -1] == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tokens_that_do_not_count_and_the_teachers_order_do_not_matter(kind: dict) -> None:
    student, teachers, labels = (
        logits(3, 7, 11),
        [logits(3, 7, 11, seed=k) for k in (1, 2, 3)],
        masked(),
    )
    settings = DistillationConfig(temperature=2.0, **kind)
    expected = distillation_loss(student, teachers, labels, settings, [0.5, 0.2, 0.3])
    elsewhere = F.pad(labels[:, 1:] == -100, (0, 1), value=True)
    for z in (student, *teachers):
        z[elsewhere] = 1e4 * torch.randn_like(z[elsewhere])
    again = distillation_loss(student, teachers, labels, settings, [0.5, 0.2, 0.3])
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))
    turned = distillation_loss(student, teachers[::-1], labels, settings, [0.3, 0.2, 0.5])
    torch.testing.assert_close(turned.total, expected.total, rtol=1e-6, atol=1e-6)
    wrong = distillation_loss(student, teachers[::-1], labels, settings, [0.5, 0.2, 0.3])
    assert abs(wrong.total - expected.total) > 1e-3


def test_a_batch_in_which_no_token_counts_is_no_loss() -> None:
    student, teacher, labels = logits(3, 7, 11).requires_grad_(), logits(3, 7, 11, seed=1), masked()
    none = distillation_loss(student, [teacher], torch.full_like(labels, -100))
    none.total.backward()
    assert none.total == 0 and (student.grad == 0).all()


def test_teachers_get_no_gradient() -> None:
    teacher = logits(3, 7, 11, seed=1).requires_grad_()
    distillation_loss(logits(3, 7, 11).requires_grad_(), [teacher], masked()).total.backward()
    assert teacher.grad is None


@pytest.mark.parametrize(("call", "message"), [
    (lambda z, y: distillation_loss(z, [], y), "one for each teacher"),
    (lambda z, y: distillation_loss(z, [z], y[:, 1:]), r"labels are \[3, 6\]"),
    (lambda z, y: distillation_loss(z, [z, z[..., :5]], y), "Teacher 1's logits are .* same vocabulary"),
    (lambda z, y: distillation_loss(z, [z], y, weights=[1, 2]), "1 teachers and weights"),
    (lambda z, y: distillation_loss(z, [z, z, z], y, weights=[1, 2]), "3 teachers and weights"),
    (lambda z, y: distillation_loss(z, [z, z], y, weights=[1, -1]), "not all are 0"),
    (lambda z, y: distillation_loss(z, [z, z], y, weights=[0, 0]), "not all are 0"),
    (lambda z, y: DistillationConfig(alpha=1.2), r"alpha=1.2.*\[0, 1\]"),
    (lambda z, y: DistillationConfig(temperature=0), "temperature=0.*positive"),
    (lambda z, y: DistillationConfig(mixture="mean"), "'probabilities' or 'logits'"),
    (lambda z, y: DistillationConfig(divergence="js"), "'forward' or 'reverse'"),
])  # fmt: skip
def test_wrong_input_is_refused_with_a_sentence(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(logits(3, 7, 11), masked())


# --- teachers -----------------------------------------------------------------------------------------------------------


def adapted(seed: int = 1, base: nn.Module | None = None, **fields: object) -> nn.Module:
    """The tests' base (or `base`) with an adapter as after training."""
    return randomize(inject(qwen() if base is None else base, config(**fields)), seed)


def student(**fields: object) -> nn.Module:
    return adapted(seed=7, r=2, lora_alpha=4, **fields)


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
        torch.testing.assert_close(
            switched(**batch()).logits, alone(**batch()).logits, rtol=1e-5, atol=1e-5
        )
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
        torch.testing.assert_close(
            model(**batch()).logits, plain(**batch()).logits, rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(model(**batch()).logits, own, rtol=0, atol=0)
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
    loss.total.backward()
    assert abs(loss.total.item()) < 1e-6
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
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


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
        ).total
        expected = expected + loss * (labels[one, 1:] != -100).sum()
    torch.testing.assert_close(
        found.total, expected / (labels[:, 1:] != -100).sum(), rtol=1e-4, atol=1e-5
    )


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
        torch.testing.assert_close(model(**batch()).logits, alone(**batch()).logits, rtol=0, atol=0)
    codes = {
        name: m.weight.data.clone()
        for name, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = distill(teachers, [batch()] * 12, optimizer, DistillationConfig(alpha=1.0))
    assert history[-1]["total"] < 0.8 * history[0]["total"]
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
        loss = distillation_step(teachers, batch()).total
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
    assert found.total.dtype == torch.float32
    found.total.backward()
    # logits that were computed in bf16: 8 bits of mantissa
    torch.testing.assert_close(found.total, expected.total, rtol=3e-2, atol=1e-3)
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


# --- Trainer ------------------------------------------------------------------------------------------------------------


def rows(count: int = 24, length: int = 9) -> datasets.Dataset:
    """Random tokens of two domains; a different number of labels in every row counts."""
    ids = torch.randint(97, (count, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[: i % 6] = -100
    columns = {
        "input_ids": ids.numpy(),
        "labels": labels.numpy(),
        "domain": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(columns).with_format("torch")


def arguments(folder: Path, **overrides: object):
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_strategy": "no", "bf16": False,
        "disable_tqdm": True, "max_grad_norm": 0, **overrides,
    }  # fmt: skip
    return training_arguments(folder, device="cpu", **settings)


STATES = {"a": adapter_state(adapted(2, r=4)), "b": adapter_state(adapted(3, r=5))}
BY_DOMAIN = [[1.0, 0.0], [0.3, 0.7]]
SETTINGS = DistillationConfig(alpha=0.6, temperature=2.0)


def trainer_of(
    folder: Path, model: nn.Module | None = None, **overrides: object
) -> DistillationTrainer:
    own = {
        key: overrides.pop(key)
        for key in ("auxiliary_loss", "callbacks", "eval_dataset", "train_dataset")
        if key in overrides
    }
    settings, weights = overrides.pop("config", SETTINGS), overrides.pop("weights", BY_DOMAIN)
    model = student(lora_dropout=0.1) if model is None else model
    teachers = Teachers(model, overrides.pop("states", STATES), weights)
    return DistillationTrainer(
        model,
        arguments(folder, **overrides),
        teachers=teachers,
        config=settings,
        **{"train_dataset": rows()} | own,
    )


def penalty(model: nn.Module) -> torch.Tensor:
    return 0.3 * sum((layer.A**2).sum() for layer in adapter_layers(model).values())


def assert_same(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("accumulation", "auxiliary"), [(1, None), (3, None), (3, penalty)])
def test_training_equals_a_loop_by_hand(tmp_path: Path, accumulation: int, auxiliary) -> None:
    model = student()
    trainer = trainer_of(
        tmp_path, model, gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.1, learning_rate=1e-3, auxiliary_loss=auxiliary,
    )  # fmt: skip
    batches = [dict(part) for part in trainer.get_train_dataloader()]
    trainer.train()

    reference = student().train()
    teachers = [adapted(2, r=4), adapted(3, r=5)]
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    history = []
    for step in range(4):
        micro = batches[step * accumulation : (step + 1) * accumulation]
        tokens = sum((part["labels"][:, 1:] != -100).sum() for part in micro)
        total = torch.zeros(())
        for part in micro:
            ids, labels, domain = part["input_ids"], part["labels"], part["domain"]
            z = reference(input_ids=ids).logits
            for row in range(len(ids)):
                with torch.no_grad():
                    p = sum(
                        w * F.softmax(t(input_ids=ids[row, None]).logits[0] / 2, -1)
                        for w, t in zip(BY_DOMAIN[domain[row]], teachers, strict=True)
                    )
                for t in range(1, ids.shape[1]):
                    if labels[row, t] != -100:
                        kl = F.kl_div(
                            F.log_softmax(z[row, t - 1] / 2, -1), p[t - 1], reduction="sum"
                        )
                        total = (
                            total
                            + (0.4 * F.cross_entropy(z[row, t - 1], labels[row, t]) + 0.6 * 4 * kl)
                            / tokens
                        )
        total = total + (auxiliary(reference) if auxiliary else 0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    # Adam divides by the gradient's own size, which amplifies the last bits of small gradients.
    assert_same(adapter_state(model), adapter_state(reference), 1e-5)
    assert [entry["loss"] for entry in trainer.history] == pytest.approx(history, abs=1e-4)


def test_however_the_batch_is_cut_the_step_is_the_same(tmp_path: Path) -> None:
    states, histories = [], []
    for size, accumulation in [(8, 1), (2, 4)]:
        model = student()
        trainer = trainer_of(
            tmp_path,
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            auxiliary_loss=penalty,
        )
        trainer.train()
        states.append(adapter_state(model))
        histories.append(trainer.history)
    assert_same(*states, tolerance=2e-5)
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert {"divergence", "task"} < set(one)
    plain = [entry["loss"] for entry in trainer_history(tmp_path, SETTINGS)]
    for entry, without in zip(histories[0][:1], plain[:1], strict=True):
        assert without == pytest.approx(
            0.4 * entry["task"] + 0.6 * 4 * entry["divergence"], rel=1e-4
        )


def trainer_history(folder: Path, settings: DistillationConfig) -> list[dict[str, float]]:
    trainer = trainer_of(folder, student(), per_device_train_batch_size=8, config=settings)
    trainer.train()
    return trainer.history


def test_without_the_teachers_share_it_is_adapter_trainer_dropout_and_all(tmp_path: Path) -> None:
    model, plain = student(lora_dropout=0.3), student(lora_dropout=0.3)
    trainer_of(tmp_path, model, config=DistillationConfig(alpha=0.0)).train()
    AdapterTrainer(plain, arguments(tmp_path), train_dataset=rows()).train()
    assert_same(adapter_state(model), adapter_state(plain), 1e-6)


def test_the_loop_and_the_trainer_agree(tmp_path: Path) -> None:
    one, other = student(), student()
    trainer = trainer_of(
        tmp_path, one, lr_scheduler_type="constant", warmup_steps=0, learning_rate=1e-3
    )
    batches = list(trainer.get_train_dataloader())[:4]
    trainer.train()
    optimizer = torch.optim.AdamW(
        [p for p in other.parameters() if p.requires_grad], lr=1e-3, weight_decay=0
    )
    history = distill(Teachers(other, STATES, BY_DOMAIN), batches, optimizer, SETTINGS)
    assert_same(adapter_state(one), adapter_state(other), 1e-6)
    assert [entry["loss"] for entry in trainer.history] == pytest.approx(
        [entry["total"] for entry in history], abs=1e-4
    )


def test_evaluation_gives_the_loss_without_dropout(tmp_path: Path) -> None:
    model = student(lora_dropout=0.3)
    trainer = trainer_of(tmp_path, model, eval_dataset=rows(6), per_device_eval_batch_size=6)
    metrics = trainer.evaluate()
    model.train()
    dropping = distillation_step(trainer.teachers, rows(6)[:], SETTINGS).total.item()
    assert abs(metrics["eval_loss"] - dropping) > 1e-4
    model.eval()
    expected = distillation_step(trainer.teachers, rows(6)[:], SETTINGS)
    assert metrics["eval_loss"] == pytest.approx(expected.total.item(), rel=1e-5)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 3


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = trainer_of(tmp_path / "whole", **saving)
    whole.train()
    trainer_of(tmp_path / "cut", callbacks=[Stop()], **saving).train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} >= {"adapter.safetensors", "optimizer.pt"}
    assert (checkpoint / "adapter.safetensors").stat().st_size < 1.2 * sum(
        t.nbytes for t in adapter_state(whole.model).values()
    ) + 8192
    resumed = trainer_of(tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same(adapter_state(resumed.model), adapter_state(whole.model))
    assert resumed.history == whole.history


def test_another_loss_or_model_is_refused(tmp_path: Path) -> None:
    model = student()
    teachers = Teachers(model, STATES)
    with pytest.raises(ValueError, match="another model"):
        DistillationTrainer(student(), arguments(tmp_path), teachers=teachers, train_dataset=rows())
    with pytest.raises(ValueError, match="another loss"):
        DistillationTrainer(
            model,
            arguments(tmp_path, label_smoothing_factor=0.1),
            teachers=teachers,
            train_dataset=rows(),
        )
