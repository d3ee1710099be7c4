"""The grid that factors are rounded to, and integers packed into bytes.

    Q(w) = Δ · clamp(round(w / Δ), −q, q),     q = 2^(bits−1) − 1,   Δ = clip · max|w| / q

Δ is one for a whole factor, for each of its rows, or for each group of numbers in a row.
"""

from __future__ import annotations

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

GRANULARITIES = ("tensor", "channel", "group")


def quantize(
    x: Tensor, bits: int, granularity: str = "group", group_size: int = 64, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The integers and scales of Q(x): |x − codes · scale| ≤ scale / 2 for every number, if `clip` is 1.

    Args:
        x: `[rows, length]`, finite.
        bits: 2 to 16. At 2 bits the codes are −1, 0 and 1.
        granularity: "tensor": one scale. "channel": one a row. "group": one for each `group_size` numbers of a row, in
            order; the last group of a row may be shorter.
        group_size: at least 1; not read otherwise.
        clip: in (0, 1]. Below 1 the grid ends at clip · max|x|: the largest numbers are cut, the others get a finer step.

    Returns:
        `codes`, int16, of x's shape, −q … q; `scale`, fp32, `[scales]`, > 0 even where all of x is zero. It has 16
        significant bits, so that up to 8 bits codes · scale is exact in fp32, and quantising that gives the same again.

    Raises:
        ValueError: an argument outside its range.
    """
    check_grid(bits, granularity, group_size, clip)
    if bits == 32:
        raise ValueError(
            "bits=32 stands for a factor that is not quantised: it has no codes. Give 2 to 16."
        )
    _check_matrix(x)
    if not bool(x.isfinite().all()):
        raise ValueError(
            "x holds NaN or infinite numbers, which no grid has: its training diverged."
        )
    codes, scale = round_to_grid(x, bits, granularity, group_size, clip)
    return ungrouped(codes.clamp(-largest_code(bits), largest_code(bits)), x.shape).to(
        torch.int16
    ), scale.flatten()


def dequantize(
    codes: Tensor, scale: Tensor, granularity: str = "group", group_size: int = 64
) -> Tensor:
    """codes · scale, fp32, of the codes' shape: the values that `fake_quantize` gives with the same arguments."""
    return ungrouped(grouped(codes.float(), granularity, group_size) * scale[:, None], codes.shape)


def fake_quantize(
    x: Tensor, bits: int, granularity: str = "group", group_size: int = 64, clip: float = 1.0
) -> Tensor:
    """Q(x), `[rows, length]`, in x's type, with a straight-through gradient: 1 inside the range, 0 for what was cut.

    Arguments and errors are those of `quantize`; 32 bits give back x itself. With `clip` 1 nothing is cut. The scale counts
    as a constant in the backward pass. Q(Q(x)) = Q(x), bit for bit, with `clip` 1 and up to 8 bits.
    """
    check_grid(bits, granularity, group_size, clip)
    if x.ndim == 2 and not len(x):  # a layer of rank 0
        return x
    _check_matrix(x)
    return x if bits == 32 else FakeQuantize.apply(x, bits, granularity, group_size, clip)


class FakeQuantize(torch.autograd.Function):
    """One function, not x + (Q(x) − x).detach(): the gradient of that sum is 1 for what was cut, too."""

    @staticmethod
    def forward(
        ctx, x: Tensor, bits: int, granularity: str, group_size: int, clip: float
    ) -> Tensor:
        codes, scale = round_to_grid(x, bits, granularity, group_size, clip)
        if clip < 1:
            ctx.save_for_backward(ungrouped(codes.abs() <= largest_code(bits), x.shape))
            codes.clamp_(-largest_code(bits), largest_code(bits))
        return ungrouped(codes.mul_(scale), x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (
            gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient,
            None,
            None,
            None,
            None,
        )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers of −q … q as one stream of `bits` bits each, lowest bit first: uint8, ⌈numbers · bits / 8⌉ bytes."""
    unsigned = codes.flatten().int() + largest_code(bits)
    stream = (unsigned[:, None] >> torch.arange(bits, device=codes.device)) & 1
    stream = F.pad(stream.flatten(), (0, -stream.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The integers that `pack` was given, int16, in `shape`. Raises ValueError if there are too few or too many bytes."""
    numbers = torch.Size(shape).numel()
    if packed.numel() != -(-numbers * bits // 8):
        raise ValueError(
            f"{packed.numel()} bytes are no {numbers} numbers of {bits} bits: {-(-numbers * bits // 8)} are expected."
        )
    stream = (packed[:, None].int() >> torch.arange(8, device=packed.device)) & 1
    unsigned = (
        stream.flatten()[: numbers * bits].reshape(numbers, bits)
        << torch.arange(bits, device=packed.device)
    ).sum(1)
    return (unsigned - largest_code(bits)).to(torch.int16).reshape(shape)


def _check_matrix(x: Tensor) -> None:
    if x.ndim != 2 or not x.numel() or not x.is_floating_point():
        raise ValueError(
            f"x is {list(x.shape)} of {x.dtype}: a matrix [rows, length] of floating-point numbers is expected."
        )


def check_grid(bits: int, granularity: str, group_size: int, clip: float) -> None:
    """Raise ValueError, in one sentence, unless the arguments of `fake_quantize` make a grid."""
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in (*range(2, 17), 32):
        hint = " (a symmetric range of 1 bit holds nothing but 0)" if bits == 1 else ""
        raise ValueError(
            f"bits={bits!r}{hint}: a whole number from 2 to 16 is expected, or 32 for a factor that is not quantised."
        )
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity={granularity!r}: one of {', '.join(GRANULARITIES)} is expected."
        )
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(
            f"group_size={group_size!r}: how many numbers share a scale, 1 or more, is expected; 64 is usual."
        )
    if not isinstance(clip, numbers.Real) or not 0 < clip <= 1:
        raise ValueError(
            f"clip={clip!r}: the part of the largest number at which the grid ends, in (0, 1], is expected; 1 cuts nothing."
        )


def largest_code(bits: int) -> int:
    """q, the largest code."""
    return 2 ** (bits - 1) - 1


def round_to_grid(
    x: Tensor, bits: int, granularity: str, group_size: int, clip: float
) -> tuple[Tensor, Tensor]:
    """round(x / Δ) `[scales, numbers]`, not yet cut to the range, and Δ `[scales, 1]`; both fp32, NaN where x is not finite."""
    groups = grouped(x.float(), granularity, group_size)
    scale = (groups.abs().amax(1, keepdim=True) * clip / largest_code(bits)).clamp_(
        min=torch.finfo(torch.float32).tiny
    )
    scale = (scale.view(torch.int32) + 0xFF & ~0xFF).view(
        torch.float32
    )  # 16 bits, rounded up: with clip 1 no number is outside
    return (groups / scale).round_(), scale


def grouped(x: Tensor, granularity: str, group_size: int) -> Tensor:
    """`[rows, length]` → `[scales, numbers that share a scale]`, the last group of a row filled up with zeros."""
    if granularity == "tensor":
        return x.reshape(1, -1)
    size = x.shape[1] if granularity == "channel" else min(group_size, x.shape[1])
    missing = -x.shape[1] % size
    return (F.pad(x, (0, missing)) if missing else x).reshape(-1, size)


def ungrouped(groups: Tensor, shape: torch.Size) -> Tensor:
    return groups.reshape(shape[0], -1)[:, : shape[1]]
