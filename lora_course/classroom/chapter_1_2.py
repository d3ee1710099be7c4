"""Checks of the exercises in chapter 1.2, AdaLoRA."""

import torch
from torch import Tensor, nn

from lora_course.adalora import AdaLoRALinear
from lora_course.classroom.first_exercises import exercise, mistake


def _budgets(function, schedule: dict[str, int]) -> list[int]:
    return [function(t, **schedule) for t in range(1, schedule["total_step"] + 1)]


@exercise("1.2-a", points=1)
def check_budget(learner):
    """`learner(t, layers, init_r, target_r, tinit, tfinal, total_step)` → triplets kept after step t."""
    schedule = {
        "layers": 10,
        "init_r": 12,
        "target_r": 7,
        "tinit": 5,
        "tfinal": 8,
        "total_step": 40,
    }
    first, last = 5, 32

    def right(t, power=3, layers=10, end=last):
        left = 1 - (min(max(t, first), end) - first) / (end - first)
        return int(5 * layers * left**power + 7 * layers)

    found = _budgets(learner, schedule)
    mistake(
        found == [right(t, layers=1) for t in range(1, 41)],
        "This is the mean rank of a matrix, cut to a whole number; the budget is for all layers together.",
    )
    mistake(
        found == [right(t, power=1) for t in range(1, 41)],
        "Your budget falls in a straight line: the third power is missing, which cuts fast at first and slowly at the end.",
    )
    mistake(
        found == [right(t, end=40) for t in range(1, 41)],
        "Your budget is met at the last step: it should be met at total_step - tfinal, so that tfinal steps are left to train.",
    )
    mistake(
        any(not isinstance(value, int) for value in found),
        "A whole number of triplets is expected, cut with int(); you return {!r} at step 10.",
        found[9],
    )
    mistake(
        found[:5] != [120] * 5,
        "During the first tinit={} steps the budget is init_r · layers = 120; yours is {}.",
        first,
        found[:5],
    )
    mistake(
        found[31:] != [70] * 9,
        "From step total_step - tfinal = {} on the budget is target_r · layers = 70; yours is {}.",
        last,
        found[31:],
    )
    wrong = [t for t in range(1, 41) if found[t - 1] != right(t)]
    mistake(
        bool(wrong),
        "At step {} the budget is {}, not {}: cut to a whole number at the very end.",
        *((wrong[0], right(wrong[0]), found[wrong[0] - 1]) if wrong else (0, 0, 0)),
    )


