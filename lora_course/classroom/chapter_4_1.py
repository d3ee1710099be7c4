"""Checks of the exercises in chapter 4.1, sparse LoRA."""

import torch
from torch import Tensor, nn

from lora_course.classroom.first_exercises import exercise, mistake
from lora_course.sparse import GatedLoRALinear, SparseLoRALinear, scatter


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(
        found.float(), expected.float(), atol=1e-5, rtol=1e-4
    )


@exercise("4.1-a", points=1)
def check_proximal_step(learner):
    """`learner(gate, gradient, learning_rate, penalty)` → the gate after a gradient step and the threshold."""
    gate = torch.tensor([0.9, -0.9, 0.27, -0.27, 0.14, -0.14, 0.02, 0.0])
    gradient = torch.tensor([0.5, 0.5, -0.1, 0.1, 0.1, -0.1, -0.4, 0.3])
    rate, penalty = 0.2, 0.6
    before = gate.clone()
    found = learner(gate, gradient, rate, penalty)
    mistake(
        not isinstance(found, Tensor) or found.shape != gate.shape,
        "A tensor of the gate's shape, {}, is expected.",
        list(gate.shape),
    )
    moved = gate - rate * gradient

    def soft(x, t):
        return x.sign() * (x.abs() - t).clamp(min=0)

    expected = soft(moved, rate * penalty)
    sequential = torch.where(moved.abs() > rate * penalty, soft(moved, rate * penalty), moved)
    sequential = torch.where(sequential.abs() < rate * penalty, torch.zeros_like(moved), sequential)
    mistake(
        not torch.equal(gate, before),
        "Your function changed the gate that it was given: return a new tensor.",
    )
    mistake(
        _same(found, soft(gate, rate * penalty)),
        "The gradient step is missing: the threshold comes after it.",
    )
    mistake(
        _same(found, soft(moved, penalty)),
        "The threshold is η λ, the learning rate times the penalty; yours is λ.",
    )
    mistake(
        _same(found, torch.where(moved.abs() > rate * penalty, moved, torch.zeros_like(moved))),
        "You set the small gates to zero and leave the others: the soft threshold also takes η λ from each gate that stays open.",
    )
    mistake(
        _same(found, moved - rate * penalty * moved.sign()),
        "Gates smaller than the threshold have changed sign: they should stop at zero.",
    )
    mistake(
        _same(found, (moved - rate * penalty).clamp(min=0)),
        "Negative gates are closed by your threshold: it works on the size and keeps the sign.",
    )
    mistake(
        _same(found, sequential),
        "Gates between η λ and 2 η λ are closed too: you subtract first and then ask whether the rest is small.",
    )
    mistake(
        _same(found, soft(gate, rate * penalty) - rate * gradient),
        "The threshold came before the gradient step, so the zeros are gone again.",
    )
    mistake(
        not _same(found, expected),
        "For gate {:.2f} with gradient {:.1f} the result is {:.3f}, not {:.3f}.",
        *_first_difference(found, expected, gate, gradient),
    )
    mistake(
        bool(((found != 0) & (expected == 0)).any()),
        "The closed gates are nearly zero, not zero: only an exact zero can be pruned.",
    )


def _first_difference(
    found: Tensor, expected: Tensor, gate: Tensor, gradient: Tensor
) -> tuple[float, ...]:
    i = int((found - expected).abs().argmax())
    return gate[i].item(), gradient[i].item(), expected[i].item(), found[i].item()


@exercise("4.1-b", points=1)
def check_density(learner):
    """`learner(r, sparsity_A, sparsity_B)` → the expected share of entries of ΔW = B A that are not zero."""
    cases = [(4, 0.5, 0.5), (8, 0.5, 0.5), (8, 0.9, 0.9), (3, 0.8, 0.0), (1, 0.25, 0.6)]
    found = [learner(*case) for case in cases]
    mistake(
        any(not isinstance(value, (int, float)) for value in found),
        "A number is expected, such as 0.75; you return {!r}.",
        found[0],
    )

    def is_(function) -> bool:
        return all(
            abs(value - function(*case)) < 1e-9 for value, case in zip(found, cases, strict=True)
        )

    mistake(
        is_(lambda r, a, b: (1 - a) * (1 - b)),
        "That is the chance that one product B_ik A_kj is not zero; ΔW_ij is a sum of r of them.",
    )
    mistake(
        is_(lambda r, a, b: min(1, r * (1 - a) * (1 - b))),
        "The chances of the r products do not add up: several of them may be non-zero at once.",
    )
    mistake(
        is_(lambda r, a, b: 1 - (a * b) ** r),
        "A product is zero if either factor is masked, not only if both are.",
    )
    mistake(
        is_(lambda r, a, b: (1 - (1 - a) * (1 - b)) ** r),
        "That is the share of zeros; the share that is not zero is asked for.",
    )
    mistake(
        is_(lambda r, a, b: 1 - a**r), "B is masked too: a product is zero if either factor is."
    )
    for value, case in zip(found, cases, strict=True):
        r, a, b = case
        right = 1 - (1 - (1 - a) * (1 - b)) ** r
        mistake(
            abs(value - right) > 1e-3,
            "For r={}, sparsity {} and {} it is {:.4f}, and you return {:.4f}.",
            *case,
            right,
            float(value),
        )


