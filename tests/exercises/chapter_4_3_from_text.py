"""Answers to chapter 4.3's exercises by somebody who has read no more than the text and the stub."""

import numpy as np
import torch
from torch.nn import functional as F

from tests.exercises.chapter_4_3 import grid, packed, ste


def asymmetric(
    x, bits, *, low=None, high=None, steps=None, zero=None, code=None, end=None, cut=True
):
    x = x.detach()
    lo = low(x) if low else x.min().clamp(max=0)
    hi = high(x) if high else x.max().clamp(min=0)
    scale = (hi - lo) / (steps(bits) if steps else 2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    z = zero(lo, scale) if zero else (-lo / scale).round()
    codes = code(x, scale, z, lo) if code else (x / scale).round() + z
    codes = codes.clamp(0, 2**bits - 1) if cut else codes
    return end(codes, scale, z, bits) if end else (codes, scale, z)


def gridded(**parts):
    return lambda x, bits: asymmetric(x, bits, **parts)


grid.wrong("2^bits steps", gridded(steps=lambda b: 2**b))
grid.wrong("2^bits - 2 steps", gridded(steps=lambda b: 2**b - 2))
grid.wrong("a symmetric number of steps", gridded(steps=lambda b: 2 ** (b - 1) - 1))
grid.wrong("the smallest only", gridded(low=lambda x: x.min()))
grid.wrong("the largest only", gridded(high=lambda x: x.max()))
grid.wrong("symmetric", gridded(low=lambda x: -x.abs().max(), high=lambda x: x.abs().max()))
grid.wrong(
    "a column each",
    lambda x, b: asymmetric(
        x,
        b,
        low=lambda x: x.amin(-1, keepdim=True).clamp(max=0),
        high=lambda x: x.amax(-1, keepdim=True).clamp(min=0),
    ),
)
grid.wrong("zero is no whole number", gridded(zero=lambda lo, s: -lo / s))
grid.wrong("zero rounded down", gridded(zero=lambda lo, s: (-lo / s).floor()))
grid.wrong("zero rounded up", gridded(zero=lambda lo, s: (-lo / s).ceil()))
grid.wrong("the sign of zero", gridded(zero=lambda lo, s: (lo / s).round()))
grid.wrong("zero in the middle", gridded(zero=lambda lo, s: torch.tensor(8.0)))
grid.wrong("codes not cut", gridded(cut=False))
grid.wrong("codes rounded down", gridded(code=lambda x, s, z, lo: (x / s).floor() + z))
grid.wrong("codes cut off", gridded(code=lambda x, s, z, lo: (x / s).trunc() + z))
grid.wrong(
    "half and a floor, after zero", gridded(code=lambda x, s, z, lo: (x / s + 1e-1 + z).round())
)
grid.wrong("distances from the low end", gridded(code=lambda x, s, z, lo: ((x - lo) / s).round()))
grid.wrong("no zero in the codes", gridded(code=lambda x, s, z, lo: (x / s).round()))
grid.wrong("read back already", gridded(code=lambda x, s, z, lo: (x / s).round() * s))
grid.wrong(
    "the top code is never used", gridded(end=lambda c, s, z, b: (c.clamp(0, 2**b - 2), s, z))
)
grid.wrong("int8", gridded(end=lambda c, s, z, b: (c.to(torch.int8), s, z)))
grid.wrong("scale and zero exchanged", gridded(end=lambda c, s, z, b: (c, z, s)))
grid.wrong("one over the scale", gridded(end=lambda c, s, z, b: (c, 1 / s, z)))
grid.wrong("flat", gridded(end=lambda c, s, z, b: (c.flatten(), s, z)))
grid.wrong(
    "zeros divide by zero",
    lambda x, b: (
        (x / (s := (x.max().clamp(min=0) - x.min().clamp(max=0)) / (2**b - 1))).round()
        + (z := (-x.min().clamp(max=0) / s).round()),
        s,
        z,
    ),
)
grid.right("uint8", gridded(end=lambda c, s, z, b: (c.to(torch.uint8), s, z)))
grid.wrong("1e-3 on the scale", gridded(end=lambda c, s, z, b: (c, s + 1e-3, z)))

grid.right(
    "half up",
    gridded(
        zero=lambda lo, s: (-lo / s + 0.5).floor(),
        code=lambda x, s, z, lo: (x / s + 0.5).floor() + z,
    ),
)
grid.right(
    "whole codes, Python's scale", gridded(end=lambda c, s, z, b: (c.long(), float(s), int(z)))
)
grid.right("whole numbers", gridded(end=lambda c, s, z, b: (c.int(), s, z.int())))
grid.right("a list", gridded(end=lambda c, s, z, b: [c, s, z]))
grid.right(
    "with a zero added",
    lambda x, b: asymmetric(
        x,
        b,
        low=lambda x: torch.cat([x.flatten(), torch.zeros(1)]).min(),
        high=lambda x: torch.cat([x.flatten(), torch.zeros(1)]).max(),
    ),
)
grid.right("float64", lambda x, b: asymmetric(x.double(), b))


@grid.right("numpy")
def _(x, bits):
    v = x.detach().numpy()
    low, high = min(float(v.min()), 0.0), max(float(v.max()), 0.0)
    scale = (high - low) / (2**bits - 1) or 1.0
    zero = int(np.rint(-low / scale))
    codes = np.rint(v / np.float32(scale)).astype(np.int64) + zero
    return codes.clip(0, 2**bits - 1), scale, zero


@grid.right("number by number")
def _(x, bits):
    flat = x.flatten().tolist()
    low, high = min([0.0, *flat]), max([0.0, *flat])
    scale = (high - low) / (2**bits - 1) if high > low else 0.5
    zero = round(-low / scale)
    codes = [min(max(round(v / scale) + zero, 0), 2**bits - 1) for v in flat]
    return torch.tensor(codes).reshape(x.shape), scale, zero


def rounded(x, scale, top):
    return (x.detach() / scale).round().clamp(-top, top) * scale


ste.wrong("the gradient of rounding", lambda x, s, t: (x / s).round().clamp(-t, t) * s)
ste.wrong("1 everywhere", lambda x, s, t: x + (rounded(x, s, t) - x).detach())
ste.wrong("0 everywhere", lambda x, s, t: rounded(x, s, t) + 0 * x)
ste.wrong(
    "half a step further out",
    lambda x, s, t: (
        x * (m := (x.detach() / s).round().abs() <= t) + (rounded(x, s, t) - x * m).detach()
    ),
)
ste.wrong(
    "half a step further in",
    lambda x, s, t: (c := x.clamp(-(t - 0.5) * s, (t - 0.5) * s)) + (rounded(x, s, t) - c).detach(),
)
ste.wrong("1/scale", lambda x, s, t: (c := (x / s).clamp(-t, t)) + (rounded(x, s, t) - c).detach())
ste.wrong(
    "scale", lambda x, s, t: (c := x.clamp(-t * s, t * s) * s) + (rounded(x, s, t) - c).detach()
)
ste.wrong("cut at top", lambda x, s, t: (c := x.clamp(-t, t)) + (rounded(x, s, t) - c).detach())
ste.wrong(
    "one code more below",
    lambda x, s, t: (c := x.clamp(-(t + 1) * s, t * s)) + ((c / s).round() * s - c).detach(),
)
ste.wrong(
    "not cut", lambda x, s, t: (c := x.clamp(-t * s, t * s)) + ((x / s).round() * s - c).detach()
)
ste.wrong(
    "rounded down",
    lambda x, s, t: (c := x.clamp(-t * s, t * s)) + ((c / s).floor() * s - c).detach(),
)
ste.wrong(
    "truncated", lambda x, s, t: (c := x.clamp(-t * s, t * s)) + ((c / s).trunc() * s - c).detach()
)
ste.wrong(
    "the codes", lambda x, s, t: (c := x.clamp(-t * s, t * s)) + ((c / s).round() - c).detach()
)
ste.wrong("the cut alone", lambda x, s, t: x.clamp(-t * s, t * s))
ste.wrong(
    "the gradient outside",
    lambda x, s, t: (c := x - x.clamp(-t * s, t * s)) + (rounded(x, s, t) - c).detach(),
)
ste.wrong(
    "twice the gradient",
    lambda x, s, t: (c := 2 * x.clamp(-t * s, t * s)) + (rounded(x, s, t) - c).detach(),
)
ste.wrong(
    "only positive", lambda x, s, t: (c := x.clamp(0, t * s)) + (rounded(x, s, t) - c).detach()
)
ste.wrong(
    "tanh", lambda x, s, t: (c := t * s * torch.tanh(x / (t * s))) + (rounded(x, s, t) - c).detach()
)
ste.wrong("detached", lambda x, s, t: rounded(x, s, t))
ste.wrong("a leaf of its own", lambda x, s, t: rounded(x, s, t).requires_grad_())
ste.wrong(
    "2^(bits-1) from top",
    lambda x, s, t: (c := x.clamp(-(2 * t) * s, 2 * t * s)) + ((c / s).round() * s - c).detach(),
)


@ste.wrong("in x")
def _(x, scale, top):
    with torch.no_grad():
        x.copy_(rounded(x, scale, top))
    return x * 1.0


@ste.wrong("a function whose backward passes all")
def _(x, scale, top):
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return rounded(x, scale, top)

        @staticmethod
        def backward(ctx, g):
            return g

    return Straight.apply(x)


@ste.wrong("a function that sums its gradient")
def _(x, scale, top):
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.inside = x.abs() < top * scale
            return rounded(x, scale, top)

        @staticmethod
        def backward(ctx, g):
            return ctx.inside.float() * g.mean()

    return Straight.apply(x)


@ste.right("an autograd function")
def _(x, scale, top):
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x / scale).round().clamp(-top, top) * scale

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return torch.where(x.abs() < top * scale, g, torch.zeros_like(g))

    return Straight.apply(x)


