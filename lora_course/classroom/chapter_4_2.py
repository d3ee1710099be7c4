"""Checks of the exercises in chapter 4.2, hierarchical LoRA."""

import torch
from torch import nn

from lora_course.classroom.exercises import Draw, case, exercise, mistake


def _weights(inside=lambda b, i: b >= i, scale=lambda b, root, r: 1 / (b**0.5 if root else b)):
    """Row i's weight: the scales of the cuts that hold it, added up."""

    def weights(ranks, lora_alpha, use_rslora=False):
        r = max(ranks)
        rows = range(1, r + 1)
        held = [[scale(b, use_rslora, r) for b in ranks if inside(b, i)] for i in rows]
        return lora_alpha * torch.tensor([float(sum(scales)) for scales in held])

    return weights


own_scales = _weights()


WEIGHT_MISTAKES = {
    "This is the mean of the cuts; the authors train their sum.":
        lambda ranks, lora_alpha, use_rslora=False: own_scales(ranks, lora_alpha, use_rslora) / len(ranks),
    "These are the shares of cuts that hold each row; here each cut has a scale, and they are added up.":
        lambda ranks, lora_alpha, use_rslora=False: _weights(scale=lambda b, root, r: 1 / len(ranks))(ranks, 1),
    "You count the cuts that hold each row: each adds its scale, not 1.":
        lambda ranks, lora_alpha, use_rslora=False: _weights(scale=lambda b, root, r: 1)(ranks, 1),
    "All cuts have one scale here, that of the whole; each has the scale of an adapter of its own rank.":
        _weights(scale=lambda b, root, r: 1 / (r**0.5 if root else r)),
    "`lora_alpha` is not used.": lambda ranks, lora_alpha, use_rslora=False: own_scales(ranks, 1, use_rslora),
    "`use_rslora` is not used: with it the scale is lora_alpha / √b.":
        lambda ranks, lora_alpha, use_rslora=False: own_scales(ranks, lora_alpha),
    "The scale is always lora_alpha / √b; without `use_rslora` it is lora_alpha / b.":
        lambda ranks, lora_alpha, use_rslora=False: own_scales(ranks, lora_alpha, True),
    "The order is reversed: the first row is in every cut, and has the largest weight.":
        lambda ranks, lora_alpha, use_rslora=False: own_scales(ranks, lora_alpha, use_rslora).flip(0),
    "A cut at b holds row b as well: compare with ≥. (Or count the rows from 1 on.)": _weights(inside=lambda b, i: b > i),
    "You add up the ranks up to i; a cut at b holds row i where b is at least i.": _weights(inside=lambda b, i: b <= i),
    "Each row has the scale of the smallest cut that holds it; it is in the larger ones as well.":
        lambda ranks, lora_alpha, use_rslora=False: torch.tensor(
            [lora_alpha / min(b for b in ranks if b >= i) ** (0.5 if use_rslora else 1) for i in range(1, max(ranks) + 1)]),
    "The scale belongs to the cut, lora_alpha / b, not to the row.":
        lambda ranks, lora_alpha, use_rslora=False: torch.tensor(
            [sum(lora_alpha / i ** (0.5 if use_rslora else 1) for b in ranks if b >= i) for i in range(1, max(ranks) + 1)]),
}  # fmt: skip


@exercise(
    "4.2-a",
    right=own_scales,
    mistakes=WEIGHT_MISTAKES,
    otherwise="These are not the sums of the scales of the cuts that hold each row.",
)
def check_own_scales(draw: Draw):
    """P of the sum of cuts, each at the scale of an adapter of its own."""
    whole = draw.integer(3, 6)
    yield case([1, 2, 4, 8], 8 * draw.integer(2, 5))
    yield case(sorted(draw.sizes(3, 2, 12)), draw.number(3, 30))
    yield case(
        sorted(draw.sizes(3, 2, 12)),
        draw.number(3, 30),
        use_rslora=True,
        hint="With `use_rslora` it goes wrong.",
    )
    yield case([whole], draw.number(3, 30), hint="With a single rank it goes wrong.")
    yield case(
        [whole + 5, 1, whole],
        draw.number(3, 30),
        hint="With ranks that do not rise it goes wrong: they may come in any order.",
    )
    yield case(list(range(1, whole + 1)), draw.number(3, 30), use_rslora=False)