@exercise("4.1-c", points=2)
def check_gradients(learner):
    """`learner(x, values, indices, shape, gradient)` → (∂L/∂x, ∂L/∂values) of y = x Sᵀ, where `gradient` is ∂L/∂y."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, 4)  # out, in
    indices = torch.tensor([1, 2, 6, 11, 12, 19])
    x = torch.randn(3, 2, 4, generator=generator)
    values, gradient = (
        torch.randn(6, generator=generator),
        torch.randn(3, 2, 5, generator=generator),
    )
    S = scatter(values, indices, shape)
    of_x = gradient @ S
    full = gradient.reshape(-1, 5).T @ x.reshape(-1, 4)
    answer = learner(x, values, indices, shape, gradient)
    mistake(
        not isinstance(answer, tuple)
        or len(answer) != 2
        or not all(isinstance(t, Tensor) for t in answer),
        "Two tensors are expected: the gradient of x and that of the values.",
    )
    found_x, found_values = answer
    mistake(
        found_values.shape == shape,
        "You return the gradient of all of S: only the entries at the indices are trained.",
    )
    mistake(
        found_x.shape != x.shape,
        "The gradient of x has the shape {}; that of x, {}, is expected.",
        list(found_x.shape),
        list(x.shape),
    )
    mistake(
        found_values.shape != values.shape,
        "The gradient of the values has the shape {}; {} is expected: sum over all leading dimensions of x.",
        list(found_values.shape),
        list(values.shape),
    )
    mistake(
        _same(found_values, full.T.flatten()[indices]),
        "You took the transposed matrix at the places: entry (i, j) of S has the index i · in + j, with i the output.",
    )
    mistake(
        _same(found_values, full.flatten()[indices] / 6),
        "The gradient of the values is a sum over tokens, not their mean: the loss has its mean already.",
    )
    mistake(
        _same(found_values, (gradient[-1].T @ x[-1]).flatten()[indices]),
        "Only the last sequence counts in your gradient of the values: sum over all of them.",
    )
    mistake(
        not _same(found_values, full.flatten()[indices]),
        "The gradient of the values is (∂L/∂y)ᵀ x, taken at the places; yours differs by up to {:.2g}.",
        (found_values - full.flatten()[indices]).abs().max().item(),
    )
    mistake(
        not _same(found_x, of_x),
        "The gradient of the values is right, that of x is not: it is ∂L/∂y times S.",
    )


@exercise("4.1-d", points=2)
def check_plain(learner):
    """`learner(layer)` → `A` [r', in], `B` [out, r'], `lora_alpha` of a plain LoRA layer that computes the same, without ranks that are off."""
    for kind in ("gates", "masks"):
        torch.manual_seed(3)
        layer: GatedLoRALinear | SparseLoRALinear
        if kind == "gates":
            layer = GatedLoRALinear(nn.Linear(9, 11), r=6, lora_alpha=15)
            nn.init.normal_(layer.B)
            layer.gate.data[torch.tensor([0, 3, 4])] = 0
            kept = 3
        else:
            layer = SparseLoRALinear(nn.Linear(9, 11), r=6, lora_alpha=15, sparsity=0.5)
            nn.init.normal_(layer.values_B)
            kept = 6
        before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
        delta = layer.delta_weight().detach()
        answer = learner(layer)
        mistake(
            not isinstance(answer, tuple) or len(answer) != 3,
            "Three things are expected: A, B, lora_alpha.",
        )
        A, B, alpha = answer
        mistake(
            not all(torch.is_tensor(t) and t.ndim == 2 for t in (A, B)), "A and B are matrices."
        )
        A, B, alpha = A.detach(), B.detach(), float(alpha)
        mistake(
            kind == "gates" and A.shape == (6, 9),
            "A still has the closed ranks: keep the rows whose gate is not zero.",
        )
        mistake(
            A.shape != (kept, 9) or B.shape != (11, kept),
            "For {} A is {} and B {}; {} and {} are expected.",
            kind,
            list(A.shape),
            list(B.shape),
            [kept, 9],
            [11, kept],
        )
        made = alpha / kept * B @ A
        if kind == "gates":
            open_ = layer.gate != 0
            mistake(
                _same(made, (2.5 * layer.B[:, open_] @ layer.A[open_]).detach()),
                "The gates are missing: fold them into A or into B.",
            )
            mistake(
                _same(made, 2 * delta),
                "The scale has doubled: lora_alpha is divided by the rank that is left, so it has to shrink with it.",
            )
            mistake(
                _same(made, delta / 3),
                "You return the scale; lora_alpha is the scale times the rank that is left.",
            )
        mistake(
            not _same(made, delta),
            "For {} the plain layer computes something else; relative error of ΔW {:.2g}.",
            kind,
            ((made - delta).norm() / delta.norm()).item(),
        )
        changed = [
            name
            for name, tensor in layer.tensors().items()
            if not torch.equal(tensor, before[name])
        ]
        mistake(
            bool(changed),
            "Your function changed the layer's {}: leave the layer as it was.",
            changed,
        )