@exercise("1.2-b", points=2)
def check_allocation(learner):
    """`learner(sensitivity, uncertainty, budget)` → `{layer: mask [r]}`."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"small": (8, 6), "wide": (200, 10), "tall": (12, 300)}

    def averages() -> dict[str, dict[str, Tensor]]:
        # magnitudes differ by layer, so that the choice is not the same number in each
        made = {}
        for scale, (name, (columns, out)) in zip((0.3, 1.0, 2.0), shapes.items(), strict=True):
            made[name] = {
                key: scale * torch.rand(shape, generator=generator)
                for key, shape in {"A": (5, columns), "E": (5, 1), "B": (out, 5)}.items()
            }
        return made

    sensitivity, uncertainty = averages(), averages()

    def scores(combine, reduce=Tensor.mean) -> dict[str, Tensor]:
        found = {}
        for name in shapes:
            s = {key: combine(sensitivity[name][key], uncertainty[name][key]) for key in "AEB"}
            found[name] = s["E"].flatten() + reduce(s["A"], 1) + reduce(s["B"], 0)
        return found

    def best(score: dict[str, Tensor], budget: int) -> Tensor:
        together = torch.cat(list(score.values()))
        return torch.zeros(len(together), dtype=torch.bool).index_fill(
            0, together.argsort(descending=True, stable=True)[:budget], True
        )

    def kept(budget: int, sensitivity=sensitivity, uncertainty=uncertainty) -> Tensor:
        masks = learner(sensitivity, uncertainty, budget)
        mistake(
            not isinstance(masks, dict) or set(masks) != set(sensitivity),
            "A dictionary with the layers {} is expected.",
            list(sensitivity),
        )
        shape_ok = all(
            isinstance(m, Tensor) and m.shape == (5,) and m.dtype == torch.bool
            for m in masks.values()
        )
        mistake(not shape_ok, "Each mask is a bool tensor of shape [5], one entry a triplet.")
        return torch.cat([masks[name] for name in sensitivity])

    product = scores(torch.mul)
    found = kept(6)
    per_layer = torch.cat([best({name: score}, 2) for name, score in product.items()])
    mistake(torch.equal(found, ~best(product, 9)), "You keep the triplets of lowest score.")
    mistake(
        torch.equal(found, per_layer),
        "Every layer keeps two: the budget is for all layers together, so that some keep more than others.",
    )
    mistake(
        torch.equal(found, best(scores(lambda i, u: i), 6)),
        "The uncertainty is not used: the score of a weight is sensitivity · uncertainty.",
    )
    mistake(
        torch.equal(found, best(scores(torch.mul, Tensor.sum), 6)),
        "Rows of A and columns of B are summed; their mean is asked for, or wide matrices win by their width.",
    )
    mistake(int(found.sum()) != 6, "{} triplets are kept and the budget is 6.", int(found.sum()))
    mistake(
        not torch.equal(found, best(product, 6)),
        "Six triplets are kept, but not those of highest score.",
    )
    equal = {
        name: {key: torch.ones_like(t) for key, t in tensors.items()}
        for name, tensors in sensitivity.items()
    }
    tied = kept(7, equal, equal)
    mistake(
        int(tied.sum()) != 7,
        "With equal scores {} triplets are kept and the budget is 7: comparing with a threshold keeps all of the equal ones or none.",
        int(tied.sum()),
    )
    mistake(not bool(tied[:7].all()), "Of equal scores the first win: sort with stable=True.")


@exercise("1.2-c", points=2)
def check_fold(learner):
    """`learner(layer)` → `A` [kept, in], `B` [out, kept], `lora_alpha` of the plain LoRA layer that computes the same."""
    torch.manual_seed(2)
    layer = AdaLoRALinear(nn.Linear(9, 11), r=6, lora_alpha=15)
    nn.init.normal_(layer.A), nn.init.normal_(layer.B), nn.init.normal_(layer.E)
    layer.mask.copy_(torch.tensor([True, False, True, True, False, False]))
    layer.E.data.masked_fill_(~layer.mask[:, None], 0.0)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    delta = layer.delta_weight().detach()
    answer = learner(layer)
    mistake(
        not isinstance(answer, tuple) or len(answer) != 3,
        "Three things are expected: A, B, lora_alpha.",
    )
    A, B, alpha = answer
    mistake(not all(torch.is_tensor(t) and t.ndim == 2 for t in (A, B)), "A and B are matrices.")
    A, B, alpha = A.detach(), B.detach(), float(alpha)
    mistake(A.shape == (6, 9), "A still has the masked rows: keep those where mask is True.")
    mistake(
        A.shape != (3, 9) or B.shape != (11, 3),
        "A is {} and B {}; [3, 9] and [11, 3] are expected.",
        list(A.shape),
        list(B.shape),
    )
    made = alpha / 3 * B @ A
    close = lambda a, b: bool((a - b).norm() < 1e-4 * b.norm())  # noqa: E731
    kept = layer.mask
    plain = (layer.B[:, kept] @ layer.A[kept]).detach()
    mistake(
        any(close(made, factor * plain) for factor in (2.5, 5.0)),
        "λ is missing: fold it into A or into B.",
    )
    mistake(
        close(made, 2 * delta),
        "The scale has doubled. With lora_alpha = 15 a plain layer of rank 3 would divide it by 3, this one divided by 6: keep the scale.",
    )
    mistake(
        close(made, 2.5 * delta) or close(made, delta / 2.5),
        "The scale is applied twice, or not at all: it stands in lora_alpha only.",
    )
    mistake(
        close(made, delta / 3),
        "You return the scale; lora_alpha is the scale times the rank that is left.",
    )
    mistake(
        not close(made, delta),
        "The plain layer computes something else; relative error of ΔW {:.2g}.",
        ((made - delta).norm() / delta.norm()).item(),
    )
    changed = [
        name for name, tensor in layer.tensors().items() if not torch.equal(tensor, before[name])
    ]
    mistake(
        bool(changed), "Your function changed the layer's {}: leave the layer as it was.", changed
    )
