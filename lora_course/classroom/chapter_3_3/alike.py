"""Exercise 3.3-c: how alike updates are."""

import torch

from lora_course.classroom.exercises import Draw, case, exercise


def cosines(adapters, *, product=None, root=torch.sqrt, scale=lambda s: s):
    """⟨ΔWᵢ, ΔWⱼ⟩ / (‖ΔWᵢ‖ ‖ΔWⱼ‖), 0 where an update is zero; parts are exchangeable for mistakes."""
    product = _product if product is None else product
    gram = torch.stack(
        [
            torch.stack([scale(s) * scale(t) * product(A, B, C, D) for C, D, t in adapters])
            for A, B, s in adapters
        ]
    )
    norms = root(gram.diagonal())
    return torch.where(gram == 0, 0.0, gram / (norms[:, None] * norms))


def _product(A, B, C, D):
    return ((B.T.double() @ D.double()) * (A.double() @ C.double().T)).sum()


def _rank(A, C):
    return min(len(A), len(C))


COSINE_MISTAKES = {
    "The scalings' signs are not in it: a negative one turns the update round.": lambda adapters: cosines(adapters, scale=abs),
    "These are products of the updates; divide by both norms.": lambda adapters: cosines(adapters, root=torch.ones_like),
    "You divide by the squared norms: take their roots.": lambda adapters: cosines(adapters, root=lambda x: x),
    "This compares the A's alone; two pairs of other factors may have one product.":
        lambda adapters: cosines(adapters, product=lambda A, B, C, D: (A[:_rank(A, C)] * C[:_rank(A, C)]).sum().double()),
    "This compares the B's alone; two pairs of other factors may have one product.":
        lambda adapters: cosines(adapters, product=lambda A, B, C, D: (B[:, :_rank(A, C)] * D[:, :_rank(A, C)]).sum().double()),
    "Part i of one update is compared with part i of the other only: every part meets every other one.":
        lambda adapters: cosines(adapters, product=lambda A, B, C, D: (
            (B.T @ D) * (A @ C.T)).diagonal().sum().double()),
    "The sums are multiplied: multiply the two r × r matrices entry by entry, then sum.":
        lambda adapters: cosines(adapters, product=lambda A, B, C, D: (B.T @ D).sum().double() * (A @ C.T).sum()),
    "These are magnitudes: updates that point apart have a negative cosine.": lambda adapters: cosines(adapters).abs(),
    "These are squares.": lambda adapters: cosines(adapters).square(),
    "Each is 1 less the cosine: that is a distance.": lambda adapters: 1 - cosines(adapters),
}  # fmt: skip


@exercise(
    "3.3-c",
    points=2,
    right=cosines,
    mistakes=COSINE_MISTAKES,
    otherwise="These are not the cosines of the updates scaling · B A, each read as one long vector.",
)
def check_cosines(draw: Draw):
    """The cosines between the updates of several adapters of one layer."""
    for kind, number, hint in [
        ("", 2, ""),
        ("", 4, "With four adapters it goes wrong."),
        ("refactored", 3, "Where two adapters have other factors and the same product it goes wrong."),
        ("small", 3, "Where an update is small it goes wrong: a cosine does not depend on the size."),
        ("zero", 3, "Where B is zero it goes wrong: the update's cosines, its own included, are 0."),
        ("", 1, "With a single adapter it goes wrong: [1, 1]."),
    ]:  # fmt: skip
        inputs, outputs = draw.sizes(2, 60, 90)
        ranks = draw.sizes(number, 1, 6)
        adapters = [
            (draw.normal(r, inputs), draw.normal(outputs, r), draw.number(0.3, 4)) for r in ranks
        ]
        # related ones, since random updates are all but orthogonal
        A, B, s = adapters[0]
        for i in range(1, number):
            C, D, t = adapters[i]
            more = draw.number(0.5, 1.5)
            adapters[i] = (torch.cat([C, A]), torch.cat([D, more * B], 1), t * (-1) ** i)
        if kind == "refactored":
            M = draw.normal(len(A), len(A)) + 3 * torch.eye(len(A))
            adapters[1] = (M @ A, -2 * B @ torch.linalg.inv(M), s)
        elif kind == "small":
            C, D, t = adapters[1]
            adapters[1] = (1e-3 * C, 1e-3 * D, t)
        elif kind == "zero":
            C, D, t = adapters[1]
            adapters[1] = (C, 0 * D, t)
        yield case(adapters, hint=hint, largest=inputs * outputs - 1)