def _norm(A, B):
    """‖B A‖² from the Gram matrices of the factors."""
    return ((B.T @ B) * (A @ A.T)).sum()


def _spectrum(A, B):
    """The singular values of B A, from those of a matrix [r, r]."""
    return torch.linalg.svdvals(torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T)


def cut_errors(A, B, b):
    s = _spectrum(A, B).square()
    return (_norm(A[b:], B[:, b:]) / _norm(A, B)).sqrt(), (s[b:].sum() / s.sum()).sqrt()


def _errors(sliced=None, best=None):
    """Both errors, with one of them computed as somebody might."""

    def errors(A, B, b):
        right = cut_errors(A, B, b)
        return sliced(A, B, b) if sliced else right[0], best(A, B, b) if best else right[1]

    return errors


def _apart(A, B, b):
    parts = A.square().sum(1) * B.square().sum(0)
    return (parts[b:].sum() / parts.sum()).sqrt()


def _share(values, b, power=2):
    values = values**power
    return (values[b:].sum() / values.sum()) ** (1 / power)


ERROR_MISTAKES = {
    "These are the squares of the errors: take the root.": lambda A, B, b: tuple(e.square() for e in cut_errors(A, B, b)),
    "This is what the cuts keep; what they lose is asked for.":
        lambda A, B, b: ((_norm(A[:b], B[:, :b]) / _norm(A, B)).sqrt(), (1 - cut_errors(A, B, b)[1].square()).sqrt()),
    "The errors are not divided by the norm of BA.": lambda A, B, b: tuple(e * _norm(A, B).sqrt() for e in cut_errors(A, B, b)),
    "The two errors are exchanged: that of the slice comes first.": lambda A, B, b: cut_errors(A, B, b)[::-1],
    "Norms of components are added up as if these were orthogonal; in a trained adapter they are not.": _errors(sliced=_apart),
    "The slice keeps the last rows here; the nested ones are the first.":
        _errors(sliced=lambda A, B, b: (_norm(A[:-b], B[:, :-b]) / _norm(A, B)).sqrt()),
    "The singular values are those of A; BA's are asked for.": _errors(best=lambda A, B, b: _share(torch.linalg.svdvals(A), b)),
    "The singular values are those of B; BA's are asked for.": _errors(best=lambda A, B, b: _share(torch.linalg.svdvals(B), b)),
    "The singular values of a product are not the products of those of its factors.":
        _errors(best=lambda A, B, b: _share(torch.linalg.svdvals(A) * torch.linalg.svdvals(B), b)),
    "Singular values are added up as they are; in the Frobenius norm it is their squares.":
        _errors(best=lambda A, B, b: _share(_spectrum(A, B), b, 1)),
    "This is the error in the spectral norm, σ of b + 1 over the largest.":
        _errors(best=lambda A, B, b: _spectrum(A, B)[b] / _spectrum(A, B)[0]),
    "The error of the SVD's cut counts one component too few: b are kept.":
        _errors(best=lambda A, B, b: _share(_spectrum(A, B), min(b + 1, len(A)))),
}  # fmt: skip


@exercise(
    "4.2-b",
    points=2,
    right=cut_errors,
    mistakes=ERROR_MISTAKES,
    otherwise="One of the two is not the relative error in the Frobenius norm.",
    tolerance=1e-3,
)
def check_cut_errors(draw: Draw):
    """What a slice and an SVD's cut lose, from thin matrices."""
    for kind in ("plain", "plain", "alike", "in order", "first"):
        inputs, outputs = draw.sizes(2, 40, 60)
        r = draw.integer(4, 6)
        A, B = draw.normal(r, inputs), draw.normal(outputs, r)
        b, hint = draw.integer(2, r - 1), ""
        if kind == "alike":
            A, B = draw.normal(r, r) @ A, B @ draw.normal(r, r)
            hint = "With components that point in similar directions it goes wrong."
        elif kind == "in order":
            A, B = torch.linalg.qr(A.T)[0].T, torch.linalg.qr(B)[0] * torch.arange(r, 0, -1)
            hint = (
                "Where the components are the SVD's own it goes wrong: both errors are equal there."
            )
        elif kind == "first":
            b, hint = 1, "With b = 1 it goes wrong."
        yield case(A, B, b, hint=hint, largest=inputs * outputs - 1)


