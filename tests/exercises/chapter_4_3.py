"""Wrong and right answers to the exercises of chapter 4.3."""

import numpy as np
import torch
from torch.nn import functional as F

from lora_course.classroom.chapter_4_3 import (
    check_affine,
    check_pack_blocks,
    check_straight_through,
)
from lora_course.quantized import fake_quantize, pack, quantize
from tests.exercises import Answers

grid = Answers(check_affine)


def ends(x):
    return x.min().clamp(max=0), x.max().clamp(min=0)


def affine(x, bits, steps=-1, rounding=torch.round, zero=torch.round, ends=ends, tiny=1e-30):
    low, high = ends(x)
    s = ((high - low) / (2**bits + steps)).clamp(min=tiny)
    z = zero(-low / s)
    return (rounding(x / s) + z).clamp(0, 2**bits - 1), s, z


def but(**parts):
    return lambda x, bits: affine(x, bits, **parts)


def not_cut(x, bits):
    _, s, z = affine(x, bits)
    return (x / s).round() + z, s, z


def largest(x):
    return -x.abs().max(), x.abs().max()


def snippet(x, bits):
    s = (x.max() - x.min()) / 2**bits
    return ((x - x.min()) / s).floor(), s, -x.min() / s


grid.wrong("the snippet", snippet)
grid.wrong("the package's", lambda x, bits: (*quantize(x.reshape(1, -1), bits, "tensor"), 0))
grid.wrong(
    "the package's, moved up",
    lambda x, bits: (
        lambda codes, s: (codes.reshape(x.shape) + 2 ** (bits - 1) - 1, s, 2 ** (bits - 1) - 1)
    )(*quantize(x.reshape(1, -1), bits, "tensor")),
)
grid.wrong("2^bits steps", but(steps=0))
grid.wrong("2^bits − 2 steps", but(steps=-2))
grid.wrong("floor", but(rounding=torch.floor))
grid.wrong("trunc", but(rounding=torch.trunc))
grid.wrong("ceil", but(rounding=torch.ceil))
grid.wrong("one code too many", not_cut)
grid.wrong("zero is floored", but(zero=torch.floor))
grid.wrong("zero is cut", but(zero=torch.trunc))
grid.wrong("zero is not rounded", but(zero=lambda z: z))
grid.wrong("codes are not rounded", but(rounding=lambda u: u))
grid.wrong("from the smallest to the largest", but(ends=lambda x: (x.min(), x.max())))
grid.wrong("from 0", but(ends=lambda x: (0 * x.min(), x.max().clamp(min=0))))
grid.wrong("to 0", but(ends=lambda x: (x.min().clamp(max=0), 0 * x.max())))
grid.wrong("symmetric", but(ends=largest))
grid.wrong("4 bits", lambda x, bits: affine(x, 4))
grid.wrong(
    "counted from the smallest number",
    lambda x, bits: (lambda c, s, z: (((x - ends(x)[0]) / s).round(), s, z))(*affine(x, bits)),
)
grid.wrong("zero's sign", lambda x, bits: (lambda c, s, z: (c, s, -z))(*affine(x, bits)))
grid.wrong("the lowest value", lambda x, bits: (*affine(x, bits)[:2], ends(x)[0]))
grid.wrong("codes less zero", lambda x, bits: (lambda c, s, z: (c - z, s, z))(*affine(x, bits)))
grid.wrong("read back", lambda x, bits: (lambda c, s, z: (s * (c - z), s, z))(*affine(x, bits)))
grid.wrong("1 / scale", lambda x, bits: (lambda c, s, z: (c, 1 / s, z))(*affine(x, bits)))
grid.wrong("codes only", lambda x, bits: affine(x, bits)[0])
grid.wrong("codes and scale", lambda x, bits: affine(x, bits)[:2])
grid.wrong("a row", lambda x, bits: (lambda c, s, z: (c.flatten(), s, z))(*affine(x, bits)))
grid.wrong(
    "a scale a row",
    lambda x, bits: (lambda c, s, z: (c, s.expand(x.shape[0]), z))(*affine(x, bits)),
)
grid.wrong("NaN at zeros", but(tiny=0.0))
grid.wrong(
    "a scale of 0",
    lambda x, bits: affine(x, bits) if x.any() else (0 * x, torch.tensor(0.0), torch.tensor(0.0)),
)
grid.wrong("1 at zeros", lambda x, bits: (lambda c, s, z: (c + (s < 1e-9), s, z))(*affine(x, bits)))
grid.wrong("stops at zeros", lambda x, bits: affine(x, bits) if x.any() else 1 / 0)


