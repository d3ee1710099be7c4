"""Wrong and right answers to the exercises of chapter 1.2."""

import heapq
import math

import numpy as np
import torch

from lora_course.classroom.chapter_1_2 import check_allocation_floor, check_budget_up, check_fold
from tests.exercises import Answers

budget = Answers(check_budget_up)


def exact(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3, end=None):
    end = total_step - tfinal if end is None else end
    left = 1 - (min(max(t, tinit), end) - tinit) / (end - tinit)
    return (init_r - target_r) * layers * left**power + target_r * layers


def up(*g, **k):
    return math.ceil(exact(*g, **k))


def at(change):
    """The right budget of a changed call."""

    def answer(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3):
        given = {"t": t, "layers": layers, "init_r": init_r, "target_r": target_r, "tinit": tinit, "tfinal": tfinal,
                 "total_step": total_step, "power": power}  # fmt: skip
        return up(**given | change(**given))

    return answer


budget.wrong("not rounded", exact)
budget.wrong("cut", lambda *g, **k: int(exact(*g, **k)))
budget.wrong("rounded", lambda *g, **k: round(exact(*g, **k)))
budget.wrong("one more", lambda *g, **k: int(exact(*g, **k)) + 1)
budget.wrong("a float", lambda *g, **k: float(up(*g, **k)))
budget.wrong("one layer", at(lambda layers, **_: {"layers": 1}))
budget.wrong("a layer's, times their number", lambda t, layers, *g, **k: layers * up(t, 1, *g, **k))
budget.wrong("cubic always", at(lambda power, **_: {"power": 3}))
budget.wrong("square", at(lambda power, **_: {"power": 2}))
budget.wrong("a line", at(lambda power, **_: {"power": 1}))
budget.wrong("one power too many", at(lambda power, **_: {"power": power + 1}))
budget.wrong("met at the end", at(lambda tfinal, **_: {"tfinal": 0}))
budget.wrong("no warm-up", at(lambda tinit, **_: {"tinit": 0}))
budget.wrong(
    "ranks exchanged", at(lambda init_r, target_r, **_: {"init_r": target_r, "target_r": init_r})
)
budget.wrong("to zero", at(lambda target_r, **_: {"target_r": 0}))
budget.wrong("phases exchanged", at(lambda tinit, tfinal, **_: {"tinit": tfinal, "tfinal": tinit}))
budget.wrong("a step late", at(lambda t, **_: {"t": t - 1}))
budget.wrong("a step early", at(lambda t, **_: {"t": t + 1}))
budget.wrong(
    "rises at once at the end", lambda t, *g, **k: up(t, *g, **k) if t < g[-1] else up(1, *g, **k)
)
budget.wrong(
    "power of what has passed",
    lambda t, layers, i, r, a, b, T, power=3: math.ceil(
        i * layers - (i - r) * layers * ((min(max(t, a), T - b) - a) / (T - b - a)) ** power
    ),
)
budget.wrong(
    "measured from 0",
    lambda t, layers, i, r, a, b, T, power=3: math.ceil(
        (i - r) * layers * (1 - (min(max(t, a), T - b) - a) / (T - b)) ** power + r * layers
    ),
)
budget.wrong(
    "rounded up twice",
    lambda t, layers, i, r, a, b, T, power=3: (
        math.ceil(
            (i - r) * math.ceil(layers * (1 - (min(max(t, a), T - b) - a) / (T - b - a)) ** power)
        )
        + r * layers
    ),
)
budget.wrong(
    "cosine",
    lambda t, layers, i, r, a, b, T, power=3: math.ceil(
        (i - r) * layers * (1 + math.cos(math.pi * (min(max(t, a), T - b) - a) / (T - b - a))) / 2
        + r * layers
    ),
)
budget.right("as the solution", up)
budget.right("minus floor of minus", lambda *g, **k: -math.floor(-exact(*g, **k)))
budget.right("numpy", lambda *g, **k: np.ceil(exact(*g, **k)).astype(int))
budget.right(
    "torch", lambda *g, **k: torch.tensor(exact(*g, **k), dtype=torch.float64).ceil().long()
)
budget.right(
    "a line between two ends",
    lambda t, layers, i, r, a, b, T, power=3: math.ceil(
        layers * (r + (i - r) * max(0, min(1, (T - b - t) / (T - b - a))) ** power)
    ),
)
budget.right(
    "by name only",
    lambda *, t, layers, init_r, target_r, tinit, tfinal, total_step, power=3: up(
        t, layers, init_r, target_r, tinit, tfinal, total_step, power
    ),
)