def _bias(layer):
    return 0 if layer.bias is None else layer.bias.detach()


def merge_branches(
    base, branches, scaling, *, weight=None, bias=None, inner=True, outer=True, own=True
):
    """A new layer, with each of its parts exchangeable for a mistake."""
    made = nn.Linear(base.in_features, base.out_features)
    weight = scaling if weight is None else weight
    bias = scaling if bias is None else bias
    with torch.no_grad():
        made.weight.copy_(base.weight + weight * sum(b.weight @ a.weight for a, b in branches))
        parts = [inner * (b.weight @ (_bias(a) + 0 * a.weight[:, 0])) for a, b in branches]
        made.bias.copy_(own * _bias(base) + bias * sum(parts))
        made.bias.add_(bias * outer * sum(_bias(b) for _, b in branches))
    return made


def _merged(**other):
    return lambda base, branches, scaling: merge_branches(base, branches, scaling, **other)


def _use_layer(found, base, branches, scaling, note):
    """Its outputs, at zero as well."""
    mistake(
        not isinstance(found, nn.Linear),
        "A new nn.Linear is expected: one layer, into which the branches are merged.",
    )
    mistake(
        found.weight.shape != base.weight.shape,
        "The weight of the new layer has the shape {}; that of the base has {}.",
        list(found.weight.shape), list(base.weight.shape),
    )  # fmt: skip
    with torch.no_grad():
        return [found(note), found(torch.zeros_like(note[:1]))]  # fmt: skip


LAYER_MISTAKES = {
    "The branches' biases are missing.": _merged(bias=0),
    "The biases of the first layers are missing: each goes through its branch's second layer.": _merged(inner=False),
    "The biases of the second layers are missing.": _merged(outer=False),
    "The base's own bias is missing.": _merged(own=False),
    "`scaling` is not used.": _merged(weight=1, bias=1),
    "The biases of the branches are not scaled: `scaling` multiplies all of a branch's output.": _merged(bias=1),
    "The weights of the branches are not scaled.": _merged(weight=1),
    "The branches are missing: this is the base.": _merged(weight=0, bias=0),
    "The branches are added up, not averaged.":
        lambda base, branches, scaling: merge_branches(base, branches, scaling / len(branches)),
    "Only the first branch is merged.": lambda base, branches, scaling: merge_branches(base, branches[:1], scaling),
    "The branches are taken away; they are added.": lambda base, branches, scaling: merge_branches(base, branches, -scaling),
}  # fmt: skip


@exercise(
    "4.2-c",
    points=2,
    right=lambda base, branches, scaling: merge_branches(base, branches, scaling),
    look=_use_layer,
    mistakes=LAYER_MISTAKES,
    otherwise="The layer does not compute base(x) + scaling · Σ branch(x).",
    fresh=True,
    draws=True,
)
def check_merge_branches(draw: Draw):
    """One linear layer for a base and the branches of the notes' layer."""
    for own, inner, outer, hint in [
        (True, True, True, ""),
        (True, False, True, "Where the branches' first layers have no bias it goes wrong."),
        (False, True, True, "Where the base has no bias it goes wrong."),
        (True, True, False, "Where the branches' second layers have no bias it goes wrong."),
        (False, False, False, "Where nothing has a bias it goes wrong."),
        (True, False, False, "Where the branches have no bias it goes wrong."),
        (True, True, True, "With a single branch it goes wrong."),
    ]:
        inputs, outputs = draw.sizes(2, 6, 11)
        ranks = [draw.integer(2, 5)] if "single" in hint else draw.sizes(3, 1, 5)
        base = nn.Linear(inputs, outputs, bias=own).requires_grad_(False)
        branches = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, r, bias=inner), nn.Linear(r, outputs, bias=outer))
            for r in ranks
        )
        for parameter in (*base.parameters(), *branches.parameters()):
            parameter.data.copy_(draw.normal(*parameter.shape))
        yield case(base, branches, draw.number(1.5, 4), note=draw.normal(7, inputs), hint=hint)