@grid.wrong("divides the caller's x")
def _(x, bits):
    c, s, z = affine(x, bits)
    x /= s
    return c, s, z


grid.right("as the solution", affine)
grid.right("numbers", lambda x, bits: (lambda c, s, z: [c, s.item(), int(z)])(*affine(x, bits)))
grid.right(
    "uint8", lambda x, bits: (lambda c, s, z: (c.to(torch.uint8), s, z.int()))(*affine(x, bits))
)
grid.right("in 64 bits", lambda x, bits: affine(x.double(), bits))
grid.right("scale 1 at zeros", lambda x, bits: affine(x, bits) if x.any() else (x.long(), 1, 0))
grid.right(
    "another code at zeros", lambda x, bits: affine(x, bits) if x.any() else (x.long() + 2, 5.0, 2)
)
grid.right(
    "x / scale + zero, rounded together",
    lambda x, bits: (lambda c, s, z: ((x / s + z).round().clamp(0, 2**bits - 1), s, z))(
        *affine(x, bits)
    ),
)


@grid.right("numpy")
def _(x, bits):
    x = x.numpy()
    low, high = min(x.min(), 0), max(x.max(), 0)
    s = (high - low) / (2**bits - 1) or np.float32(1)
    zero = np.rint(-low / s)
    return (np.rint(x / s) + zero).clip(0, 2**bits - 1), s, zero


grid.equivalent("torch.tensor(1.0) → 1.0", "any positive scale will do, in any form")
grid.equivalent("torch.tensor(1.0) → torch.tensor(2.0)", "any positive scale will do")
grid.equivalent(
    "((x / scale).round() + zero).clamp(0, 2 ** bits - 1) → ((x / scale).round() + zero).clamp(-1, 2 ** bits - 1)",
    "torch rounds −v and v to −w and w: no code is below 0",
)


ste = Answers(check_straight_through)


def Q(x, s, t):
    return (x / s).round().clamp(-t, t) * s


def inside(x, s, t):
    i = x.clamp(-t * s, t * s)
    return i + ((i / s).round() * s - i).detach()


def masked(slope, values=Q):
    def learner(x, s, t):
        y = x * slope(x.detach(), s, t)
        return y + (values(x, s, t) - y).detach()

    return learner


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s, t):
        ctx.save_for_backward(x.abs() <= t * s)
        return Q(x, s, t)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None, None


class HalfAStep(Function):
    @staticmethod
    def forward(ctx, x, s, t):
        ctx.save_for_backward((x / s).round().abs() <= t)
        return Q(x, s, t)


ste.wrong("rounded", Q)
ste.wrong("detached", lambda x, s, t: Q(x, s, t).detach())
ste.wrong("the one line", lambda x, s, t: x + (Q(x, s, t) - x).detach())
ste.wrong("half a step further out", masked(lambda x, s, t: (x / s).round().abs() <= t))
ste.wrong("half a step further out, a function", HalfAStep.apply)
ste.wrong(
    "clamp half a step further out",
    lambda x, s, t: (lambda i: i + (Q(x, s, t) - i).detach())(
        x.clamp(-(t + 0.5) * s, (t + 0.5) * s)
    ),
)
ste.wrong("a step further out", masked(lambda x, s, t: x.abs() <= (t + 1) * s))
ste.wrong("at twice the range", masked(lambda x, s, t: x.abs() < 2 * t * s))
ste.wrong("half a step in", masked(lambda x, s, t: x.abs() <= (t - 0.5) * s))
ste.wrong("a step in", masked(lambda x, s, t: x.abs() <= (t - 1) * s))
ste.wrong("|x| < 5", masked(lambda x, s, t: x.abs() < 5))
ste.wrong("± top", masked(lambda x, s, t: x.abs() <= t))
ste.wrong("± scale", masked(lambda x, s, t: x.abs() <= s))
ste.wrong("outside only", masked(lambda x, s, t: x.abs() > t * s))
ste.wrong("one side", masked(lambda x, s, t: x <= t * s))
ste.wrong(
    "zero where it rounds to zero",
    masked(lambda x, s, t: ((x / s).round() != 0) & (x.abs() <= t * s)),
)
ste.wrong("a soft edge", masked(lambda x, s, t: (1 - (x.abs() / (t * s)) ** 8).clamp(min=0)))
ste.wrong("1/scale", masked(lambda x, s, t: (x.abs() <= t * s) / s))
ste.wrong("times scale", masked(lambda x, s, t: (x.abs() <= t * s) * s))
ste.wrong("half", masked(lambda x, s, t: (x.abs() <= t * s) * 0.5))
ste.wrong("minus", masked(lambda x, s, t: -1.0 * (x.abs() <= t * s)))
ste.wrong("x", lambda x, s, t: x * 1)
ste.wrong("x, clamped", lambda x, s, t: x.clamp(-t * s, t * s))
ste.wrong("no clamp", lambda x, s, t: x + ((x / s).round() * s - x).detach())
ste.wrong("codes", lambda x, s, t: inside(x, s, t) / s)
ste.wrong(
    "floor",
    masked(lambda x, s, t: x.abs() <= t * s, lambda x, s, t: (x / s).floor().clamp(-t, t) * s),
)
ste.wrong(
    "trunc",
    masked(lambda x, s, t: x.abs() <= t * s, lambda x, s, t: (x / s).trunc().clamp(-t, t) * s),
)
ste.wrong(
    "−top − 1",
    masked(lambda x, s, t: x.abs() <= t * s, lambda x, s, t: (x / s).round().clamp(-t - 1, t) * s),
)
ste.wrong("top 3", lambda x, s, t: inside(x, s, 3))
ste.wrong("scale 0.4", lambda x, s, t: inside(x, 0.4, t))
ste.wrong("torch's", lambda x, s, t: torch.fake_quantize_per_tensor_affine(x, s, 0, -t, t))
ste.wrong(
    "the package's",
    lambda x, s, t: fake_quantize(
        x.reshape(1, -1), 3, "tensor", clip=min(1, t * s / float(x.detach().abs().max()))
    ).reshape(x.shape),
)
ste.wrong("a new leaf", lambda x, s, t: Q(x.detach(), s, t).requires_grad_())
ste.wrong("numpy", lambda x, s, t: Q(x.detach(), s, t).numpy())
ste.wrong(
    "rows only",
    lambda x, s, t: torch.stack([inside(v, s, t) for v in x[:]])[: len(x) if x.ndim == 1 else 1],
)