@budget.right("by phases")
def _(t, layers, init_r, target_r, tinit, tfinal, total_step, power=3):
    if t <= tinit:
        return init_r * layers
    if t >= total_step - tfinal:
        return target_r * layers
    part = 1 - (t - tinit) / (total_step - tfinal - tinit)
    return target_r * layers + math.ceil((init_r - target_r) * layers * part**power)


budget.wrong("a power of 1 or more", at(lambda power, **_: {"power": max(1, power)}))
budget.wrong("kept by all but the power", lambda *g, S={}, **k: S.setdefault(g[:7], up(*g, **k)))
budget.wrong(
    "kept by all but the layers",
    lambda *g, S={}, **k: S.setdefault((g[0], *g[2:], *k.items()), up(*g, **k)),
)


allocation = Answers(check_allocation_floor)


def scores(S, U, combine=lambda s, u: s * u, red=torch.mean, parts="AEB"):
    out = {}
    for n in S:
        s = {k: combine(S[n][k], U[n][k]) for k in "AEB"}
        t = {"E": s["E"].flatten(), "A": red(s["A"], 1), "B": red(s["B"], 0)}
        out[n] = sum(t[k] for k in parts)
    return out


def pick(sc, b, floor=True, largest=True):
    sc = {n: (s if largest else -s).clone() for n, s in sc.items()}
    for s in sc.values() if floor else ():
        s[s.argsort(descending=True, stable=True)[0]] = math.inf
    x = torch.cat(list(sc.values()))
    m = torch.zeros(len(x), dtype=torch.bool)
    m[x.argsort(descending=True, stable=True)[:b]] = True
    return dict(zip(sc, m.split([len(s) for s in sc.values()]), strict=True))


def first_then_global(S, U, b, each=1):
    """The best of each, and the b − layers highest of the whole model, whether they are kept already or not."""
    sc = scores(S, U)
    best = pick(sc, len(sc))
    return {n: best[n] | m for n, m in pick(sc, b - len(sc), floor=False).items()}


