"""Checks of the exercises in chapter 4.4, fused LoRA."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_course.classroom.first_exercises import exercise, mistake


class Shapes(TorchDispatchMode):
    """Collects the shapes of all results that are computed inside it, views of what was there before left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if torch.is_tensor(result) and not function.is_view:
            self.seen.add(tuple(result.shape))
        return result


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).norm() <= 1e-4 * expected.norm()
    )


@exercise("4.4-a", points=2)
def check_backward(learner):
    """`learner(g, x, W, A, B, scaling)` → ∂L/∂x, ∂L/∂A, ∂L/∂B for `y = x Wᵀ + scaling · (x Aᵀ) Bᵀ`."""
    generator = torch.Generator().manual_seed(0)
    rows, n_in, n_out, r, s = 6, 9, 11, 3, 2.5
    g, x, W, A, B = (
        torch.randn(size, generator=generator)
        for size in ((rows, n_out), (rows, n_in), (n_out, n_in), (r, n_in), (n_out, r))
    )
    with Shapes() as shapes:
        answer = learner(g, x, W, A, B, s)
    mistake(
        not isinstance(answer, tuple) or len(answer) != 3,
        "Three gradients are expected: of x, of A and of B.",
    )
    wanted = {"x": [rows, n_in], "A": [r, n_in], "B": [n_out, r]}
    for (name, shape), gradient in zip(wanted.items(), answer, strict=True):
        mistake(
            not torch.is_tensor(gradient) or list(gradient.shape) != shape,
            "The gradient of {} has the shape of {}, {}.",
            name,
            name,
            shape,
        )
    grad_x, grad_A, grad_B = answer
    right_A, right_B, base = s * (g @ B).t() @ x, s * g.t() @ (x @ A.t()), g @ W
    mistake(
        _close(grad_x, base), "∂L/∂x has the base's part only; x reaches y through A and B as well."
    )
    mistake(
        _close(grad_x, s * g @ B @ A),
        "∂L/∂x has the update's part only: g W, through the frozen base, is missing. Frozen means no gradient of W, not no gradient through it.",
    )
    mistake(
        _close(grad_x, base + g @ B @ A),
        "The scale is missing in ∂L/∂x: the update's part is s · (g B) A.",
    )
    mistake(
        _close(grad_A * s, right_A) or _close(grad_B * s, right_B),
        "The scale is missing in ∂L/∂A or ∂L/∂B: both products are multiplied by s in y.",
    )
    mistake(
        _close(grad_A, s * right_A) or _close(grad_B, s * right_B),
        "The scale is applied twice in ∂L/∂A or ∂L/∂B.",
    )
    for name, gradient, right in (
        ("x", grad_x, base + s * g @ B @ A),
        ("A", grad_A, right_A),
        ("B", grad_B, right_B),
    ):
        mistake(
            not _close(gradient, right),
            "∂L/∂{} is not that of autograd; relative error {:.2g}.",
            name,
            ((gradient - right).norm() / right.norm()).item(),
        )
    built = (n_out, n_in) in shapes.seen or (n_in, n_out) in shapes.seen
    mistake(
        built,
        "The gradients are right, but a matrix of the size of W was built on the way: multiply from the thin side, (g B) A and gᵀ (x Aᵀ).",
    )


@exercise("4.4-b", points=1)
def check_fold_scale(learner):
    """`learner(A, B, scaling)` → `A`, `B` of an adapter with the same ΔW and scaling 1."""
    generator = torch.Generator().manual_seed(1)
    A, B, s = torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator), 3.0
    kept = A.clone(), B.clone()
    answer = learner(A, B, s)
    mistake(
        not isinstance(answer, tuple) or len(answer) != 2 or not all(map(torch.is_tensor, answer)),
        "Two matrices are expected: A and B.",
    )
    mistake(
        not (torch.equal(A, kept[0]) and torch.equal(B, kept[1])),
        "You changed the matrices you were given: whoever still holds the adapter would have another one.",
    )
    new_A, new_B = answer
    mistake(
        new_A.shape != A.shape or new_B.shape != B.shape,
        "A stays {} and B {}; yours are {} and {}.",
        list(A.shape),
        list(B.shape),
        list(new_A.shape),
        list(new_B.shape),
    )
    made, right = new_B @ new_A, s * B @ A
    mistake(
        _close(made, s * right),
        "The scale is in both factors, so ΔW has it squared. Put it in one, or its square root in each.",
    )
    mistake(
        _close(made, B @ A), "The scale is lost: at scaling 1 your ΔW is B A, not scaling · B A."
    )
    mistake(_close(made, B @ A / s), "You divided by the scale.")
    mistake(
        not _close(made, right),
        "Your ΔW is another one; relative error {:.2g}.",
        ((made - right).norm() / right.norm()).item(),
    )


