"""Checks of the exercises in chapter 1.1, QLoRA."""

import math

import bitsandbytes as bnb
import torch
from torch import nn

from lora_course.classroom.exercises import Draw, case, exercise
from lora_course.lora import LoRALinear
from lora_course.nf4 import nf4_codebook

dequantize, quantize = bnb.functional.dequantize_4bit, bnb.functional.quantize_4bit


def storage(n, bits=4, block=64, *, constant=8, group=256, group_bits=32, mean=32, up=math.ceil):
    blocks = up(n / block)
    return bits * n + constant * blocks + group_bits * up(blocks / group) + mean


def _storage(**other):
    """The same with something else counted."""
    return lambda n, bits=4, block=64: storage(n, bits, block, **other)


STORAGE_MISTAKES = {
    "These are 32 bits a block: without double quantisation. Each block constant is an 8-bit code here.":
        _storage(constant=32, group_bits=0, mean=0),
    "Only the codes are counted; the blocks' constants are missing.": _storage(constant=0, group_bits=0, mean=0),
    "The 8-bit constants need something to decode them: a 32-bit constant for every 256 of them, and a 32-bit mean.":
        _storage(group_bits=0, mean=0),
    "The 32-bit mean, one for the whole weight, is missing.": _storage(mean=0),
    "The 32-bit constants, one for every 256 blocks, are missing.": _storage(group_bits=0),
    "Incomplete blocks and groups count as whole ones: round up.": _storage(up=math.floor),
    "Blocks and groups are fractions: incomplete ones count as whole ones.": _storage(up=lambda x: x),
    "The constants of the constants are for 256 of *them*, not for as many as a block has weights.":
        lambda n, bits=4, block=64: storage(n, bits, block, group=block),
    "`bits` is not used.": lambda n, bits=4, block=64: storage(n, 4, block),
    "`block` is not used.": lambda n, bits=4, block=64: storage(n, bits),
    "This is a number of bits a weight; the bits in all are asked for.":
        lambda n, bits=4, block=64: storage(n, bits, block) / n,
    "These are bytes; bits are asked for.": lambda n, bits=4, block=64: storage(n, bits, block) / 8,
    "The codes fill whole bytes; bits are to be counted.":
        lambda n, bits=4, block=64: storage(n, bits, block) - bits * n + 8 * math.ceil(bits * n / 8),
}  # fmt: skip


@exercise(
    "1.1-a",
    right=lambda n, bits=4, block=64: storage(n, bits, block),
    mistakes=STORAGE_MISTAKES,
    otherwise="Count the codes, 8 bits a block, 32 bits for 256 blocks, and 32 bits once.",
)
def check_storage(draw: Draw):
    """Bits of a doubly quantised weight."""
    yield case(64 * 256 * draw.integer(2, 20))
    for _ in range(3):
        bits, block = draw.choice([2, 3, 5, 8]), draw.choice([16, 32, 128, 256])
        blocks = 256 * draw.integer(1, 9)
        hint = "`bits` and `block` are arguments: with others than 4 and 64 it goes wrong."
        yield case(block * blocks, bits, block, hint=hint)
        yield case(
            block * (blocks + 3),
            bits,
            block,
            hint="An incomplete group of 256 constants counts as a whole one.",
        )
        yield case(
            block * blocks + 1,
            bits,
            block,
            hint="One weight more is a block more, and a group more.",
        )
        yield case(
            block * blocks - 5, bits, block, hint="An incomplete block counts as a whole one."
        )
    yield case(draw.integer(10**6, 10**7))
    yield case(
        draw.integer(65, 127),
        hint="A few weights make an incomplete block and an incomplete group.",
    )
    yield case(1, bits=3, hint="One weight has a block, a group and a mean of its own.")


def quantizer(weight, codebook, block=64, *, scale=None, nearest=None, back=True):
    blocks = weight.reshape(-1, block)
    absmax = blocks.abs().amax(1, keepdim=True) if scale is None else scale(blocks)
    scaled = blocks / absmax.clamp(min=1e-12)
    nearest = nearest or (lambda x, codes: codes[_index(x, codes)])
    return (nearest(scaled, codebook) * (absmax if back else 1)).reshape(weight.shape)