@ste.right("a hook")
def _(x, scale, top):
    y = x * 1.0
    y.register_hook(lambda g: g * (x.detach().abs() <= top * scale))
    return y + (rounded(x, scale, top) - y).detach()


ste.right(
    "hardtanh",
    lambda x, s, t: (c := F.hardtanh(x / s, -t, t) * s) + (torch.round(c / s) * s - c).detach(),
)
ste.right(
    "a mask",
    lambda x, s, t: (
        x * (m := (x.detach().abs() <= s * t).float()) + (rounded(x, s, t) - x.detach() * m)
    ),
)
ste.right(
    "where",
    lambda x, s, t: torch.where(x.abs() < t * s, x, x.detach()) + rounded(x, s, t) - x.detach(),
)
ste.right(
    "min and max",
    lambda x, s, t: (
        (c := torch.minimum(torch.maximum(x, torch.tensor(-t * s)), torch.tensor(t * s)))
        + (rounded(x, s, t) - c).detach()
    ),
)
ste.right(
    "float64",
    lambda x, s, t: (
        (c := x.double().clamp(-t * s, t * s)) + (rounded(x.double(), s, t) - c).detach()
    ),
)
ste.right(
    "half up",
    lambda x, s, t: (
        (c := x.clamp(-t * s, t * s)) + ((c / s + 0.5).floor().clamp(-t, t) * s - c).detach()
    ),
)


