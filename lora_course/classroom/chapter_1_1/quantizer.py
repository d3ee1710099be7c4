"""Exercise 1.1-b: a quantiser for any codebook."""

import bitsandbytes as bnb
import torch

from lora_course.classroom.exercises import Draw, case, exercise
from lora_course.nf4 import nf4_codebook

dequantize, quantize = bnb.functional.dequantize_4bit, bnb.functional.quantize_4bit


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
    yield case(weight(8, 64, nf4, 64, zeros=True), nf4, 64, hint=hint)
    codes = codebook(4)
    yield case(weight(8, 12, codes, 12, zeros=True), codes, 12, hint=hint)
    codes = codebook(draw.integer(24, 40))
    hint = "With a codebook of more than sixteen entries it goes wrong."
    yield case(weight(8, 32, codes, 32), codes, 32, hint=hint)
    hint = "With small weights it goes wrong: what bounds a magnitude from below, or is added to it, changes them."
    yield case(1e-4 * weight(8, 64, nf4, 64), nf4, 64, hint=hint)
