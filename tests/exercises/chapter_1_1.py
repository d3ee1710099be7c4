"""Wrong and right answers to the exercises of chapter 1.1."""

import copy
import math

import bitsandbytes as bnb
import numpy as np
import torch
from torch.nn import functional as F

from lora_course import qlora
from lora_course.classroom.chapter_1_1 import check_conv1d, check_quantizer, check_storage
from tests.exercises import Answers

storage = Answers(check_storage)


def up(a, b):
    return -(-a // b)


def bits_of(n, bits=4, block=64):
    return bits * n + 8 * up(n, block) + 32 * up(up(n, block), 256) + 32


storage.wrong("32 bits a block", lambda n, bits=4, block=64: bits * n + 32 * up(n, block))
storage.wrong("no constants", lambda n, bits=4, block=64: bits * n)
storage.wrong("8 bits a block only", lambda n, bits=4, block=64: bits * n + 8 * up(n, block))
storage.wrong("no mean", lambda *g, **k: bits_of(*g, **k) - 32)
storage.wrong(
    "a mean a group",
    lambda n, bits=4, block=64: bits * n + 8 * up(n, block) + 64 * up(up(n, block), 256),
)
storage.wrong("no groups", lambda n, bits=4, block=64: bits * n + 8 * up(n, block) + 32)
storage.wrong(
    "cut", lambda n, bits=4, block=64: bits * n + 8 * (n // block) + 32 * (n // block // 256) + 32
)
storage.wrong(
    "groups cut",
    lambda n, bits=4, block=64: bits * n + 8 * up(n, block) + 32 * (up(n, block) // 256) + 32,
)
storage.wrong(
    "blocks cut",
    lambda n, bits=4, block=64: bits * n + 8 * (n // block) + 32 * up(n // block, 256) + 32,
)
storage.wrong(
    "fractions", lambda n, bits=4, block=64: bits * n + 8 * n / block + 32 * n / block / 256 + 32
)
storage.wrong(
    "always one more",
    lambda n, bits=4, block=64: bits * n + 8 * (n // block + 1) + 32 * (n // block // 256 + 1) + 32,
)
storage.wrong(
    "groups of weights",
    lambda n, bits=4, block=64: bits * n + 8 * up(n, block) + 32 * up(n, 256) + 32,
)
storage.wrong(
    "groups of `block`",
    lambda n, bits=4, block=64: bits * n + 8 * up(n, block) + 32 * up(up(n, block), block) + 32,
)
storage.wrong("bits ignored", lambda n, bits=4, block=64: bits_of(n, 4, block))
storage.wrong("block ignored", lambda n, bits=4, block=64: bits_of(n, bits))
storage.wrong("bits a weight", lambda n, bits=4, block=64: bits_of(n, bits, block) / n)
storage.wrong("bytes", lambda *g, **k: bits_of(*g, **k) / 8)
storage.wrong("whole bytes", lambda n, bits=4, block=64: 8 * up(bits_of(n, bits, block), 8))
storage.wrong(
    "codes in whole bytes", lambda n, bits=4, block=64: 8 * up(bits * n, 8) + bits_of(n, 0, block)
)
storage.wrong(
    "constants of `bits`",
    lambda n, bits=4, block=64: bits * n + bits * up(n, block) + 32 * up(up(n, block), 256) + 32,
)
storage.wrong(
    "the package, which knows 4 bits only",
    lambda n, bits=4, block=64: round(qlora.storage_bits(n, block) * n),
)
storage.wrong(
    "rounded, not up",
    lambda n, bits=4, block=64: bits * n + 8 * round(n / block) + 32 * round(n / block / 256) + 32,
)
storage.wrong("a table", lambda n, bits=4, block=64: {163840: 676192}.get(n, 0))
storage.right("as the solution", bits_of)
storage.right(
    "ceil",
    lambda n, bits=4, block=64: (
        bits * n + 8 * math.ceil(n / block) + 32 * math.ceil(math.ceil(n / block) / 256) + 32
    ),
)
storage.right(
    "groups straight from n",
    lambda n, bits=4, block=64: bits * n + 8 * up(n, block) + 32 * up(n, 256 * block) + 32,
)
storage.right(
    "numpy",
    lambda n, bits=4, block=64: (
        np.int64(bits) * n + 8 * np.ceil(n / block) + 32 * np.ceil(np.ceil(n / block) / 256) + 32
    ),
)
storage.right("a float", lambda *g, **k: float(bits_of(*g, **k)))
storage.right("torch", lambda n, bits=4, block=64: torch.tensor(bits_of(n, bits, block)))
storage.right(
    "lengths of ranges",
    lambda n, bits=4, block=64: (
        bits * n + 8 * len(range(0, n, block)) + 32 * len(range(0, n, 256 * block)) + 32
    ),
)
storage.right("by name only", lambda *, n, bits=4, block=64: bits_of(n, bits, block))


quantizer = Answers(check_quantizer)


def blocks_of(weight, block):
    parts = weight.reshape(-1, block)
    return parts, parts.abs().amax(1, keepdim=True)


def nearest(scaled, codebook):
    return codebook[(scaled[..., None] - codebook).abs().argmin(-1)]


def rounded(weight, codebook, block=64, scale=None, choose=nearest, tiny=1e-12):
    parts, absmax = blocks_of(weight, block)
    absmax = scale(parts) if scale else absmax
    return (choose(parts / absmax.clamp(min=tiny), codebook) * absmax).reshape(weight.shape)


def quantizes(label, **other):
    quantizer.wrong(
        label, lambda weight, codebook, block=64: rounded(weight, codebook, block, **other)
    )


def lower(scaled, codebook):
    return codebook[(torch.bucketize(scaled, codebook, right=True) - 1).clamp(0, len(codebook) - 1)]


quantizes("one scale", scale=lambda b: b.abs().max().expand(len(b), 1))
quantizes("signed maximum", scale=lambda b: b.amax(1, keepdim=True))
quantizes("half the range", scale=lambda b: (b.amax(1, keepdim=True) - b.amin(1, keepdim=True)) / 2)
quantizes("mean magnitude", scale=lambda b: b.abs().mean(1, keepdim=True))
quantizes("standard deviation", scale=lambda b: b.std(1, keepdim=True))
quantizes("lower", choose=lower)
quantizes("higher", choose=lambda x, c: c[torch.bucketize(x, c).clamp(0, len(c) - 1)])
quantizes("farthest", choose=lambda x, c: c[(x[..., None] - c).abs().argmax(-1)])
quantizes(
    "equal steps", choose=lambda x, c: ((x + 1) / 2 * (len(c) - 1)).round() / (len(c) - 1) * 2 - 1
)
quantizes("the code's number", choose=lambda x, c: (x[..., None] - c).abs().argmin(-1))
quantizes(
    "nearest magnitude, sign kept",
    choose=lambda x, c: nearest(x.abs(), c.abs().unique()) * x.sign(),
)
quantizes("clamped at 0.1", tiny=0.1)
quantizes("clipped to the inner codes", choose=lambda x, c: nearest(x, c[1:-1]))
quantizer.wrong("per row", lambda w, c, block=64: rounded(w, c, w.shape[1]))
quantizer.wrong(
    "blocks down the columns", lambda w, c, block=64: rounded(w.T.contiguous(), c, block).T
)
quantizer.wrong("block ignored", lambda w, c, block=64: rounded(w, c))
quantizer.wrong("codebook ignored", lambda w, c, block=64: rounded(w, qlora.nf4_codebook(), block))
quantizer.wrong(
    "blocks, not reshaped", lambda w, c, block=64: rounded(w, c, block).reshape(-1, block)
)
quantizer.wrong(
    "not multiplied back",
    lambda w, c, block=64: nearest(
        blocks_of(w, block)[0] / blocks_of(w, block)[1].clamp(min=1e-12), c
    ).reshape(w.shape),
)
quantizer.wrong("not rounded", lambda w, c, block=64: w.clone())
quantizer.wrong(
    "the package's NF4",
    lambda w, c, block=64: qlora.dequantize_nf4(qlora.quantize_nf4(w, block, double_quant=False)),
)
quantizer.wrong(
    "zeros become the lowest code",
    lambda w, c, block=64: torch.where(w == 0, c[0] * 1e-3, rounded(w, c, block)),
)


@quantizer.wrong("scales the caller's weight")
def _(weight, codebook, block=64):
    answer = rounded(weight, codebook, block)
    weight.div_(weight.abs().max())
    return answer


@quantizer.wrong("fills the caller's zeros")
def _(weight, codebook, block=64):
    answer = rounded(weight, codebook, block)
    weight[weight == 0] = 1e-12
    return answer


@quantizer.wrong("sorts the caller's codebook")
def _(weight, codebook, block=64):
    answer = rounded(weight, codebook, block)
    codebook.copy_(codebook.flip(0))
    return answer


quantizer.right("as the solution", rounded)
quantizer.right(
    "not clamped: some code times 0", lambda w, c, block=64: rounded(w, c, block, tiny=0.0)
)
quantizer.wrong(
    "not clamped, and the NaN is kept",
    lambda w, c, block=64: rounded(
        w, c, block, choose=lambda x, c: nearest(x, c) + 0 * x, tiny=0.0
    ),
)
quantizer.equivalent(
    "absmax.clamp(min=1e-12) → absmax", "a block of zeros is some code times 0 then, which is 0"
)
quantizer.equivalent("absmax.clamp(min=1e-12) → absmax.clamp(min=0.0)", "as without the clamp")
quantizer.equivalent(
    "(scaled[..., None] - codebook).abs → (scaled[..., None] - codebook).square",
    "has the same smallest",
)
quantizer.equivalent(
    "scaled[..., None] - codebook → codebook - scaled[..., None]", "has the same magnitude"
)
quantizer.right(
    "thresholds",
    lambda w, c, block=64: rounded(
        w, c, block, choose=lambda x, c: c[torch.bucketize(x, (c[1:] + c[:-1]) / 2)]
    ),
)
quantizer.right("in 64 bits", lambda w, c, block=64: rounded(w.double(), c.double(), block))
quantizer.right("cut to 16 bits", lambda w, c, block=64: rounded(w, c, block).bfloat16())


@quantizer.right("block by block, zeros skipped")
def _(weight, codebook, block=64):
    out = weight.clone().flatten()
    for i in range(0, len(out), block):
        part = out[i : i + block]
        if part.any():
            out[i : i + block] = nearest(part / part.abs().max(), codebook) * part.abs().max()
    return out.view_as(weight)


@quantizer.right("numpy")
def _(weight, codebook, block=64):
    parts, codes = weight.numpy().reshape(-1, block), codebook.numpy()
    absmax = np.abs(parts).max(1, keepdims=True)
    absmax_or_one = np.where(absmax == 0, 1, absmax)
    index = np.abs((parts / absmax_or_one)[..., None] - codes).argmin(-1)
    return (codes[index] * absmax).reshape(weight.shape)


@quantizer.right("scaled codebook, cdist")
def _(weight, codebook, block=64):
    parts, absmax = blocks_of(weight, block)
    values = codebook * absmax
    index = torch.stack(
        [(p[:, None] - v).abs().argmin(1) for p, v in zip(parts, values, strict=True)]
    )
    return values.gather(1, index).reshape(weight.shape)


@quantizer.right("python lists")
def _(weight, codebook, block=64):
    flat, codes, out = weight.flatten().tolist(), codebook.tolist(), []
    for i in range(0, len(flat), block):
        part = flat[i : i + block]
        top = max(map(abs, part))
        out += [top * min(codes, key=lambda c, x=x: abs(x - c * top)) if top else 0.0 for x in part]
    return [out[i : i + weight.shape[1]] for i in range(0, len(out), weight.shape[1])]


quantizes("clamped at 1e-4", tiny=1e-4)
quantizes("the first sixteen codes", choose=lambda x, c: nearest(x, c[:16]))
quantizer.right(
    "levels of each block, nothing divided",
    lambda w, c, block=64: (
        (levels := blocks_of(w, block)[1] * c)
        .gather(1, (blocks_of(w, block)[0][..., None] - levels[:, None]).abs().argmin(-1))
        .view_as(w)
    ),
)


conv1d = Answers(check_conv1d)
dequantize = bnb.functional.dequantize_4bit


def base_of(layer):
    return dequantize(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)


def bias_of(layer):
    return (
        torch.zeros(layer.out_features) if layer.base_layer.bias is None else layer.base_layer.bias
    )


def dense(layer):
    return base_of(layer) + layer.delta_weight()


def requantised(layer):
    kind = layer.base_layer.weight.quant_state.quant_type
    return dequantize(
        *bnb.functional.quantize_4bit(dense(layer).detach(), blocksize=64, quant_type=kind)
    )


conv1d.wrong("base alone", lambda layer: (base_of(layer).T, bias_of(layer)))
conv1d.wrong("update alone", lambda layer: (layer.delta_weight().T, bias_of(layer)))
conv1d.wrong("no scale", lambda layer: ((base_of(layer) + layer.B @ layer.A).T, bias_of(layer)))
conv1d.wrong(
    "α", lambda layer: ((base_of(layer) + layer.lora_alpha * layer.B @ layer.A).T, bias_of(layer))
)
conv1d.wrong(
    "α / r under rsLoRA",
    lambda layer: (
        (base_of(layer) + layer.lora_alpha / layer.r * layer.B @ layer.A).T,
        bias_of(layer),
    ),
)
conv1d.wrong("subtracts", lambda layer: ((base_of(layer) - layer.delta_weight()).T, bias_of(layer)))
conv1d.wrong("quantised again", lambda layer: (requantised(layer).T, bias_of(layer)))
conv1d.wrong("not transposed", lambda layer: (dense(layer), bias_of(layer)))
conv1d.wrong(
    "reshaped, not transposed",
    lambda layer: (dense(layer).reshape(layer.in_features, -1), bias_of(layer)),
)
conv1d.wrong("no bias", lambda layer: (dense(layer).T, torch.zeros(layer.out_features)))
conv1d.wrong("None for no bias", lambda layer: (dense(layer).T, layer.base_layer.bias))
conv1d.wrong(
    "bias in the weight", lambda layer: ((dense(layer) + bias_of(layer)[:, None]).T, bias_of(layer))
)
conv1d.wrong("bias scaled", lambda layer: (dense(layer).T, layer.scaling * bias_of(layer)))
conv1d.wrong("the weight only", lambda layer: dense(layer).T)
conv1d.wrong("order exchanged", lambda layer: (bias_of(layer), dense(layer).T))
conv1d.wrong("packed weight", lambda layer: (layer.base_layer.weight.data, bias_of(layer)))
conv1d.wrong(
    "update transposed back",
    lambda layer: (
        base_of(layer).T + layer.scaling * (layer.A.T @ layer.B.T).flip(0),
        bias_of(layer),
    ),
)
conv1d.wrong(
    "in 8 bits' worth",
    lambda layer: (
        (dense(layer) * 127 / dense(layer).abs().max()).round().T / 127 * dense(layer).abs().max(),
        bias_of(layer),
    ),
)
conv1d.wrong("scale 2", lambda layer: ((base_of(layer) + 2 * layer.B @ layer.A).T, bias_of(layer)))
conv1d.wrong("an nn.Linear", lambda layer: torch.nn.Linear(layer.in_features, layer.out_features))


@conv1d.wrong("quantise type written in")
def _(layer):
    state = copy.copy(layer.base_layer.weight.quant_state)
    state.code = bnb.functional.get_4bit_type("nf4", device="cpu")
    state.quant_type = "nf4"
    return (dequantize(layer.base_layer.weight.data, state) + layer.delta_weight()).T, bias_of(
        layer
    )


@conv1d.wrong("unit vectors through a layer that drops")
def _(layer):
    layer = copy.deepcopy(layer).train()
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)) - bias_of(layer), bias_of(layer)


@conv1d.wrong("leaves the layer in eval mode")
def _(layer):
    layer.eval()
    return dense(layer).T, bias_of(layer)


@conv1d.wrong("replaces the layer's base")
def _(layer):
    answer = dense(layer).T, bias_of(layer)
    layer.base_layer = torch.nn.Linear(layer.in_features, layer.out_features)
    return answer


@conv1d.wrong("unpacks the layer's own weight")
def _(layer):
    answer = dense(layer).T, bias_of(layer)
    layer.base_layer.weight.data = base_of(layer)
    return answer


@conv1d.wrong("scales the layer's A")
def _(layer):
    layer.A.data.mul_(layer.scaling)
    return (base_of(layer) + layer.B @ layer.A).T, bias_of(layer)


conv1d.right("as the solution", lambda layer: (dense(layer).T, bias_of(layer)))
conv1d.right(
    "a list, detached",
    lambda layer: [dense(layer).detach().T.contiguous(), bias_of(layer).detach().clone()],
)
conv1d.right(
    "numpy", lambda layer: (dense(layer).detach().numpy().T, bias_of(layer).detach().numpy())
)
conv1d.right("in 64 bits", lambda layer: (dense(layer).double().T, bias_of(layer).double()))


@conv1d.right("unit vectors, eval")
def _(layer):
    layer = copy.deepcopy(layer).eval()
    with torch.no_grad():
        b = layer(torch.zeros(1, layer.in_features))[0]
        return layer(torch.eye(layer.in_features)) - b, b


@conv1d.right("the package on a copy, then transposed")
def _(layer):
    plain = qlora.dequantize_model(torch.nn.Sequential(copy.deepcopy(layer)))[0]
    plain.merge()
    return plain.base_layer.weight.T, bias_of(plain)


@conv1d.right("rank by rank")
def _(layer):
    W = base_of(layer).T.clone()
    for a, b in zip(layer.A.detach(), layer.B.detach().T, strict=True):
        W += layer.scaling * torch.outer(a, b)
    return W, bias_of(layer)


@conv1d.right("linear on the identity")
def _(layer):
    return F.linear(torch.eye(layer.in_features), dense(layer)), bias_of(layer)


def asked(layer):
    with torch.no_grad():
        bias = layer(torch.zeros(1, layer.in_features))[0]
        return layer(torch.eye(layer.in_features)) - bias, bias


conv1d.wrong("asked with the identity, dropout on", asked)
conv1d.wrong("asked in eval, then trained", lambda layer: (asked(layer.eval()), layer.train())[0])
conv1d.right("a copy in eval, asked", lambda layer: asked(copy.deepcopy(layer).eval()))