def _quantizer(**other):
    return lambda weight, codebook, block=64: quantizer(weight, codebook, block, **other)


def _index(x, codes):
    return torch.bucketize(x, (codes[1:] + codes[:-1]) / 2)


QUANTIZER_MISTAKES = {
    "One scale for the whole weight: rows with small weights lose all their detail. Use one a block.":
        _quantizer(scale=lambda blocks: blocks.abs().max().expand(len(blocks), 1)),
    "One scale a row of the weight; blocks are of `block` consecutive weights, wherever rows end.":
        lambda weight, codebook, block=64: quantizer(weight, codebook, weight.shape[1]),
    "You take the next lower code; the nearest may be the one above.":
        _quantizer(nearest=lambda x, c: c[(torch.bucketize(x, c, right=True) - 1).clamp(0, len(c) - 1)]),
    "You take the next higher code; the nearest may be the one below.":
        _quantizer(nearest=lambda x, c: c[torch.bucketize(x, c).clamp(0, len(c) - 1)]),
    "The result is still divided by the block's largest magnitude: multiply it back.": _quantizer(back=False),
    "You return the numbers of the codes; their values, times the block's largest magnitude, are asked for.":
        _quantizer(nearest=lambda x, c: _index(x, c).float(), back=False),
    "The largest weight is taken with its sign; the largest *magnitude* is meant.":
        _quantizer(scale=lambda blocks: blocks.amax(1, keepdim=True)),
    "`codebook` is not used: NF4 is only one of them.":
        lambda weight, codebook, block=64: quantizer(weight, nf4_codebook(), block),
    "`block` is not used.": lambda weight, codebook, block=64: quantizer(weight, codebook),
    "This is a grid of equal steps; the codebook's values are not equally far apart.":
        _quantizer(nearest=lambda x, c: ((x + 1) / 2 * (len(c) - 1)).round() / (len(c) - 1) * 2 - 1),
}  # fmt: skip


@exercise(
    "1.1-b",
    points=2,
    right=lambda weight, codebook, block=64: quantizer(weight, codebook, block),
    mistakes=QUANTIZER_MISTAKES,
    otherwise="Some weights are not rounded to the nearest entry of the codebook in their block.",
)
def check_quantizer(draw: Draw):
    """Blockwise rounding to a codebook. No weight lies halfway between two codes."""

    def weight(rows, columns, codes, block, zeros=False):
        drawn = draw.normal(rows, columns) * torch.logspace(-3, 1, rows)[draw.order(rows), None]
        blocks = drawn.reshape(-1, block)
        if zeros:
            blocks[draw.integer(0, len(blocks) - 1)] = 0
        blocks[draw.integer(0, len(blocks) - 1)].abs_().neg_()  # a block without a positive weight
        absmax = blocks.abs().amax(1, keepdim=True)
        scaled = blocks / absmax.clamp(min=1e-12)
        middles = (codes[1:] + codes[:-1]) / 2
        tie = ((scaled[..., None] - middles).abs() < 1e-3).any(-1)
        return torch.where(tie, codes[_index(scaled, codes)] * absmax, blocks).reshape(
            rows, columns
        )

    def codebook(size):
        inner = (draw.uniform(size - 2, low=-0.9, high=0.9)).sort().values
        return torch.cat([torch.tensor([-1.0]), inner, torch.tensor([1.0])])

    nf4 = nf4_codebook()
    yield case(weight(draw.integer(5, 30), 128, nf4, 64), nf4)
    for size, block, columns in (
        (3, 32, 64),
        (9, 16, 40),
        (5, 128, 64),
        (draw.integer(4, 12), 6, 9),
    ):
        codes = codebook(size)
        rows = 2 * draw.integer(3, 12)
        given = weight(rows, columns if rows * columns % block == 0 else block, codes, block)
        yield case(
            given, codes, block, hint="With another codebook and another block size it goes wrong."
        )
    hint = "With a block of zeros it goes wrong: its largest magnitude is 0, and 0 / 0 is not a number."
    yield case(weight(6, 64, nf4, 64, zeros=True), nf4, 64, hint=hint)
    codes = codebook(4)
    yield case(weight(8, 12, codes, 12, zeros=True), codes, 12, hint=hint)


