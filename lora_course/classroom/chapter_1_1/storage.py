"""Exercise 1.1-a: what a quantised weight takes."""

import math

import bitsandbytes as bnb

from lora_course.classroom.exercises import Draw, case, exercise

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
