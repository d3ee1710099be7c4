"""Checks of the exercises in chapter 3.3, continual learning and merging."""

import math
import random

import torch

from lora_course.classroom.first_exercises import exercise, mistake


@exercise("3.3-a", points=1)
def check_metrics(learner):
    """`learner(R)` → `(ACC, BWT, FWT)` of `R` [T + 1, T], bits a byte, row 0 before any task."""
    R = torch.tensor(
        [[4.0, 5.0, 3.5], [2.0, 4.6, 3.8], [2.5, 3.0, 3.6], [2.9, 3.3, 2.1]], dtype=torch.float64
    )
    answer = learner(R.clone())
    mistake(
        not isinstance(answer, tuple | list) or len(answer) != 3,
        "Three numbers are expected: ACC, BWT, FWT.",
    )
    acc, bwt, fwt = (float(value) for value in answer)
    same = lambda a, b: math.isclose(a, b, abs_tol=1e-9)  # noqa: E731
    last, diagonal, ahead = R[3], R[1:].diagonal(), torch.stack([R[1, 1], R[2, 2]])
    mistake(
        same(acc, R[1:].mean()) or same(acc, R.mean()),
        "ACC is the mean of the last row, after all tasks; yours is over more rows.",
    )
    mistake(
        same(acc, R[2].mean()),
        "ACC comes from row T, the last one; yours is from row T − 1. Row 0 is before any task.",
    )
    mistake(
        not same(acc, last.mean()),
        "ACC should be {:.4f}, the mean of the last row; yours is {:.4f}.",
        last.mean(),
        acc,
    )
    right = -(last - diagonal)[:2].mean()
    mistake(
        same(bwt, -right),
        "BWT has the wrong sign: bits a byte have risen, which is forgetting, so BWT is negative.",
    )
    mistake(
        same(bwt, -(last - diagonal).sum() / 3),
        "BWT is divided by T, or counts the last task, which nothing could make the model forget: the mean is over T − 1 tasks.",
    )
    mistake(
        same(bwt, -(last - R[0])[:2].mean()),
        "BWT compares with row 0, before any task. Forgetting is counted from the diagonal, just after task j was learned.",
    )
    mistake(
        same(bwt, -(last - R.diagonal())[:2].mean()),
        "The diagonal is one row too high: task j was learned in row j + 1 of the tensor, as row 0 is before any task.",
    )
    mistake(not same(bwt, right), "BWT should be {:.4f}; yours is {:.4f}.", right, bwt)
    right = -(ahead - R[0, 1:]).mean()
    mistake(
        same(fwt, -right),
        "FWT has the wrong sign: a gain ahead of time, fewer bits a byte than before any task, is positive.",
    )
    mistake(
        same(fwt, -(diagonal - R[0])[1:].mean()),
        "FWT looks at row j, where task j has been trained on. The row before it is asked for: R[j − 1, j].",
    )
    mistake(
        same(fwt, -(ahead - R[0, 1:]).sum() / 3),
        "FWT is divided by T; the first task has no row before it, so the mean is over T − 1.",
    )
    mistake(not same(fwt, right), "FWT should be {:.4f}; yours is {:.4f}.", right, fwt)


@exercise("3.3-b", points=2, in_place=True)
def check_reservoir(learner):
    """`learner(memory, row, seen, capacity, draw)` offers a row to the list `memory`, in place; `draw(n)` is a whole number in [0, n)."""
    draw = random.Random(0).randrange
    offered, capacity, runs = 12, 4, 2500
    counts, rows = torch.zeros(offered), [torch.tensor([i, i]) for i in range(offered)]
    for _ in range(runs):
        memory: list[torch.Tensor] = []
        for seen in range(offered):
            learner(memory, rows[seen], seen, capacity, draw)
            mistake(not memory, "Nothing has happened: after a first row the memory is empty.")
            mistake(
                len(memory) > capacity,
                "The memory holds {} rows; its capacity is {}.",
                len(memory),
                capacity,
            )
            mistake(
                len(memory) < min(seen + 1, capacity),
                "After {} rows the memory holds {}: while there is room, every row is kept.",
                seen + 1,
                len(memory),
            )
        values = [int(row[0]) for row in memory]
        mistake(
            len(set(values)) < capacity,
            "A row is in the memory twice: a new one takes the place of an old one.",
        )
        for value in values:
            counts[value] += 1
    share, fair = counts / runs, capacity / offered
    mistake(
        share[capacity:].max() == 0,
        "Only the first {} rows are ever kept: a task that comes later is never remembered.",
        capacity,
    )
    mistake(
        share[-capacity:].min() == 1,
        "It keeps the last {} rows: a queue, so the first task is gone when the second is over.",
        capacity,
    )
    mistake(
        share[-1] == 1,
        "The newest row is always kept. It should stay with probability capacity / (rows offered so far).",
    )
    off = [
        i for i in range(offered) if abs(share[i] - fair) > 4 * math.sqrt(fair * (1 - fair) / runs)
    ]
    mistake(
        len(off) > 0
        and bool((share[:capacity] < fair).all())
        and share[capacity] < 0.4
        and share[-1] > fair,
        "Nearly: row number {} is always let in when it comes. It is the {}th of the rows offered, itself included: draw from seen + 1 places.",
        capacity,
        capacity + 1,
    )
    mistake(
        len(off) > 0,
        "Of 12 rows each should end in the memory with probability 1/3; the rows kept {:.2f}, …, {:.2f} of the time.",
        share[0],
        share[-1],
    )
    memory, row = [], torch.tensor([7, 7])
    learner(memory, row, 0, capacity, draw)
    row.zero_()
    mistake(
        int(memory[0][0]) == 0,
        "The memory holds the caller's tensor, not a copy: when the buffer is used again, what was remembered changes.",
    )