def for_conv1d(layer):
    base = layer.base_layer
    dense = (
        dequantize(base.weight.data, base.weight.quant_state) + layer.scaling * layer.B @ layer.A
    )
    return dense.T, torch.zeros(len(dense)) if base.bias is None else base.bias


def _conv1d(update):
    """The right bias with another weight, [out, in], made of the dense base and the layer."""

    def answer(layer):
        base = layer.base_layer.weight
        return update(dequantize(base.data, base.quant_state), layer).T, for_conv1d(layer)[1]

    return answer


def _again(dense, layer):
    kind = layer.base_layer.weight.quant_state.quant_type
    return dequantize(
        *quantize((dense + layer.delta_weight()).detach(), blocksize=64, quant_type=kind)
    )


CONV1D_MISTAKES = {
    "This is the base alone: the adapter's update is missing.": _conv1d(lambda dense, layer: dense),
    "This is the update alone: the base is missing.": _conv1d(lambda dense, layer: layer.delta_weight()),
    "The scale is missing: the layer's update is scaling · B A.":
        _conv1d(lambda dense, layer: dense + layer.B @ layer.A),
    "You multiplied by α; the scale is what the layer keeps in `scaling`.":
        _conv1d(lambda dense, layer: dense + layer.lora_alpha * layer.B @ layer.A),
    "You divided α by r, which is not the scale under rsLoRA: the layer keeps it in `scaling`.":
        _conv1d(lambda dense, layer: dense + layer.lora_alpha / layer.r * layer.B @ layer.A),
    "The update is subtracted.": _conv1d(lambda dense, layer: dense - layer.delta_weight()),
    "You quantised the sum again: it is rounded to sixteen values a block. Return the dense sum.": _conv1d(_again),
    "The weight is [out, in]; a layer that computes x W + b has [in, out].":
        lambda layer: (for_conv1d(layer)[0].T, for_conv1d(layer)[1]),
    "The bias is in every row of the weight; it is no part of it.":
        _conv1d(lambda dense, layer: dense + layer.delta_weight() + for_conv1d(layer)[1][:, None]),
    "The bias is missing: it is the base layer's.":
        lambda layer: (for_conv1d(layer)[0], torch.zeros(layer.out_features)),
    "The bias is scaled; only the update has a scale.":
        lambda layer: (for_conv1d(layer)[0], layer.scaling * for_conv1d(layer)[1]),
}  # fmt: skip


@exercise(
    "1.1-c",
    points=2,
    right=for_conv1d,
    mistakes=CONV1D_MISTAKES,
    draws=True,
    otherwise="x W + b with your weight and bias is not what the layer computes.",
)
def check_conv1d(draw: Draw):
    """Dense weight and bias of a layer on a 4-bit base, for a runtime that stores weights [in, out]."""
    for arguments, bias, kind, hint in [
        ({}, True, "nf4", ""),
        ({}, True, "fp4", "With a base in FP4 it goes wrong: its `quant_state` knows the codes."),
        ({"use_rslora": True}, True, "nf4", "With an rsLoRA layer it goes wrong: see `scaling`."),
        ({}, False, "nf4", "With a base without a bias it goes wrong: b is zero then."),
        ({"lora_dropout": 0.5}, True, "nf4", "With dropout it goes wrong: it is not merged."),
    ]:
        inputs, outputs = (64 * n for n in draw.sizes(2, 1, 3))
        r = draw.integer(2, 6)
        base = bnb.nn.Linear4bit(
            inputs, outputs, bias=bias, compute_dtype=torch.float32, quant_type=kind,
            compress_statistics=draw.choice([True, False]),
        )  # fmt: skip
        state = {"weight": draw.normal(outputs, inputs, std=0.1)}
        base.load_state_dict(state | ({"bias": draw.normal(outputs)} if bias else {}))
        alpha = draw.choice([a for a in range(3, 20) if a not in (r, r * r)])
        layer = LoRALinear(base.to("cpu"), r=r, lora_alpha=alpha, **arguments)
        layer.A = nn.Parameter(draw.normal(r, inputs, std=0.2))
        layer.B = nn.Parameter(draw.normal(outputs, r, std=0.05))
        yield case(layer.train(draw.choice([True, False])), hint=hint)
