"""Checks of the exercises in chapter 3.1, ranks that grow."""

import math

import torch
from torch import nn

from lora_course.classroom.first_exercises import exercise, mistake


@exercise("3.1-a", points=1)
def check_growth(learner):
    """`learner(A, B, lora_alpha, k)` → `A` [r + k, in], `B` [out, r + k], `lora_alpha` of a grown layer with the same function."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 11, generator=generator), torch.randn(5, 3, generator=generator)
    copies = A.clone(), B.clone()
    answer = learner(A, B, 6.0, 2)
    mistake(
        not torch.equal(A, copies[0]) or not torch.equal(B, copies[1]),
        "Your function changed A or B: make new tensors.",
    )
    mistake(
        not isinstance(answer, tuple | list) or len(answer) != 3,
        "Three things are expected: A, B, lora_alpha.",
    )
    new_A, new_B, alpha = answer
    mistake(not torch.is_tensor(new_A) or not torch.is_tensor(new_B), "A and B are tensors.")
    new_A, new_B, alpha = new_A.detach(), new_B.detach(), float(alpha)
    mistake(
        new_A.shape != (5, 11) or new_B.shape != (5, 5),
        "A is {} and B {}; [5, 11] and [5, 5] are expected: rows are added to A, columns to B.",
        list(new_A.shape),
        list(new_B.shape),
    )
    close = lambda a, b: torch.allclose(a, b, atol=1e-5)  # noqa: E731
    delta, made = 2.0 * B @ A, alpha / 5 * new_B @ new_A
    mistake(
        close(new_B @ new_A, torch.zeros(5, 11)) or not close(new_A[:3], A),
        "What was learnt is gone: the first three rows of A and columns of B stay as they are.",
    )
    mistake(
        not new_A[3:].any() and not new_B[:, 3:].any(),
        "The new rows of A and columns of B are both zero: each one's gradient has the other as a factor, so they stay zero for good.",
    )
    mistake(
        alpha == 6.0 and close(new_B @ new_A, B @ A),
        "lora_alpha is still 6, so the scale falls from 6/3 to 6/5 and shrinks what was learnt: raise it with the rank.",
    )
    mistake(
        close(new_B @ new_A, B @ A) and alpha == 2.0,
        "You return the scale; lora_alpha is the scale times the new rank.",
    )
    mistake(
        bool(new_A[3:].any()) and bool(new_B[:, 3:].any()) and not close(made, delta),
        "New rows of A and new columns of B are both random: their product changes the function. B's are zero.",
    )
    mistake(
        not close(made, delta),
        "The function has changed; relative error of ΔW {:.2g}.",
        ((made - delta).norm() / delta.norm()).item(),
    )
    mistake(
        not new_A[3:].any(),
        "A's new rows are zero and B's columns are not. It keeps the function too, but this course, like LoRA, starts with B = 0.",
    )
    mistake(
        close(new_A[3], new_A[4]),
        "The new rows of A are equal: they would get equal gradients and stay one direction.",
    )


@exercise("3.1-b", points=1)
def check_sensitivity(learner):
    """`learner(A, B, grad_A, grad_B)` → the layer's sensitivity, a number."""
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, 9, generator=generator), torch.randn(16, 4, generator=generator)
    G, s = torch.randn(16, 9, generator=generator), 2.0
    grad_A, grad_B = s * B.T @ G, s * G @ A.T
    parts = (B * grad_B).sum(0)
    right = (parts.abs().sum() / 12).item()
    found = float(learner(A, B, grad_A, grad_B))
    same = lambda value: math.isclose(found, float(value), rel_tol=1e-4)  # noqa: E731
    mistake(
        same(parts.abs().sum()),
        "It is not divided by √(in · out) = 12: large layers would win by their size.",
    )
    mistake(
        same(parts.abs().sum() / 144), "You divide by in · out; the square root of it is asked for."
    )
    mistake(
        same(grad_B.norm()) or same(grad_A.norm()) or same(grad_A.norm() + grad_B.norm()),
        "This is the norm of a gradient. The factor itself is not in it, so a layer without an update could come first.",
    )
    mistake(
        same(parts.sum().abs() / 12),
        "The absolute value is taken of the sum over parts, so that parts of different sign cancel: take it of each part.",
    )
    mistake(
        same((B * grad_B).abs().sum() / 12),
        "The absolute value is taken of each entry of B ∘ ∂L/∂B: sum each column first, which is ⟨ΔWᵢ, G⟩.",
    )
    mistake(
        same(2 * right),
        "A and B are both counted: bᵢ · ∂L/∂bᵢ and aᵢ · ∂L/∂aᵢ are the same number, so it is twice the sensitivity.",
    )
    mistake(
        same(right / 4),
        "This is the mean over the parts; their sum is asked for, which is the whole layer's.",
    )
    mistake(not same(right), "It should be {:.4f} here, not {:.4f}.", right, found)


