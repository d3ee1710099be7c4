"""Graded problems of chapter 1.1, QLoRA: what a format takes, and what its rounding does."""

import torch

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _storage_cases(draw: Draw, choice: Choices) -> list[tuple]:
    shapes = [(3, 40, 16), (8, 64, 32)]
    for block in (32, 48, 64, 24):
        rows, columns = draw.integer(5, 40), draw.integer(block + 1, 40 * block)
        shapes += [(rows, columns, block), (rows, block * draw.integer(2, 9), block)]
    shapes += [(draw.integer(300, 900), draw.integer(2000, 4000), 64), (1, 7, 64)]
    return [(rows, columns, draw.choice((2, 3, 4)), block) for rows, columns, block in shapes]


storage = Family(
    id="1.1-storage",
    title="What a block format takes",
    points=3,
    minutes=15,
    statement="""
    A weight of `rows` times `columns` numbers is stored with `bits` bits a number and one constant for each block of
    `block` numbers. {blocks} {partial} {constants} {header} {unit}
    """,
    answer='''
    def stored(rows, columns, bits, block):
        """rows, columns, bits a number, numbers a block → what the weight takes, a whole number"""
        blocks = $blocks
        codes = bits * $partial
        bits_in_all = codes + $constants + $header
        return $unit
    ''',
    conventions={
        "blocks": {
            "flat": ("Blocks run over the whole weight, row after row.", "math.ceil(rows * columns / block)"),
            "rows": ("A block lies within one row: each row begins a new one.", "rows * math.ceil(columns / block)"),
            "columns": (
                "A block lies within one column: each column begins a new one.",
                "columns * math.ceil(rows / block)",
            ),
        },
        "partial": {
            "exact": ("An incomplete block stores the codes that it has.", "rows * columns"),
            "padded": ("An incomplete block is filled up, and stores `block` codes like any other.", "blocks * block"),
        },
        "constants": {
            "8+32/256": (
                "A constant takes 8 bits, and every 256 of them, the last incomplete group as well, share one of 32 bits.",
                "8 * blocks + 32 * math.ceil(blocks / 256)",
            ),
            "16": ("A constant takes 16 bits.", "16 * blocks"),
            "8+16/32": (
                "A constant takes 8 bits, and every 32 of them, the last incomplete group as well, share one of 16 bits.",
                "8 * blocks + 16 * math.ceil(blocks / 32)",
            ),
        },
        "header": {
            "mean": ("One mean of 32 bits is stored for the weight.", "32"),
            "row": ("Each row also stores a norm of 16 bits.", "16 * rows"),
        },
        "unit": {
            "bits": ("Return bits.", "bits_in_all"),
            "bytes": ("Return bytes; a last byte that is begun counts whole.", "math.ceil(bits_in_all / 8)"),
        },
    },
    book={"blocks": "flat", "partial": "exact", "constants": "8+32/256", "header": "mean", "unit": "bits"},
    cases=_storage_cases,
)  # fmt: skip


def _rounding_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [(draw.normal(2, 4), torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]), 4)]
    made.append((draw.normal(1, 6), torch.tensor([-1.0, 0.25, 1.0]), 4))
    for block in (3, 5, 8):
        rows, columns = draw.sizes(2, 4, 11)
        codes = torch.cat([draw.uniform(6) * 2 - 1, torch.tensor([-1.0, 1.0])]).unique()
        weight = draw.normal(rows, columns) * 10 ** (2 * draw.uniform(rows, 1) - 1)
        weight[draw.integer(0, rows - 1)] = 0
        made.append((weight, codes, block))
    # Multiples of a quarter lie exactly between two codes, and equal magnitudes have either sign.
    grid = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    for block in (4, 7, 2, 8, 5):
        ties = torch.randint(-4, 5, (5, 11), generator=draw.generator) / 4
        made.append((ties * 2.0, grid, block))
    return made


quantizer = Family(
    id="1.1-quantizer",
    title="A quantiser with its own rules",
    points=5,
    minutes=30,
    statement="""
    Quantise a weight `[out, in]` with any ascending codebook from −1 to 1, and return what is read back, of the weight's
    shape and type. The weight is read row after row and cut into blocks of `block` numbers. {partial} Each block is
    divided by its constant: {constant} Each quotient becomes the nearest entry of the codebook. {ties} Then it is
    multiplied by the constant again. {zeros}
    """,
    answer='''
    def read_back(weight, codebook, block):
        """weight [out, in], codebook [k] ascending, block → the weight [out, in] as it is read back"""
        flat = weight.flatten()
        count = len(flat)
        $partial
        blocks = flat.reshape(-1, block)
        constant = $constant
        scaled = blocks / torch.where(constant == 0, torch.ones_like(constant), constant)
        middles = (codebook[1:] + codebook[:-1]) / 2
        nearest = codebook[torch.bucketize(scaled, middles, right=$ties)]
        result = torch.where(constant == 0, torch.full_like(blocks, $zeros), nearest * constant)
        return $whole
    '''.replace("$whole", "torch.cat([result.flatten()[:count], rest]).reshape(weight.shape)"),
    conventions={
        "partial": {
            "pad": (
                "A last incomplete block is filled up with zeros, and cut again at the end.",
                "flat, rest = F.pad(flat, (0, -count % block)), flat[:0]",
            ),
            "keep": (
                "Numbers of a last incomplete block stay as they are.",
                "flat, rest = flat[: count - count % block], flat[count - count % block :]",
            ),
        },
        "constant": {
            "absmax": ("its largest magnitude.", "blocks.abs().amax(1, keepdim=True)"),
            "signed": (
                "its number of the largest magnitude, with its sign; of equal magnitudes the first.",
                "blocks.gather(1, blocks.abs().argmax(1, keepdim=True))",
            ),
            "mean": (
                "twice the mean of its magnitudes (larger ones are cut to the ends of the codebook, which “nearest” does).",
                "2 * blocks.abs().mean(1, keepdim=True)",
            ),
        },
        "ties": {
            "lower": ("Exactly in the middle, the lower entry is taken.", "False"),
            "upper": ("Exactly in the middle, the upper entry is taken.", "True"),
        },
        "zeros": {
            "zero": ("A block whose constant is 0 is read back as zeros.", "0.0"),
            "one": (
                "A block whose constant is 0 is divided and multiplied by 1 instead, so its zeros become the entry nearest to 0.",
                "float(codebook[(codebook.abs()).argmin()])",
            ),
        },
    },
    book={"partial": "none", "constant": "absmax", "ties": "lower", "zeros": "zero"},
    cases=_rounding_cases,
)  # fmt: skip

FAMILIES = [storage, quantizer]