@exercise("4.4-c", points=2)
def check_batched(learner):
    """`learner(x, A, B, index)` → `[batch, T, out]`, row i's update with adapter `index[i]`."""
    generator = torch.Generator().manual_seed(2)
    batch, length, count, r, n_in, n_out = 4, 5, 6, 3, 7, 8
    x, A, B = (
        torch.randn(size, generator=generator)
        for size in ((batch, length, n_in), (count, r, n_in), (count, n_out, r))
    )
    index = torch.tensor([4, 1, 4, 0])

    def of(adapters: Tensor) -> Tensor:
        return torch.stack([x[i] @ A[n].t() @ B[n].t() for i, n in enumerate(adapters)])

    with Shapes() as shapes:
        found = learner(x, A, B, index)
    mistake(
        not torch.is_tensor(found) or found.shape != (batch, length, n_out),
        "A tensor [batch, T, out] = {} is expected.",
        [batch, length, n_out],
    )
    mistake(_close(found, of(torch.arange(batch))), "Row i uses adapter i: look up index[i].")
    mistake(
        _close(found, of(index.sort().values)),
        "Rows and adapters are out of step: you sorted the rows and did not put them back.",
    )
    every = sum(of(torch.full((batch,), n)) for n in range(count))
    mistake(
        _close(found, every) or _close(found, every / count),
        "Every row gets all adapters: pick one for each row.",
    )
    mistake(
        _close(found, of(torch.full((batch,), int(index[0])))),
        "All rows use the first row's adapter.",
    )
    mistake(
        not _close(found, of(index)),
        "Not the updates of the rows' own adapters; relative error {:.2g}.",
        ((found - of(index)).norm() / of(index).norm()).item(),
    )
    built = any(shape[-2:] in {(n_out, n_in), (n_in, n_out)} for shape in shapes.seen)
    mistake(
        built,
        "The result is right, but a ΔW [out, in] was built for adapters or rows: multiply x by A first, then by B.",
    )


@exercise("4.4-d", points=2)
def check_times_merged(learner):
    """`learner(original, now, A, B, scaling)` → how many times ΔW is in the weight, a whole number."""
    generator = torch.Generator().manual_seed(3)
    A, B, s = torch.randn(2, 20, generator=generator), torch.randn(30, 2, generator=generator), 0.5
    original = torch.randn(30, 20, generator=generator)
    delta = s * B @ A

    def answer(times: int, dtype: torch.dtype = torch.float32) -> Any:
        weight = original.to(dtype)
        for _ in range(abs(times)):
            weight = (weight.float() + (delta if times > 0 else -delta)).to(dtype)
        return learner(original.to(dtype), weight, A, B, s)

    twice = answer(2)
    mistake(
        isinstance(twice, bool),
        "How many times is asked, not whether: a weight into which ΔW was merged twice is not merged well either.",
    )
    number = (
        isinstance(twice, int)
        or (torch.is_tensor(twice) and twice.ndim == 0)
        or isinstance(twice, float)
    )
    mistake(not number, "A whole number is expected, not a {}.", type(twice).__name__)
    mistake(
        round(float(twice)) == 1,
        "A weight with ΔW in it twice counts as once: ΔW is scaling · B A, with the scale."
        if float(answer(1)) != 1
        else "A double merge looks like a single one to your function: measure how much of ΔW is there.",
    )
    mistake(
        abs(float(twice) - 4) < 0.5,
        "Twice counts as four times: you have squared something, or counted twice.",
    )
    mistake(round(float(twice)) != 2, "For a weight with ΔW in it twice you say {}.", twice)
    mistake(
        round(float(answer(-1))) == 1,
        "A weight from which ΔW was taken away once too often counts as merged: a norm has no sign, a scalar product with ΔW has.",
    )
    mistake(float(answer(0)) != 0, "For the original weight you say {}, not 0.", answer(0))
    rounded = [answer(times, torch.bfloat16) for times in (-1, 0, 1, 2)]
    mistake(
        [round(float(value)) for value in rounded] != [-1, 0, 1, 2],
        "In bf16 the weight is rounded, and you say {} for -1, 0, 1 and 2 times: look for the nearest whole number, not for equality.",
        rounded,
    )
    mistake(
        any(float(value) != round(float(value)) for value in rounded),
        "A whole number is expected; in bf16 you say {}: round it.",
        rounded[-1],
    )