@ste.wrong("rounds the caller's x afterwards")
def _(x, s, t):
    answer = inside(x, s, t)
    x.data.round_()
    return answer


@ste.wrong("writes Q(x) into the caller's x")
def _(x, s, t):
    answer = inside(x, s, t)
    x.data.copy_(answer.data)
    return answer


@ste.wrong("leaves gradients off")
def _(x, s, t):
    torch.set_grad_enabled(False)
    return inside(x, s, t)


ste.right("as the solution", inside)
ste.right("a mask", masked(lambda x, s, t: x.abs() <= t * s))
ste.right("a strict mask", masked(lambda x, s, t: x.abs() < t * s))
ste.right("a function", Function.apply)
ste.right(
    "where",
    lambda x, s, t: torch.where(
        x.abs() <= t * s, x + (Q(x, s, t) - x).detach(), Q(x, s, t).detach()
    ),
)
ste.right(
    "hardtanh",
    lambda x, scale, top: (lambda y: y * scale + ((y.round() - y) * scale).detach())(
        F.hardtanh(x / scale, -top, top)
    ),
)
ste.right(
    "minimum and maximum",
    lambda x, s, t: (lambda i: i - (i - (i / s).round() * s).detach())(
        torch.minimum(torch.maximum(x, torch.tensor(-t * s)), torch.tensor(t * s))
    ),
)
ste.right("in 64 bits", lambda x, s, t: inside(x.double(), s, t))
ste.right("a hook that does nothing", lambda x, s, t: inside(x.clone(), s, t))


@ste.right("a hook")
def _(x, scale, top):
    y = x * 1
    y.register_hook(lambda g: g * (x.detach().abs() <= top * scale))
    return y + (Q(x, scale, top) - x).detach()


packed = Answers(check_pack_blocks)


def nibbles(codes, block, shift=8, fill=0, low=1, high=16, halves=lambda u: u.chunk(2, 1)):
    u = F.pad(codes.long(), (0, -len(codes) % block), value=fill).reshape(-1, block) + shift
    first, second = halves(u)
    return ((low * first + high * second) % 256).to(torch.uint8).flatten()


def with_(**parts):
    return lambda codes, block: nibbles(codes, block, **parts)


