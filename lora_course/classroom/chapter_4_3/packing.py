"""Exercise 4.3-c: two codes a byte."""

import torch
from torch import Tensor

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def pack_blocks(codes, block, *, shift=8, fill=0, swap=False, pairs=None):
    """Bytes of 4-bit codes, block by block, with each of its parts exchangeable for a mistake."""
    filled = torch.nn.functional.pad(codes.long(), (0, -len(codes) % block), value=fill)
    unsigned = (filled + shift).reshape(-1, block)
    first, second = pairs(unsigned) if pairs else unsigned.chunk(2, 1)
    first, second = (second, first) if swap else (first, second)
    return ((first + 16 * second) % 256).to(torch.uint8).flatten()


def _packed(**other):
    return lambda codes, block: pack_blocks(codes, block, **other)


def _use_bytes(found, codes, block):
    tensor = as_tensor(found)
    mistake(
        tensor is None or tensor.ndim != 1,
        "One row of bytes is expected, a tensor with one dimension.",
    )
    mistake(
        len(tensor) == len(codes) > 1 and int(tensor.max()) < 16,
        "{0} codes take {0} bytes: nothing is packed. Two go into each byte.", len(codes),
    )  # fmt: skip
    mistake(
        tensor.dtype != torch.uint8,
        "uint8 is expected, not {}: other types take more bytes, or have a sign.",
        str(tensor.dtype).removeprefix("torch."),
    )
    expected = -(-len(codes) // block) * block // 2
    mistake(
        len(tensor) != expected,
        "{} codes in blocks of {} take {} bytes, as the last block is filled up; yours are {}.",
        len(codes), block, expected, len(tensor),
    )  # fmt: skip
    return tensor.long()


def _by_columns(unsigned: Tensor):
    return unsigned.T.reshape(unsigned.shape).chunk(2, 1)


PACK_MISTAKES = {
    "Neighbours share a byte; here a code shares it with the one half a block further on.":
        _packed(pairs=lambda u: (u[:, ::2], u[:, 1::2])),
    "The first half of the block is in the upper halves of the bytes; the lower ones are asked for.": _packed(swap=True),
    "7 is added, as in the package; here the codes go from −8 to 7, and 8 is added.": _packed(shift=7, fill=1),
    "Nothing is added: negative codes spill over into the other half. Add 8 first, so that they run from 0 to 15.":
        _packed(shift=0),
    "The last block is filled up with zero bits; it is to be filled with the code 0, which is the bits of 8.": _packed(fill=-8),
    "The halves are those of the whole row; each block is packed by itself.":
        lambda codes, block: pack_blocks(codes, len(codes) + -len(codes) % block),
    "`block` is not used.": lambda codes, block: pack_blocks(codes, 32)[: -(-len(codes) // block) * block // 2],
    "Codes of one place in all blocks are put together.": _packed(pairs=_by_columns),
}  # fmt: skip


@exercise(
    "4.3-c",
    points=2,
    right=lambda codes, block: pack_blocks(codes, block),
    look=_use_bytes,
    mistakes=PACK_MISTAKES,
    otherwise="These are not the codes + 8, the first half of each block in the lower halves of its bytes.",
)
def check_pack_blocks(draw: Draw):
    """Two codes a byte in the layout of a runtime."""
    for block, length, kind, hint in [
        (8, 8, torch.int64, ""),
        (8, 24, torch.int64, "With several blocks it goes wrong."),
        (
            2 * draw.integer(5, 8),
            40,
            torch.int16,
            "Where the last block is not full it goes wrong.",
        ),
        (32, draw.integer(17, 30), torch.int16, "With fewer codes than a block has it goes wrong."),
        (6, draw.choice([13, 15, 17]), torch.int64, "With an odd number of codes it goes wrong."),
        (2, draw.integer(7, 12), torch.int64, "With blocks of two it goes wrong."),
        (8, 32, torch.int8, "With codes of type int8 it goes wrong: 8 + 7 and 16 · 15 need room."),
    ]:
        codes = torch.tensor([draw.integer(-8, 7) for _ in range(length)])
        codes[draw.order(length)[:2]] = torch.tensor([-8, 7])
        yield case(codes.to(kind), block, hint=hint)
