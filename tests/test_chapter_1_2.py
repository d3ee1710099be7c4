"""The exercises of chapter 1.2: plausible wrong answers are rejected, each with its own message; right ones pass."""

import math

import torch

from lora_course.classroom.chapter_1_2 import check_allocation, check_budget, check_fold
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def cubic(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3, end=None):
    end = total_step - tfinal if end is None else end
    left = 1 - (min(max(t, tinit), end) - tinit) / (end - tinit)
    return int((init_r - target_r) * layers * left**power + target_r * layers)


def no_warm_up(t, layers, init_r, target_r, tinit, tfinal, total_step):
    left = 1 - min(t, total_step - tfinal) / (total_step - tfinal)
    return int((init_r - target_r) * layers * left**3 + target_r * layers)


def overshoots(t, layers, init_r, target_r, tinit, tfinal, total_step):
    left = 1 - (max(t, tinit) - tinit) / (total_step - tfinal - tinit)
    return int((init_r - target_r) * layers * left**3 + target_r * layers)


def by_phases(t, layers, init_r, target_r, tinit, tfinal, total_step):
    if t <= tinit:
        return init_r * layers
    if t > total_step - tfinal:
        return target_r * layers
    return int(
        target_r * layers
        + (init_r - target_r) * layers * (1 - (t - tinit) / (total_step - tfinal - tinit)) ** 3
    )


def scores(sensitivity, uncertainty, reduce=torch.mean):
    found = {}
    for name in sensitivity:
        s = {
            key: sensitivity[name][key] * (uncertainty[name][key] if uncertainty else 1)
            for key in "AEB"
        }
        found[name] = s["E"].flatten() + reduce(s["A"], 1) + reduce(s["B"], 0)
    return found


def allocate(score, budget, largest=True):
    together = torch.cat(list(score.values()))
    mask = torch.zeros(len(together), dtype=torch.bool)
    mask[together.argsort(descending=largest, stable=True)[:budget]] = True
    return dict(zip(score, mask.split([len(s) for s in score.values()])))


def threshold(sensitivity, uncertainty, budget):
    score = scores(sensitivity, uncertainty)
    limit = torch.cat(list(score.values())).sort(descending=True).values[budget]
    return {name: s > limit for name, s in score.items()}


def one_short(sensitivity, uncertainty, budget):
    return allocate(scores(sensitivity, uncertainty), budget - 1)


def one_by_one(sensitivity, uncertainty, budget):
    """Another way: a sorted list of Python tuples."""
    score = scores(sensitivity, uncertainty)
    order = sorted(
        (-s[i].item(), place, i, name)
        for place, (name, s) in enumerate(score.items())
        for i in range(len(s))
    )
    masks = {name: torch.zeros(len(s), dtype=torch.bool) for name, s in score.items()}
    for _, _, i, name in order[:budget]:
        masks[name][i] = True
    return masks


def kept(layer):
    return (layer.E * layer.A)[layer.mask], layer.B[:, layer.mask]


def in_place(layer):
    answer = (*[t.clone() for t in kept(layer)], layer.scaling * int(layer.mask.sum()))
    layer.A.data.mul_(2)
    return answer


WRONG = {
    check_budget: [
        lambda t, layers, **rest: cubic(t, 1, **rest),
        lambda *a, **k: cubic(*a, **k, power=1),
        lambda t, **k: cubic(t, **k, end=k["total_step"]),
        lambda *a, **k: float(cubic(*a, **k)),
        no_warm_up,
        overshoots,
        lambda *a, **k: cubic(*a, **k, power=2),
    ],
    check_allocation: [
        lambda i, u, b: allocate(scores(i, u), b, largest=False),
        lambda i, u, b: {name: allocate({name: s}, b // len(i))[name] for name, s in scores(i, u).items()},
        lambda i, u, b: allocate(scores(i, None), b),
        lambda i, u, b: allocate(scores(i, u, torch.sum), b),
        threshold,
        one_short,
        lambda i, u, b: {name: mask.float() for name, mask in allocate(scores(i, u), b).items()},
    ],
    check_fold: [
        lambda layer: (layer.E * layer.A, layer.B, layer.lora_alpha),
        lambda layer: (layer.A[layer.mask], layer.B[:, layer.mask], 7.5),
        lambda layer: (*kept(layer), layer.lora_alpha),
        lambda layer: (*kept(layer), layer.scaling),
        lambda layer: (layer.scaling * kept(layer)[0], kept(layer)[1], layer.scaling * 3),
        lambda layer: tuple(t.T for t in kept(layer)) + (7.5,),
        in_place,
    ],
}  # fmt: skip
RIGHT = {
    check_budget: [cubic, by_phases],
    check_allocation: [lambda i, u, b: allocate(scores(i, u), b), one_by_one],
    check_fold: [
        lambda layer: (*kept(layer), layer.scaling * int(layer.mask.sum())),
        lambda layer: (
            layer.A[layer.mask],
            layer.B[:, layer.mask] * layer.E[layer.mask].T,
            layer.lora_alpha / layer.r * len(layer.mask.nonzero()),
        ),
        # half of it on each side, and a scale of one
        lambda layer: (
            math.sqrt(layer.scaling) * kept(layer)[0],
            math.sqrt(layer.scaling) * kept(layer)[1],
            3.0,
        ),
    ],
}