allocation.wrong("no layer keeps one by right", lambda S, U, b: pick(scores(S, U), b, floor=False))
allocation.wrong("lowest", lambda S, U, b: pick(scores(S, U), b, largest=False))
allocation.wrong("the best on top of the budget", lambda S, U, b: pick(scores(S, U), b + len(S)))
allocation.wrong("the best counted twice", first_then_global)
allocation.wrong(
    "the first of each layer for its best",
    lambda S, U, b: {
        n: m | (torch.arange(len(m)) == 0) for n, m in pick(scores(S, U), b, floor=False).items()
    },
)
allocation.wrong(
    "a layer without one gets one more",
    lambda S, U, b: {
        n: m if m.any() else pick({n: scores(S, U)[n]}, 1)[n]
        for n, m in pick(scores(S, U), b, floor=False).items()
    },
)
allocation.wrong(
    "two of each",
    lambda S, U, b: pick(
        {
            n: s.index_fill(0, s.argsort(descending=True)[:2], math.inf)
            for n, s in scores(S, U).items()
        },
        b,
    ),
)
allocation.wrong(
    "per layer", lambda S, U, b: {n: pick({n: s}, b // len(S))[n] for n, s in scores(S, U).items()}
)
allocation.wrong("no uncertainty", lambda S, U, b: pick(scores(S, U, lambda s, u: s), b))
allocation.wrong("no sensitivity", lambda S, U, b: pick(scores(S, U, lambda s, u: u), b))
allocation.wrong("sums", lambda S, U, b: pick(scores(S, U, red=torch.sum), b))
allocation.wrong("one too few", lambda S, U, b: pick(scores(S, U), b - 1))
allocation.wrong(
    "float masks", lambda S, U, b: {n: m.float() for n, m in pick(scores(S, U), b).items()}
)
allocation.wrong(
    "indices", lambda S, U, b: {n: m.nonzero().flatten() for n, m in pick(scores(S, U), b).items()}
)
allocation.wrong("E only", lambda S, U, b: pick(scores(S, U, parts="E"), b))
allocation.wrong("E and A only", lambda S, U, b: pick(scores(S, U, parts="EA"), b))
allocation.wrong("E and B only", lambda S, U, b: pick(scores(S, U, parts="EB"), b))
allocation.wrong("A and B only", lambda S, U, b: pick(scores(S, U, parts="AB"), b))
allocation.wrong(
    "sensitivity + uncertainty", lambda S, U, b: pick(scores(S, U, lambda s, u: s + u), b)
)
allocation.wrong("s / u", lambda S, U, b: pick(scores(S, U, lambda s, u: s / u), b))
allocation.wrong("s squared", lambda S, U, b: pick(scores(S, U, lambda s, u: s * s), b))
allocation.wrong("u squared", lambda S, U, b: pick(scores(S, U, lambda s, u: u * u), b))
allocation.wrong(
    "product of whole scores",
    lambda S, U, b: pick(
        {n: scores(S, U, lambda s, u: s)[n] * scores(S, U, lambda s, u: u)[n] for n in S}, b
    ),
)
allocation.wrong(
    "largest of rows", lambda S, U, b: pick(scores(S, U, red=lambda x, d: x.amax(d)), b)
)
allocation.wrong(
    "median", lambda S, U, b: pick(scores(S, U, red=lambda x, d: x.median(d).values), b)
)
allocation.wrong(
    "root mean square",
    lambda S, U, b: pick(scores(S, U, red=lambda x, d: x.square().mean(d).sqrt()), b),
)
allocation.wrong("norm", lambda S, U, b: pick(scores(S, U, red=lambda x, d: x.norm(dim=d)), b))
allocation.wrong(
    "normalised in each layer",
    lambda S, U, b: pick({n: s / s.sum() for n, s in scores(S, U).items()}, b),
)
allocation.wrong(
    "mean over the entries of both rows together",
    lambda S, U, b: pick(
        {
            n: (S[n]["E"] * U[n]["E"]).flatten()
            + torch.cat([S[n]["A"] * U[n]["A"], (S[n]["B"] * U[n]["B"]).T], 1).mean(1)
            for n in S
        },
        b,
    ),
)
allocation.wrong(
    "half of A and B",
    lambda S, U, b: pick(
        {
            n: (
                (S[n]["E"] * U[n]["E"]).flatten()
                + 0.5 * (S[n]["A"] * U[n]["A"]).mean(1)
                + 0.5 * (S[n]["B"] * U[n]["B"]).mean(0)
            )
            for n in S
        },
        b,
    ),
)
allocation.wrong(
    "product of the parts",
    lambda S, U, b: pick(
        {
            n: (S[n]["E"] * U[n]["E"]).flatten()
            * (S[n]["A"] * U[n]["A"]).mean(1)
            * (S[n]["B"] * U[n]["B"]).mean(0)
            for n in S
        },
        b,
    ),
)
allocation.wrong("one long mask", lambda S, U, b: torch.cat(list(pick(scores(S, U), b).values())))


@allocation.wrong("a threshold, >=")
def _(S, U, b):
    sc = scores(S, U)
    raised = torch.cat([s.index_fill(0, s.argmax(), math.inf) for s in sc.values()])
    limit = raised.sort(descending=True).values[b - 1]
    return {n: (s >= limit) | (torch.arange(len(s)) == s.argmax()) for n, s in sc.items()}


@allocation.wrong("ties: the last wins")
def _(S, U, b):
    flipped = {n: s.flip(0) for n, s in reversed(scores(S, U).items())}
    return {n: m.flip(0) for n, m in pick(flipped, b).items()}


@allocation.wrong("multiplies into the sensitivity in place")
def _(S, U, b):
    for n in S:
        for k in "AEB":
            S[n][k].mul_(U[n][k])
    return pick(scores(S, U, lambda s, u: s), b)


@allocation.wrong("replaces the caller's entries")
def _(S, U, b):
    for n in S:
        for k in "AEB":
            S[n][k] = S[n][k] * U[n][k]
    return pick(scores(S, U, lambda s, u: s), b)


@allocation.wrong("pops")
def _(S, U, b):
    return pick({n: scores({n: S.pop(n)}, U)[n] for n in list(S)}, b)


allocation.right("as the solution", lambda S, U, b: pick(scores(S, U), b))


@allocation.right("python's sorted, in two rounds")
def _(S, U, b):
    sc = {n: s.tolist() for n, s in scores(S, U).items()}
    kept = {(n, s.index(max(s))) for n, s in sc.items()}
    rest = sorted(
        ((n, i) for n in sc for i in range(len(sc[n])) if (n, i) not in kept),
        key=lambda x: -sc[x[0]][x[1]],
    )
    kept |= set(rest[: b - len(kept)])
    return {n: [(n, i) in kept for i in range(len(s))] for n, s in sc.items()}


@allocation.right("heapq.nlargest")
def _(S, U, b):
    sc = {n: s.tolist() for n, s in scores(S, U).items()}
    first = {n: max(range(len(s)), key=s.__getitem__) for n, s in sc.items()}
    places = [(n, i) for n in sc for i in range(len(sc[n]))]
    best = set(heapq.nlargest(b, places, key=lambda x: (first[x[0]] == x[1], sc[x[0]][x[1]])))
    return {n: torch.tensor([(n, i) in best for i in range(len(s))]) for n, s in sc.items()}


@allocation.right("numpy")
def _(S, U, b):
    sc = {
        n: (S[n]["E"] * U[n]["E"]).numpy()[:, 0]
        + (S[n]["A"] * U[n]["A"]).numpy().mean(1)
        + (S[n]["B"] * U[n]["B"]).numpy().mean(0)
        for n in S
    }
    x = np.concatenate([np.where(np.arange(len(s)) == s.argmax(), np.inf, s) for s in sc.values()])
    m = np.zeros(len(x), bool)
    m[np.argsort(-x, kind="stable")[:b]] = True
    return dict(zip(sc, np.split(m, np.cumsum([len(s) for s in sc.values()])[:-1]), strict=True))


@allocation.right("greedy")
def _(S, U, b):
    sc = {n: s.clone() for n, s in scores(S, U).items()}
    m = {n: torch.zeros(len(s), dtype=torch.bool) for n, s in sc.items()}
    for i in range(b):
        n = list(sc)[i] if i < len(sc) else max(sc, key=lambda n: sc[n].max())
        j = int(sc[n].argmax())
        m[n][j], sc[n][j] = True, -1.0
    return m


@allocation.right("einsum means")
def _(S, U, b):
    return pick(
        {
            n: (S[n]["E"] * U[n]["E"]).squeeze(1)
            + torch.einsum("ri,ri->r", S[n]["A"], U[n]["A"]) / S[n]["A"].shape[1]
            + torch.einsum("or,or->r", S[n]["B"], U[n]["B"]) / S[n]["B"].shape[0]
            for n in S
        },
        b,
    )


allocation.right(
    "layers in another order", lambda S, U, b: dict(reversed(list(pick(scores(S, U), b).items())))
)
allocation.right("in 64 bits", lambda S, U, b: pick(scores(S, U, lambda s, u: s.double() * u), b))


def by_name(S, U, b, backwards=False):
    names = sorted(S, reverse=backwards)
    return pick(scores({n: S[n] for n in names}, U), b)


@allocation.wrong("what is kept counts as 0 afterwards")
def _(S, U, b):
    sc = scores(S, U)
    best = pick(sc, len(sc))
    rest = pick({n: s * ~best[n] for n, s in sc.items()}, b - len(sc), floor=False)
    return {n: best[n] | m for n, m in rest.items()}


allocation.wrong("layers by name", by_name)
allocation.wrong("layers by name, backwards", lambda S, U, b: by_name(S, U, b, True))
allocation.right(
    "masks as lists, in another order",
    lambda S, U, b: {n: m.tolist() for n, m in reversed(pick(scores(S, U), b).items())},
)


folded = Answers(check_fold)


def kept(layer):
    return (layer.E * layer.A)[layer.mask], layer.B[:, layer.mask]


def count(layer):
    return int(layer.mask.sum())


folded.wrong("nothing left out", lambda layer: (layer.E * layer.A, layer.B, layer.lora_alpha))
folded.wrong(
    "no λ",
    lambda layer: (layer.A[layer.mask], layer.B[:, layer.mask], layer.scaling * count(layer)),
)
folded.wrong(
    "λ twice",
    lambda layer: (
        kept(layer)[0],
        kept(layer)[1] * layer.E[layer.mask].T,
        layer.scaling * count(layer),
    ),
)
folded.wrong(
    "|λ|",
    lambda layer: (
        (layer.E.abs() * layer.A)[layer.mask],
        kept(layer)[1],
        layer.scaling * count(layer),
    ),
)
folded.wrong(
    "√|λ| in one only",
    lambda layer: (
        (layer.E.abs().sqrt() * layer.A)[layer.mask],
        kept(layer)[1],
        layer.scaling * count(layer),
    ),
)
folded.wrong(
    "λ² ",
    lambda layer: (
        (layer.E**2 * layer.A)[layer.mask],
        kept(layer)[1],
        layer.scaling * count(layer),
    ),
)
folded.wrong("old α", lambda layer: (*kept(layer), layer.lora_alpha))
folded.wrong("the scale", lambda layer: (*kept(layer), layer.scaling))
folded.wrong("no scale", lambda layer: (*kept(layer), count(layer)))
folded.wrong("α 1", lambda layer: (*kept(layer), 1.0))
folded.wrong("scale times the first rank", lambda layer: (*kept(layer), layer.scaling * layer.r))
folded.wrong(
    "scale in A too",
    lambda layer: (layer.scaling * kept(layer)[0], kept(layer)[1], layer.scaling * count(layer)),
)
folded.wrong("whole α", lambda layer: (*kept(layer), int(layer.scaling * count(layer))))
folded.wrong("√ of the rank", lambda layer: (*kept(layer), layer.scaling * count(layer) ** 0.5))
folded.wrong(
    "transposed", lambda layer: (*[t.T for t in kept(layer)], layer.scaling * count(layer))
)
folded.wrong(
    "order exchanged", lambda layer: (kept(layer)[1], kept(layer)[0], layer.scaling * count(layer))
)
folded.wrong(
    "rows that are not zero",
    lambda layer: (
        (layer.E * layer.A)[layer.E[:, 0] != 0],
        layer.B[:, layer.E[:, 0] != 0],
        layer.scaling * int((layer.E != 0).sum()),
    ),
)
folded.wrong(
    "the first rows",
    lambda layer: (
        (layer.E * layer.A)[: count(layer)],
        layer.B[:, : count(layer)],
        layer.scaling * count(layer),
    ),
)
folded.wrong(
    "the masked rows",
    lambda layer: (
        (layer.E * layer.A)[~layer.mask],
        layer.B[:, ~layer.mask],
        layer.scaling * count(layer),
    ),
)
folded.wrong(
    "three rows", lambda layer: ((layer.E * layer.A)[:3], layer.B[:, :3], layer.scaling * 3)
)
folded.wrong("two things", kept)
folded.wrong(
    "A and B unmasked apart",
    lambda layer: (kept(layer)[0], layer.B[:, layer.mask.flip(0)], layer.scaling * count(layer)),
)
folded.wrong("ΔW", lambda layer: layer.delta_weight())
folded.wrong("NaN where the rank is whole", lambda layer: (*kept(layer), float("nan")))


@folded.wrong("doubles A afterwards")
def _(layer):
    answer = (*[t.clone() for t in kept(layer)], layer.scaling * count(layer))
    layer.A.data.mul_(2)
    return answer


@folded.wrong("folds λ into the layer")
def _(layer):
    layer.A.data.mul_(layer.E.data)
    layer.E.data.fill_(1)
    return layer.A[layer.mask].clone(), layer.B[:, layer.mask], layer.scaling * count(layer)


@folded.wrong("sets the layer's rank")
def _(layer):
    layer.r = count(layer)
    return (*kept(layer), layer.scaling * layer.r)


@folded.wrong("prunes the layer")
def _(layer):
    answer = (*kept(layer), layer.scaling * count(layer))
    layer.mask = layer.mask[layer.mask]
    return answer


folded.right("as the solution", lambda layer: (*kept(layer), layer.scaling * count(layer)))
folded.right(
    "λ in B",
    lambda layer: (
        layer.A[layer.mask],
        layer.B[:, layer.mask] * layer.E[layer.mask].T,
        layer.lora_alpha / layer.r * len(layer.mask.nonzero()),
    ),
)
folded.right("a list", lambda layer: [*kept(layer), layer.scaling * count(layer)])
folded.right(
    "indices",
    lambda layer: (
        (layer.E * layer.A)[layer.mask.nonzero()[:, 0]],
        layer.B.index_select(1, layer.mask.nonzero()[:, 0]),
        torch.tensor(layer.scaling) * layer.mask.sum(),
    ),
)
folded.right(
    "numpy",
    lambda layer: (
        kept(layer)[0].detach().numpy(),
        kept(layer)[1].detach().numpy(),
        np.float32(layer.scaling * count(layer)),
    ),
)
folded.right(
    "in 64 bits, detached",
    lambda layer: (*[t.detach().double() for t in kept(layer)], layer.scaling * count(layer)),
)
folded.right(
    "all of the scale in A",
    lambda layer: (layer.scaling * kept(layer)[0], kept(layer)[1], count(layer)),
)
folded.right(
    "the package's factors",
    lambda layer: (
        layer.factors()[0][layer.mask],
        layer.factors()[1][:, layer.mask],
        layer.factors()[2] * count(layer),
    ),
)


@folded.right("row by row")
def _(layer):
    rows = [i for i, m in enumerate(layer.mask.tolist()) if m]
    A = torch.stack([layer.E[i, 0] * layer.A[i] for i in rows])
    return A, torch.stack([layer.B[:, i] for i in rows], 1), layer.lora_alpha * len(rows) / layer.r


folded.equivalent("int(kept.sum()) → kept.sum()", "a tensor of one number is a number too")


folded.right(
    "rows and columns in lists",
    lambda layer: (list(kept(layer)[0]), kept(layer)[1].tolist(), layer.scaling * count(layer)),
)


@folded.right("by a singular value decomposition")
def _(layer):
    A, B = kept(layer)
    U, S, V = torch.linalg.svd((layer.scaling * B @ A).detach().double(), full_matrices=False)
    n = count(layer)
    return V[:n], U[:, :n] * S[:n], n
