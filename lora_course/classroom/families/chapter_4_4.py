"""Graded problems of chapter 4.4, fused LoRA: a backward pass to mend, and a batch of adapters."""

import torch

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _backward_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = []
    for number in range(5):
        rows, inputs, outputs, r = (2, 3, 2, 1) if number < 2 else draw.sizes(4, 2, 9)
        g, x, W = (
            draw.normal(rows, outputs),
            draw.normal(rows, inputs),
            draw.normal(outputs, inputs),
        )
        made.append(
            (g, x, W, draw.normal(r, inputs), draw.normal(outputs, r), draw.choice([0.5, 2.0, 3.0]))
        )
    return made  # fmt: skip


backward = Family(
    id="4.4-backward",
    title="Find the bug: a backward pass",
    points=5,
    minutes=30,
    statement="""
    The function below was meant to be the backward pass of $y = xW^\\top + s\\,\\phi(xA^\\top)B^\\top$, given
    $g = \\partial L / \\partial y$ as rows; `gradcheck` fails. It has two mistakes. Mend it; keep its name and arguments. It shall do this.
    {activation} {through} {rows} Return {order}
    """,
    answer='''
    def backward(g, x, W, A, B, scaling):
        """g [n, out], x [n, in], W [out, in], A [r, in], B [out, r], a number → three gradients"""
        h = x @ A.T
        a, slope = $activation
        grad_a = scaling * (g @ B)
        grad_h = grad_a * slope
        grad_x = $through
        grad_A = grad_h.T @ x $rows
        grad_B = scaling * (g.T @ a) $rows
        return $order
    ''',
    conventions={
        "activation": {
            "none": ("$\\phi$ is the identity.", "h, torch.ones_like(h)"),
            "relu": ("$\\phi$ is ReLU.", "h.relu(), (h > 0).to(h.dtype)"),
            "tanh": ("$\\phi$ is tanh.", "h.tanh(), 1 - h.tanh() ** 2"),
            "square": ("$\\phi$ is the square.", "h**2, 2 * h"),
        },
        "through": {
            "both": ("The gradient of `x` goes through both paths.", "g @ W + grad_h @ A"),
            "adapter": ("Of `x` only the gradient through the adapter is wanted: the base's is computed elsewhere.", "grad_h @ A"),
        },
        "rows": {
            "sum": ("The gradients of `A` and `B` are sums over the rows.", ""),
            "mean": ("The gradients of `A` and `B` are divided by the number of rows.", "/ len(x)"),
        },
        "order": {
            "x": ("the gradients of `x`, `A`, `B`.", "grad_x, grad_A, grad_B"),
            "B": ("the gradients of `B`, `A`, `x`.", "grad_B, grad_A, grad_x"),
        },
    },
    book={"activation": "none", "through": "both", "rows": "sum", "order": "x"},
    cases=_backward_cases,
    bugs=(
        ("grad_a = scaling * (g @ B)", "grad_a = g @ B"),
        ("grad_B = scaling * (g.T @ a)", "grad_B = g.T @ a"),
        ("h = x @ A.T", "h = (x @ A.T).abs()"),
        ("grad_A = grad_h.T @ x", "grad_A = grad_h.T @ x.abs()"),
    ),
)  # fmt: skip


def _batch_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = []
    for number in range(6):
        adapters, r, inputs, outputs, batch, length = (
            (2, 1, 2, 3, 2, 2) if number < 2 else draw.sizes(6, 2, 8)
        )
        index = torch.randint(-1, adapters, (batch,), generator=draw.generator)
        index[0], index[1] = -1, adapters - 1
        alpha = draw.uniform(adapters) * 4 + 1
        A, B = draw.normal(adapters, r, inputs), draw.normal(adapters, outputs, r)
        made.append(
            (draw.normal(batch, length, inputs), A, B, alpha, index, draw.integer(1, length - 1))
        )
    return made  # fmt: skip


batch = Family(
    id="4.4-batch",
    title="A batch of adapters",
    points=4,
    minutes=25,
    statement="""
    Sequence $i$ of `x` is served with adapter `index[i]`. {minus} {scale} {side} Return the updates alone, without the base's output; elsewhere they
    are 0.
    """,
    answer='''
    def updates(x, A, B, alpha, index, start):
        """x [batch, T, in], A [n, r, in], B [n, out, r], alpha [n], index [batch], 0 < start < T → [batch, T, out]"""
        scale = $scale
        each = torch.stack([s * (x @ a.T) @ b.T for a, b, s in zip(A, B, scale)])
        found = torch.stack([each[i, row] if i >= 0 else $minus for row, i in enumerate(index.tolist())])
        place = torch.arange(x.shape[1])[None, :, None]
        return torch.where($side, found, 0)
    ''',
    conventions={
        "minus": {
            "none": ("An index of −1 means no adapter.", "torch.zeros_like(each[0, row])"),
            "mean": ("An index of −1 means the mean of all adapters' updates.", "each[:, row].mean(0)"),
            "sum": ("An index of −1 means the sum of all adapters' updates.", "each[:, row].sum(0)"),
        },
        "scale": {
            "r": ("An adapter's scale is its `alpha` divided by the rank.", "alpha / A.shape[1]"),
            "root": ("An adapter's scale is its `alpha` divided by the root of the rank.", "alpha / math.sqrt(A.shape[1])"),
            "alpha": ("An adapter's scale is its `alpha`.", "alpha"),
        },
        "side": {
            "from": ("Tokens at place `start` and later are updated (places count from 0).", "place >= start"),
            "after": ("Tokens after place `start` are updated (places count from 0).", "place > start"),
            "before": ("Tokens before place `start` are updated (places count from 0).", "place < start"),
        },
    },
    book={"minus": "none", "scale": "r", "side": "all"},
    cases=_batch_cases,
)  # fmt: skip

FAMILIES = [backward, batch]
