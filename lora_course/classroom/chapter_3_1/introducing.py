"""Exercise 3.1-d: a new tensor in an optimiser."""

import copy

import torch

from lora_course.classroom.exercises import Draw, case, exercise, mistake


def introduce(optimizer, old, new):
    for group in optimizer.param_groups:
        if any(p is old for p in group["params"]):
            group["params"].append(new)


def _settings(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def _use_introduced(_, optimizer, old, new, note):
    """The tensors after two steps, once the optimiser holds what it should."""
    was, home = note["optimizer"], note["home"]
    groups = [group["params"] for group in optimizer.param_groups]
    before = [group["params"] for group in was.param_groups]
    holds = [sum(p is new for p in group) for group in groups]
    mistake(
        len(groups) > len(before),
        "The new tensor is in a group of its own: a scheduler keeps one learning rate for each group that it knows, and stops with "
        "an error. Put it into the group of `old`.",
    )
    mistake(len(groups) < len(before), "A parameter group is gone.")
    mistake(not any(holds), "No parameter group holds the new tensor.")
    mistake(
        sum(map(bool, holds)) > 1,
        "The new tensor is in several groups: it would be trained several times a step.",
    )
    held = any(p is old for group in groups for p in group)
    mistake(not held, "`old` is not trained any more: the new tensor comes in addition.")
    mistake(
        _settings(optimizer) != _settings(was) or optimizer.defaults != was.defaults,
        "The groups' settings, or their order, have changed: learning rates, betas and weight decay stay as they were.",
    )
    mistake(
        not holds[home],
        "The new tensor is in another group than `old`. Tensors are told apart by `is`: two of them may hold equal values, or one "
        "shape each.",
    )
    mistake(holds[home] > 1, "The new tensor is in its group {} times.", max(holds))
    same = [
        len(group) - (i == home) == len(known)
        and all(torch.equal(p, q) for p, q in zip(group, known, strict=False))
        for i, (group, known) in enumerate(zip(groups, before, strict=True))
    ]
    mistake(
        not all(same) or groups[home][-1] is not new,
        "The old tensors' places or values have changed. The new one comes last in its group: a saved state is read by place.",
    )
    mistake(
        not torch.equal(new, note["new"]), "The new tensor's values have changed: the optimiser is only told of it."
    )  # fmt: skip
    pairs = [(p, q) for one, other in zip(groups, before, strict=True) for p, q in zip(one, other, strict=False)]  # fmt: skip
    mistake(
        not new.requires_grad
        or new.grad is not None
        or any(
            p.requires_grad != q.requires_grad or p.grad is None or not torch.equal(p.grad, q.grad)
            for p, q in pairs
        ),
        "Gradients, or whether a tensor is trained, have changed.",
    )
    kept = all(
        p in optimizer.state
        and all(torch.equal(optimizer.state[p][k], v) for k, v in was.state[q].items())
        for p, q in pairs
    )
    mistake(
        not kept,
        "The state of an old tensor has changed: its moments and its step count stay as they were.",
    )
    state = optimizer.state.get(new, {})
    mistake(
        any(bool(torch.as_tensor(value).any()) for value in state.values()),
        "The new tensor begins with moments or steps of another one: its first steps would go where that one went, or be of a "
        "wrong size. Let it begin without state.",
    )
    for number in (1, 2):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, float(number))
        optimizer.step()
    return [p.detach() for group in groups for p in group]


@exercise(
    "3.1-d",
    right=introduce,
    look=_use_introduced,
    changes=("optimizer", "old", "new"),
    otherwise="After two steps a tensor is somewhere else than it should be.",
)
def check_introduce(draw: Draw):
    """No `nn.Parameter`: a copy of one has no gradient. A new tensor for an optimiser that trains already, in the group of an old one."""
    for sizes, home, place in [((2, 3), 1, 1), ((2, 2, 1), 1, 0), ((3,), 0, 2), ((3, 2), 0, 1)]:
        shape = draw.sizes(2, 2, 5)
        # the first tensor of each group is zero, as every B is at its start
        groups = [
            [(draw.normal(*shape) * (i > 0)).requires_grad_() for i in range(size)]
            for size in sizes
        ]
        # rates rise from group to group in one case, and fall in another
        rates = sorted((draw.number(0.01, 0.1) for _ in groups), reverse=home == place)
        optimizer = torch.optim.AdamW(
            [{"params": g, "lr": lr} for g, lr in zip(groups, rates, strict=True)],
            weight_decay=0.02,
        )
        for _ in range(3):
            for p in sum(groups, []):
                p.grad = draw.normal(*shape)
            optimizer.step()
        for group in optimizer.param_groups:  # what a scheduler leaves behind
            group["initial_lr"], group["lr"] = group["lr"], group["lr"] / 3
            group["params"][0].data.zero_()
        new = (draw.normal(*shape) * draw.choice([0, 1])).requires_grad_()
        note = {"optimizer": copy.deepcopy(optimizer), "home": home, "new": new.detach().clone()}
        yield case(optimizer, groups[home][place], new, note=note)
