"""NF4, the 4-bit number format of QLoRA, in plain torch (arXiv 2305.14314).

    w ≈ codebook[code] · c,      c: one constant for each block of 64 weights, itself an 8-bit code if doubly quantised

It is there to be read: its codes and constants equal those of bitsandbytes' CPU backend bit for bit.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

OFFSET = 0.9677083
"""The outermost quantile: 1 − ½ (1/32 + 1/30), so that the end codes stand for the middle of their share of the tail."""
NESTED_BLOCK = 256
"""How many block constants share one constant in double quantisation."""
SMALLEST_CONSTANT = 1e-38
"""Stands in for the constant of a block of zeros, by which nothing could be divided."""


def nf4_codebook() -> Tensor:
    """The 16 values of NF4, `[16]` fp32, ascending: quantiles of N(0, 1) divided by the largest.

    Eight positive and seven negative quantiles at equally spaced probabilities from `OFFSET` to ½, and an exact zero.
    Each code then stands for about the same share of normally distributed weights.

    Equal to bitsandbytes' literal table in every bit, which takes its rounding: probabilities in fp32, quantiles in
    float64 rounded to fp32, division in fp32. In float64 throughout, 10 of the 16 differ, by 1.1e-7 at most.
    """

    def quantiles(count: int) -> Tensor:
        probabilities = torch.linspace(OFFSET, 0.5, count + 1)[:-1]
        return torch.special.ndtri(probabilities.double()).float()

    codes = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8)]).sort().values
    return codes / codes.max()


def dynamic_codebook() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, `[256]` fp32, ascending (arXiv 1511.04561).

    Each decade from 10⁻⁷–10⁻⁶ up to 0.1–1 is cut into 1, 2, 4, … 64 equal parts, of which the middles are taken: the
    larger the value, the more exact. With both signs, 0 and 1 that makes 2 · 127 + 2. There is no −1.
    """
    positive: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive += (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    return torch.tensor(sorted([-value for value in positive] + [0.0, 1.0] + positive))


@dataclasses.dataclass(frozen=True)
class NF4Weight:
    """A weight of n numbers in NF4; made by `quantize_nf4`.

    Attributes:
        codes: `[⌈n/2⌉, 1]` uint8, two codes a byte, the first in the high half.
        absmax: one constant a block, `[⌈n/block_size⌉]`: fp32, or uint8 codes if doubly quantised.
        nested_absmax: `[⌈blocks/256⌉]` fp32, and `offset`, an fp32 scalar, decode `absmax`; both None without.
        shape, dtype: of the weight that was quantised.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept a weight; the two codebooks are shared by all weights and not counted."""
        return sum(
            t.nbytes
            for t in (self.codes, self.absmax, self.nested_absmax, self.offset)
            if t is not None
        )


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise blocks of `block_size` consecutive weights: divide by their largest magnitude, take the nearest code.

    On a tie the lower code is taken. Without double quantisation no weight is off by more than 0.1519 of its block's
    constant: half the widest gap, between −1 and −0.696.

    Raises:
        TypeError: not fp32, fp16 or bf16.    ValueError: an empty weight, an infinite or missing number in it.
    """
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"weight is {weight.dtype}: float32, float16 or bfloat16 is expected.")
    if weight.numel() == 0 or not torch.isfinite(weight).all():
        raise ValueError(
            f"weight {list(weight.shape)} is empty or holds inf or nan: its blocks would have no finite constant."
        )
    if block_size < 1:
        raise ValueError(
            f"block_size={block_size}: a whole number of 1 or more is expected; bitsandbytes uses 64."
        )
    values, codebook = weight.detach().cpu().flatten().float(), nf4_codebook()
    whole = values.numel() // block_size * block_size
    blocks, rest = values[:whole].view(-1, block_size), values[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST_CONSTANT))[:, None]).flatten()
    if len(rest):
        # bitsandbytes multiplies whole blocks by the reciprocal and divides the last one: not the same in the last bit.
        last = rest.abs().max().clamp(min=SMALLEST_CONSTANT)
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, rest / last])
    codes = torch.bucketize(scaled.clamp(-1, 1), (codebook[:-1] + codebook[1:]) / 2).to(torch.uint8)
    if len(codes) % 2:
        codes = torch.cat(
            [codes, torch.tensor([7], dtype=torch.uint8)]
        )  # the code of zero fills the last byte
    packed = (codes[::2] << 4 | codes[1::2])[:, None]
    nested, offset = None, None
    if double_quant:
        absmax, nested, offset = quantize_constants(absmax)
    return NF4Weight(packed, absmax, nested, offset, weight.shape, weight.dtype, block_size)


def quantize_constants(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: 8-bit codes `[blocks]`, their constants `[⌈blocks/256⌉]`, and the mean subtracted first.

    The constants are all positive; less their mean they use both halves of the signed type.
    bitsandbytes' CPU kernel reads the code out of a table of 65,536 entries, so a value is rounded to that grid before
    the nearest code is taken: of the codes below 1.5e-5 it never uses any, and 0 becomes 2.1e-5. Its GPU kernels search.
    """
    codebook = dynamic_codebook()
    grid = -1 + 2 * torch.arange(65536) / 65535
    table = torch.bucketize(grid, (codebook[:-1] + codebook[1:]) / 2).to(torch.uint8)
    offset = absmax.mean()
    centred = absmax - offset
    blocks = nn.functional.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = (
        (blocks * (1 / nested)[:, None]).nan_to_num(-1.0).clamp(-1, 1)
    )  # 0 · 1/0: such a block gets code 0
    codes = table[((scaled + 1) * 0.5 * 65535 + 0.5).long()]
    return codes.flatten()[: len(absmax)], nested, offset


def dequantize_nf4(q: NF4Weight) -> Tensor:
    """The weight that the layer computes with, in the shape and dtype of the one that was quantised."""
    absmax = q.absmax
    if q.nested_absmax is not None and q.offset is not None:
        constants = q.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(absmax)]
        absmax = dynamic_codebook()[absmax.long()] * constants + q.offset
    n = q.shape.numel()
    codes = torch.stack([q.codes >> 4, q.codes & 15], dim=-1).flatten()[:n]
    return (
        (nf4_codebook()[codes.long()] * absmax.repeat_interleave(q.block_size)[:n])
        .to(q.dtype)
        .view(q.shape)
    )


def storage_bits(n: int, block_size: int = 64, double_quant: bool = True) -> float:
    """Bits a weight that `n` weights take in NF4, everything counted but the codebooks.

    With n a multiple of the block: 4 + 32/64 = 4.5, or, doubly quantised, 4 + 8/64 + 32 (⌈⌈n/64⌉/256⌉ + 1)/n → 4.127.
    """
    if n < 1 or block_size < 1:
        raise ValueError(f"n={n}, block_size={block_size}: both must be 1 or more.")
    blocks = -(-n // block_size)
    constants = 8 * blocks + 32 * (-(-blocks // NESTED_BLOCK) + 1) if double_quant else 32 * blocks
    return (8 * -(-n // 2) + constants) / n