def q4(codes, block, *, add=8, fill=8, swap=False, end=None):
    v = [int(c) + add for c in codes.tolist()]
    v += [fill] * (-len(v) % block)
    out = []
    for start in range(0, len(v), block):
        low, high = v[start : start + block // 2], v[start + block // 2 : start + block]
        out += [(h + 16 * l if swap else l + 16 * h) % 256 for l, h in zip(low, high, strict=True)]
    return end(out) if end else torch.tensor(out, dtype=torch.uint8)


packed.wrong("halves exchanged", lambda c, b: q4(c, b, swap=True))
packed.wrong("the byte 0 as filling", lambda c, b: q4(c, b, fill=0))
packed.wrong("a full 15 as filling", lambda c, b: q4(c, b, fill=15))
packed.wrong("7 is added", lambda c, b: q4(c, b, add=7, fill=7))
packed.wrong(
    "two's complement",
    lambda c, b: q4(
        c, b, add=0, fill=0, end=lambda o: torch.tensor([v % 256 for v in o], dtype=torch.uint8)
    ),
)
packed.wrong(
    "neighbours",
    lambda c, b: ((v := F.pad(c.long() + 8, (0, -len(c) % b), value=8))[::2] + 16 * v[1::2]).to(
        torch.uint8
    ),
)
packed.wrong(
    "halves of the whole row",
    lambda c, b: (
        (v := F.pad(c.long() + 8, (0, -len(c) % b), value=8))[: len(v) // 2] + 16 * v[len(v) // 2 :]
    ).to(torch.uint8),
)
packed.wrong("blocks of 32, always", lambda c, b: q4(c, 32))
packed.wrong(
    "filled to an even number",
    lambda c, b: q4(torch.cat([c, c.new_zeros(len(c) % 2)]), b if len(c) % b == 0 else 2),
)
packed.wrong("the last block is dropped", lambda c, b: q4(c[: len(c) // b * b], b))
packed.wrong("filled in front", lambda c, b: q4(torch.cat([c.new_zeros(-len(c) % b), c]), b))
packed.wrong("always fills", lambda c, b: q4(torch.cat([c, c.new_zeros(b - len(c) % b)]), b))
packed.wrong(
    "times 15",
    lambda c, b: (
        (
            (v := F.pad(c.long() + 8, (0, -len(c) % b), value=8).reshape(-1, 2, b // 2))[:, 0]
            + 15 * v[:, 1]
        )
        .to(torch.uint8)
        .flatten()
    ),
)
packed.wrong(
    "blocks as rows",
    lambda c, b: (
        (v := F.pad(c.long() + 8, (0, -len(c) % b), value=8).reshape(-1, 2, b // 2))[:, 0]
        + 16 * v[:, 1]
    ).to(torch.uint8),
)
packed.wrong("int64", lambda c, b: q4(c, b).long())
packed.wrong("int8", lambda c, b: q4(c, b).to(torch.int8))
packed.wrong(
    "a xor in place of a sum, unshifted",
    lambda c, b: (
        (
            (v := F.pad(c.long() + 8, (0, -len(c) % b), value=8).reshape(-1, 2, b // 2))[:, 0]
            ^ v[:, 1]
        )
        .to(torch.uint8)
        .flatten()
    ),
)
packed.wrong(
    "byte after byte of all blocks",
    lambda c, b: q4(c, b).reshape(-1, b // 2).T.flatten() if len(c) else q4(c, b),
)
packed.wrong(
    "interleaved within a block",
    lambda c, b: (
        (
            (v := F.pad(c.long() + 8, (0, -len(c) % b), value=8).reshape(-1, b // 2, 2))[..., 0]
            + 16 * v[..., 1]
        )
        .to(torch.uint8)
        .flatten()
    ),
)
packed.wrong("clamped to positive codes", lambda c, b: q4(c.clamp(min=0), b))


@packed.wrong("adds in place")
def _(codes, block):
    codes += 8
    return q4(codes, block, add=0)


packed.right(
    "numpy",
    lambda c, b: (
        np.bitwise_or(
            (
                v := np.pad(
                    c.numpy().astype(np.int16) + 8, (0, -len(c) % b), constant_values=8
                ).reshape(-1, 2, b // 2)
            )[:, 0],
            v[:, 1] << 4,
        )
        .astype(np.uint8)
        .ravel()
    ),
)
packed.right("bytes in a loop", lambda c, b: q4(c, b))
packed.right(
    "int8 that wraps",
    lambda c, b: (
        (
            (v := F.pad(c.to(torch.int8) + 8, (0, -len(c) % b), value=8).reshape(-1, 2, b // 2))[
                :, 0
            ]
            | (v[:, 1] << 4)
        )
        .to(torch.uint8)
        .flatten()
    ),
)
packed.right(
    "filled before 8 is added",
    lambda c, b: (
        (
            v := torch.cat([c.short(), torch.zeros(-len(c) % b, dtype=torch.int16)])
            .add(8)
            .unflatten(0, (-1, b))
            .to(torch.uint8)
        )[:, : b // 2]
        | v[:, b // 2 :] << 4
    ).reshape(-1),
)
packed.right(
    "a weighted sum",
    lambda c, b: (
        torch.einsum(
            "nhj,h->nj",
            F.pad(c.long() + 8, (0, -len(c) % b), value=8).reshape(-1, 2, b // 2),
            torch.tensor([1, 16]),
        )
        .flatten()
        .byte()
    ),
)
packed.right(
    "a bytearray",
    lambda c, b: (
        torch.frombuffer(bytearray(q4(c, b).tolist()), dtype=torch.uint8)
        if len(c)
        else torch.zeros(0, dtype=torch.uint8)
    ),
)
packed.right(
    "block after block",
    lambda c, b: (
        torch.cat(
            [
                (w := torch.cat([s.int(), torch.zeros(b - len(s)).int()]) + 8)[: b // 2].to(
                    torch.uint8
                )
                + 16 * w[b // 2 :].to(torch.uint8)
                for s in c.split(b)
            ]
        )
        if len(c)
        else torch.zeros(0, dtype=torch.uint8)
    ),
)