packed.wrong("the package's", lambda codes, block: pack(codes, 4))
packed.wrong(
    "the package's on filled blocks",
    lambda codes, block: pack(F.pad(codes, (0, -len(codes) % block)), 4),
)
packed.wrong(
    "the package's, codes one up",
    lambda codes, block: pack(F.pad(codes.long(), (0, -len(codes) % block)) + 1, 4),
)
packed.wrong("neighbours", with_(halves=lambda u: (u[:, ::2], u[:, 1::2])))
packed.wrong("exchanged", with_(low=16, high=1))
packed.wrong("7 added", with_(shift=7))
packed.wrong("9 added", with_(shift=9))
packed.wrong("nothing added", with_(shift=0))
packed.wrong("15 taken", with_(shift=-8))
packed.wrong(
    "two's complement, cut to 4 bits",
    lambda codes, block: nibbles(codes.long() % 16, block, shift=0),
)
packed.wrong("zero bits at the end", with_(fill=-8))
packed.wrong("filled with 8", with_(fill=8))
packed.wrong(
    "filled with the last",
    lambda codes, block: (
        nibbles(codes, block, fill=int(codes[-1]))
        if len(codes) % block
        else nibbles(codes, block)[:0]
    ),
)
packed.wrong("not filled", lambda codes, block: nibbles(codes, block)[: -(-len(codes) // 2)])
packed.wrong(
    "the last block is lost",
    lambda codes, block: nibbles(codes[: len(codes) // block * block], block),
)
packed.wrong("one block", lambda codes, block: nibbles(codes, len(codes) + -len(codes) % block))
packed.wrong("blocks of 8", lambda codes, block: nibbles(codes, 8))
packed.wrong("blocks of 32", lambda codes, block: nibbles(codes, 32))
packed.wrong(
    "half blocks",
    lambda codes, block: nibbles(F.pad(codes, (0, -len(codes) % block)), max(2, block // 2)),
)
packed.wrong(
    "filled at the front",
    lambda codes, block: nibbles(F.pad(codes, (-len(codes) % block, 0)), block),
)
packed.wrong(
    "halves reversed",
    with_(halves=lambda u: (u[:, : u.shape[1] // 2], u[:, u.shape[1] // 2 :].flip(1))),
)
packed.wrong(
    "the second half first",
    lambda codes, block: nibbles(codes, block, halves=lambda u: u.chunk(2, 1)[::-1]),
)
packed.wrong("a byte each", lambda codes, block: (codes + 8).to(torch.uint8))
packed.wrong("int16", lambda codes, block: nibbles(codes, block).to(torch.int16))
packed.wrong("int64", lambda codes, block: nibbles(codes, block).long())
packed.wrong("floats", lambda codes, block: nibbles(codes, block).float())
packed.wrong("bytes", lambda codes, block: bytes(nibbles(codes, block).tolist()))
packed.wrong("a list", lambda codes, block: nibbles(codes, block).tolist())
packed.wrong("[blocks, bytes]", lambda codes, block: nibbles(codes, block).reshape(-1, block // 2))
packed.wrong("17 for 16", with_(high=17))
packed.wrong("15 for 16", with_(high=15))


@packed.wrong("too large for int8")
def _(codes, block):
    u = F.pad(codes, (0, -len(codes) % block)).reshape(-1, block) + 8
    low, high = u.chunk(2, 1)
    return torch.clamp(low + (high * 8).clamp(max=127) * 2, 0, 255).to(torch.uint8).flatten()


@packed.wrong("adds to the caller's codes")
def _(codes, block):
    answer = nibbles(codes, block)
    codes += 8
    return answer


packed.right("as the solution", nibbles)
packed.right(
    "bit operations",
    lambda codes, block: (lambda u: (u[:, : block // 2] | (u[:, block // 2 :] << 4)).reshape(-1))(
        (F.pad(codes, (0, -len(codes) % block)) + 8).to(torch.uint8).reshape(-1, block)
    ),
)
packed.right("by name only", lambda *, codes, block: nibbles(codes, block))


@packed.right("a loop")
def _(codes, block):
    codes = codes.tolist() + [0] * (-len(codes) % block)
    found = []
    for start in range(0, len(codes), block):
        for j in range(start, start + block // 2):
            found.append(codes[j] + 8 + 16 * (codes[j + block // 2] + 8))
    return torch.tensor(found, dtype=torch.uint8)


@packed.right("numpy")
def _(codes, block):
    u = codes.numpy().astype(np.uint8) + np.uint8(8)
    u = np.concatenate([u, np.full(-len(u) % block, 8, np.uint8)]).reshape(-1, 2, block // 2)
    return (u[:, 0] | (u[:, 1] << 4)).ravel()


@packed.right("the package's, reordered")
def _(codes, block):
    filled = F.pad(codes.long(), (0, -len(codes) % block)).reshape(-1, 2, block // 2)
    return pack(filled.transpose(1, 2) + 1, 4)


@packed.right("strided")
def _(codes, block):
    u = F.pad(codes.int(), (0, -len(codes) % block)) + 8
    place = torch.arange(len(u)) % block
    return (u[place < block // 2] + 16 * u[place >= block // 2]).byte()


packed.equivalent("codes.int() → codes", "int8 wraps around at 127, and uint8 wraps it back")
