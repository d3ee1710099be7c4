"""Exercise 3.3-c: the mixture that is nearest to an update."""

import torch

from lora_course.classroom.exercises import Draw, case, exercise


def _product(first, second):
    (A, B, s), (C, D, t) = first, second
    return s * t * ((B.T.double() @ D.double()) * (A.double() @ C.double().T)).sum()


def best_weights(adapters, target, *, product=_product, answer=torch.linalg.solve):
    """argmin over w of ‖Σ wᵢ ΔWᵢ − ΔW‖; parts are exchangeable for mistakes."""
    gram = torch.stack(
        [torch.stack([product(one, other) for other in adapters]) for one in adapters]
    )
    return answer(gram, torch.stack([product(one, target) for one in adapters]))


def _weights(**other):
    return lambda adapters, target: best_weights(adapters, target, **other)


def _plain(product):
    """A product that knows no scalings."""
    return lambda first, second: product((*first[:2], 1.0), (*second[:2], 1.0))


def _part_by_part(first, second):
    (A, B, s), (C, D, t) = first, second
    return s * t * ((B.T @ D) * (A @ C.T)).diagonal().sum().double()


def _sums(first, second):
    (A, B, s), (C, D, t) = first, second
    return s * t * (B.T @ D).sum().double() * (A @ C.T).sum()


WEIGHT_MISTAKES = {
    "Each weight is the best one for its adapter alone. Adapters overlap, so what one has is counted twice: solve for all together.":
        _weights(answer=lambda gram, against: against / gram.diagonal()),
    "These are the products with the target: that is the right side of the equations, which are still to be solved.":
        _weights(answer=lambda gram, against: against),
    "These are cosines with the target.": lambda adapters, target: best_weights(
        adapters, target, answer=lambda gram, against: against / (gram.diagonal() * _product(target, target)).sqrt()),
    "The weights are divided by their sum; nothing asks them to sum to one.":
        _weights(answer=lambda gram, against: torch.linalg.solve(gram, against) / torch.linalg.solve(gram, against).sum()),
    "Negative weights are cut off; they may be negative.":
        _weights(answer=lambda gram, against: torch.linalg.solve(gram, against).clamp(min=0)),
    "The scalings are missing: an update is scaling · B A.": _weights(product=_plain(_product)),
    "The scaling of the target is missing.": lambda adapters, target: best_weights(adapters, (*target[:2], 1.0)),
    "The scalings' signs are missing: a negative one turns the update round.":
        lambda adapters, target: best_weights([(A, B, abs(s)) for A, B, s in adapters], (*target[:2], abs(target[2]))),
    "Part i of one update is compared with part i of the other only: every part meets every other one.": lambda adapters, target: (
        best_weights(adapters, target, product=lambda a, b: _part_by_part(*_cut(a, b)))),
    "The sums are multiplied: multiply the two matrices entry by entry, then sum.": _weights(product=_sums),
    "These are equal weights.": lambda adapters, target: torch.full((len(adapters),), 1 / len(adapters)),
    "The weights are turned round: the mixture leads away from the target.":
        lambda adapters, target: -best_weights(adapters, target),
}  # fmt: skip


def _cut(first, second):
    """Both at the smaller rank."""
    r = min(len(first[0]), len(second[0]))
    return ((first[0][:r], first[1][:, :r], first[2]), (second[0][:r], second[1][:, :r], second[2]))


@exercise(
    "3.3-c",
    points=2,
    right=best_weights,
    mistakes=WEIGHT_MISTAKES,
    tolerance=1e-3,
    otherwise="Other weights bring the mixture of the updates scaling · B A nearer to the target.",
)
def check_best_weights(draw: Draw):
    """The weights of several adapters of one layer that come nearest to the update of another one."""
    for kind, number, hint in [
        ("", 2, ""),
        ("", 4, "With four adapters it goes wrong."),
        ("mixture", 3, "Where the target is exactly a mixture, written in other factors, it goes wrong."),
        ("zero", 2, "Where the target is zero it goes wrong: so are the weights."),
        ("", 1, "With a single adapter it goes wrong."),
        ("small", 2, "Where updates are small it goes wrong: add nothing to the equations, not even a little."),
    ]:  # fmt: skip
        inputs, outputs = draw.sizes(2, 160, 220)
        ranks = draw.sizes(number + 1, 2, 6 + number)
        *adapters, target = [
            (draw.normal(r, inputs), draw.normal(outputs, r), draw.number(0.4, 2)) for r in ranks
        ]
        # related ones, since random updates are all but orthogonal; signs differ
        A, B, s = target
        for i, (C, D, t) in enumerate(adapters):
            more = draw.number(0.6, 1.5) * (-1) ** i
            adapters[i] = (torch.cat([C, A]), torch.cat([D, more * B], 1), t * (-1) ** (i // 2))
        if kind == "mixture":
            A = torch.cat([C for C, _, _ in adapters])
            parts = [w * t * D for (_, D, t), w in zip(adapters, (1.5, -0.7, 0.4), strict=True)]
            M = draw.normal(len(A), len(A)) + 6 * torch.eye(len(A))
            target = (M @ A, torch.cat(parts, 1) @ torch.linalg.inv(M) / -s, -s)
        elif kind == "zero":
            target = (A, 0 * B, s)
        elif kind == "small":
            *adapters, target = [(A / 50, B / 1000, s) for A, B, s in (*adapters, target)]
        yield case(adapters, target, hint=hint, largest=inputs * outputs - 1)
