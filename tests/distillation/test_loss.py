"""`distillation.loss`: mixtures, divergences, gradients, against definitions and finite differences."""

import math

import pytest
import torch
from torch.nn import functional as F

from lora_course.distillation import (
    DistillationConfig,
    distillation_loss,
    mixture_log_probs,
)
from tests.distillation.models import KINDS
from tests.tolerances import ROUNDED

pytestmark = pytest.mark.usefixtures("one_thread")


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
        found, mixture_log_probs([z.double() for z in rough]).float(), **ROUNDED
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_teacher_is_standard_distillation(alpha: float, temperature: float) -> None:
    student, teacher, labels = logits(3, 7, 11), logits(3, 7, 11, seed=1), masked()
    mine, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = distillation_loss(
        mine, [teacher], labels, DistillationConfig(alpha=alpha, temperature=temperature)
    )
    expected = by_hand(other, teacher, labels, alpha, temperature)
    loss.loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.loss, expected, rtol=1e-5, atol=1e-6)
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
    assert loss.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_no_loss_and_no_gradient_where_the_student_is_the_teacher(
    kind: dict, temperature: float
) -> None:
    z = logits(3, 7, 11, dtype=torch.float64)
    student = z.clone().requires_grad_()
    settings = DistillationConfig(alpha=1.0, temperature=temperature, **kind)
    loss = distillation_loss(student, [z, z.clone()], masked(), settings, weights=[0.3, 0.7])
    loss.loss.backward()
    assert abs(loss.loss.item()) < 1e-14 and student.grad.abs().max() < 1e-14
    other = logits(3, 7, 11, seed=1, dtype=torch.float64).requires_grad_()
    loss = distillation_loss(other, [z], masked(), settings)
    loss.loss.backward()
    assert loss.loss > 0.1 and other.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_equal_finite_differences(kind: dict) -> None:
    teachers = [logits(1, 3, 4, seed=k, dtype=torch.float64) for k in (1, 2)]
    labels = torch.tensor([[0, 2, 3]])
    student = logits(1, 3, 4, dtype=torch.float64).requires_grad_()
    settings = DistillationConfig(alpha=0.4, temperature=1.7, **kind)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(z, teachers, labels, settings, [1, 3]).loss, student
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
            ).loss.backward()
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
    ).loss.backward()
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
    torch.testing.assert_close(turned.loss, expected.loss, rtol=1e-6, atol=1e-6)
    wrong = distillation_loss(student, teachers[::-1], labels, settings, [0.5, 0.2, 0.3])
    assert abs(wrong.loss - expected.loss) > 1e-3


def test_a_batch_in_which_no_token_counts_is_no_loss() -> None:
    student, teacher, labels = logits(3, 7, 11).requires_grad_(), logits(3, 7, 11, seed=1), masked()
    none = distillation_loss(student, [teacher], torch.full_like(labels, -100))
    none.loss.backward()
    assert none.loss == 0 and (student.grad == 0).all()


def test_teachers_get_no_gradient() -> None:
    teacher = logits(3, 7, 11, seed=1).requires_grad_()
    distillation_loss(logits(3, 7, 11).requires_grad_(), [teacher], masked()).loss.backward()
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