@exercise("3.1-c", points=2)
def check_plan(learner):
    """`learner(scores, ranks, budget, top, add, max_r)` → `{layer: ranks gained}`."""
    scores = {"q": 0.1, "k": 0.9, "v": 0.5, "o": 0.7, "up": 0.3}
    ranks = {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2}

    def plan(ranks, budget, top, add, max_r):
        given = dict(scores), dict(ranks)
        found = learner(*given, budget, top, add, max_r)
        mistake(
            given != (scores, ranks),
            "Your function changed the dictionaries it was given: work on copies.",
        )
        mistake(
            not isinstance(found, dict) or set(found) - set(scores),
            "A dictionary by layer is expected; yours is {!r}.",
            found,
        )
        return {name: gain for name, gain in found.items() if gain}

    found = plan(ranks, 100, 2, 3, 16)
    mistake(
        found == {"q": 3, "up": 3},
        "The layers of lowest score grow: give rank to those of highest.",
    )
    mistake(found == {"k": 5, "o": 5}, "You return the new ranks; what is gained is asked for.")
    mistake(
        found != {"k": 3, "o": 3},
        "Of five layers k and o have the highest scores and should gain 3 each; yours is {}.",
        found,
    )
    found = plan(ranks, 14, 2, 3, 16)
    mistake(
        sum(found.values()) > 4,
        "The budget of 14 is overshot: 10 ranks are there and you give {} more. The last round hands out what is left.",
        sum(found.values()),
    )
    mistake(
        found != {"k": 3, "o": 1},
        "With 4 ranks left k gains 3 and o the last one; yours is {}. The total must meet the budget exactly.",
        found,
    )
    full = ranks | {"k": 4}
    found = plan(full, 100, 2, 3, 5)
    mistake(
        full["k"] + found.get("k", 0) > 5,
        "k has rank 4, max_r is 5, and you give it {}.",
        found.get("k"),
    )
    mistake(
        sum(found.values()) < 6,
        "Only {} ranks are given where top · add = 6 are due: what k has no room for goes to the next in order.",
        sum(found.values()),
    )
    mistake(
        found != {"k": 1, "o": 3, "v": 2},
        "With k at 4 of 5 the gains should be k 1, o 3, v 2; yours is {}.",
        found,
    )
    mistake(
        bool(plan(ranks, 10, 2, 3, 16)), "The budget is spent already, and something still grows."
    )


@exercise("3.1-d", points=1, in_place=True)
def check_introduce(learner):
    """`learner(optimizer, old, new)` makes the optimiser train `new` in `old`'s parameter group, in place."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3)) for _ in range(4)]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.01}],
        weight_decay=0,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    new = nn.Parameter(torch.zeros(3))

    def step() -> None:
        optimizer.zero_grad()
        sum(p.square().sum() for p in [*parameters, new - 1]).backward()
        optimizer.step()

    step()
    before = {
        p: (p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()})
        for p in parameters
    }
    learner(optimizer, parameters[2], new)
    places = [
        [
            i
            for i, group in enumerate(optimizer.param_groups)
            if any(p is q for q in group["params"])
        ]
        for p in (*parameters, new)
    ]
    mistake(
        not places[4] and len(optimizer.param_groups) == 2,
        "Nothing has happened: no parameter group holds the new tensor.",
    )
    mistake(
        len(optimizer.param_groups) > 2,
        "The new tensor is in a group of its own: the scheduler keeps a list of two learning rates and stops with an error. Put it into the group of `old`.",
    )
    mistake(
        len(places[4]) > 1, "The new tensor is in both groups: it would be trained twice a step."
    )
    mistake(
        places[4] == [0],
        "The new tensor is in the first group; `old` is in the second, whose learning rate it should have.",
    )
    mistake(
        places[:4] != [[0], [0], [1], [1]],
        "Old tensors have left their groups, or are in two: only add the new one.",
    )
    kept = all(
        p in optimizer.state
        and all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
        for p, (_, state) in before.items()
    )
    mistake(
        not kept,
        "The state of the old tensors has changed: their moments and step counts stay as they were.",
    )
    mistake(
        any(not torch.equal(p, value) for p, (value, _) in before.items()) or bool(new.any()),
        "A tensor's values have changed: the optimiser is told of a tensor, nothing else.",
    )
    mistake(
        new in optimizer.state and float(optimizer.state[new].get("step", 0)) != 0,
        "The new tensor has the step count of an old one: Adam would not correct its young averages, and its first steps be far too large. Let it start without state.",
    )
    count = sum(p is new for p in optimizer.param_groups[1]["params"])
    mistake(count != 1, "The new tensor is in the group {} times.", count)
    step()
    scheduler.step()
    mistake(not new.any(), "After a step the new tensor has not moved.")