@exercise("3.3-c", points=2)
def check_merge(learner):
    """`learner(adapters, weights)` → `(A, B, lora_alpha)` whose update, at scale `lora_alpha / r`, is the weighted sum of the updates."""
    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    adapters, weights = (
        [(random(2, 9), random(6, 2), 8.0), (random(3, 9), random(6, 3), 3.0)],
        [0.5, 2.0],
    )
    given = [(A.clone(), B.clone(), alpha) for A, B, alpha in adapters]
    answer = learner(given, list(weights))
    mistake(
        any(
            not torch.equal(a, b)
            for one, other in zip(given, adapters, strict=True)
            for a, b in zip(one[:2], other[:2], strict=True)
        ),
        "Your function changed the adapters it was given: make new tensors.",
    )
    mistake(
        not isinstance(answer, tuple | list) or len(answer) != 3,
        "Three things are expected: A, B, lora_alpha.",
    )
    A, B, alpha = answer
    mistake(
        not torch.is_tensor(A) or not torch.is_tensor(B) or A.ndim != 2 or B.ndim != 2,
        "A is a tensor [r, in] and B a tensor [out, r].",
    )
    mistake(
        A.shape[1] != 9 or B.shape[0] != 6 or A.shape[0] != B.shape[1],
        "A is {} and B is {}; [r, 9] and [6, r] are expected.",
        list(A.shape),
        list(B.shape),
    )
    made = float(alpha) / A.shape[0] * B @ A

    def close(terms, scale=1.0):
        return torch.allclose(made, scale * sum(terms), atol=1e-4)

    parts = [B @ A for A, B, _ in adapters]
    scales = [alpha / A.shape[0] for A, _, alpha in adapters]
    right = [w * s * part for w, s, part in zip(weights, scales, parts, strict=True)]
    mistake(
        close([s * part for s, part in zip(scales, parts, strict=True)]),
        "The weights are in neither A nor B.",
    )
    mistake(
        close([w * w * s * part for w, s, part in zip(weights, scales, parts, strict=True)]),
        "The weights are in A and in B, so each counts twice: put it into one of them.",
    )
    mistake(
        close([w * part for w, part in zip(weights, parts, strict=True)]),
        "The adapters' own scales lora_alpha / r are missing: they are 4 and 1 here.",
    )
    ranks = A.shape[0]
    mistake(
        close(right, 1 / ranks),
        "The update is right up to 1/r: the result's scale is lora_alpha / r too, so lora_alpha must be r for a scale of 1.",
    )
    mistake(
        close(
            [
                w * alpha * part
                for w, (_, _, alpha), part in zip(weights, adapters, parts, strict=True)
            ]
        ),
        "You multiply by lora_alpha; the scale is lora_alpha / r, with each adapter's own r.",
    )
    mistake(
        close([w * s * s * part for w, s, part in zip(weights, scales, parts, strict=True)]),
        "The scales are in A and in B, so each counts twice.",
    )
    error = ((made - sum(right)).norm() / sum(right).norm()).item()
    mistake(
        error > 1e-4,
        "The update is off by {:.2g} of its norm. Stack the A's, put the B's side by side, and see to it that no B meets another's A.",
        error,
    )


@exercise("3.3-d", points=1)
def check_overlap(learner):
    """`learner(past, A)` → Σ |Aᵢ A_tᵀ| over past factors and entries; a scalar tensor that `A` gets a gradient from."""
    generator = torch.Generator().manual_seed(2)
    past = [torch.randn(r, 8, generator=generator) for r in (4, 2)]
    A = torch.randn(4, 8, generator=generator, requires_grad=True)
    answer = learner(past, A)
    mistake(
        not torch.is_tensor(answer) or answer.ndim != 0,
        "A tensor without dimensions is expected: a sum over everything.",
    )
    found, products = answer.detach(), [P @ A.detach().T for P in past]
    same = lambda value: torch.isclose(found, torch.as_tensor(value), rtol=1e-4)  # noqa: E731
    mistake(
        same(sum(p.sum() for p in products)) or same(sum(p.sum().abs() for p in products)),
        "Products of different sign cancel: take the absolute value of each entry before the sum.",
    )
    mistake(
        same(sum(p.square().sum() for p in products)),
        "This squares the entries, as the paper writes; the absolute value is asked for, as in its code.",
    )
    mistake(
        same(sum(p.abs().mean() for p in products)) or same(torch.cat(products).abs().mean()),
        "This is a mean over entries; their sum is asked for.",
    )
    mistake(
        same(products[0].abs().sum()) or same(products[1].abs().sum()),
        "Only one of the past adapters is in it: the sum runs over all of them.",
    )
    mistake(
        same((past[0] * A.detach()).abs().sum()) or same((past[0] * A.detach()).sum().abs()),
        "An entrywise product compares row k with row k only: every row of A meets every past row, Aᵢ A_tᵀ.",
    )
    unit = torch.nn.functional.normalize
    mistake(
        same(sum((unit(P) @ unit(A.detach()).T).abs().sum() for P in past)),
        "The rows are normalised, so this is a sum of cosines; the products themselves are asked for.",
    )
    right = sum(p.abs().sum() for p in products)
    mistake(not same(right), "It should be {:.4f} here, not {:.4f}.", right.item(), found.item())
    mistake(
        not answer.requires_grad,
        "The number is right, but no gradient reaches A: leave out detach, item and torch.no_grad.",
    )
    answer.backward()
    mistake(A.grad is None or not A.grad.any(), "The gradient with respect to A is zero.")
    nothing = learner([], A)
    mistake(
        float(nothing) != 0,
        "Before the second task there is no past adapter: the penalty is 0, not {}.",
        float(nothing),
    )
