"""The exercises of chapter 4.3: plausible wrong answers are rejected, each with its own message; right ones pass."""

import torch
import torch.nn.functional as F

from lora_course.classroom.chapter_4_3 import check_pack, check_quantize, check_straight_through
from lora_course.quantized import pack, quantize
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)

TINY = 1e-30


def by_scale(x, scale, top, rounding=torch.round):
    return rounding(x / scale).clamp(-top, top), scale


def symmetric(x, bits):
    top = 2 ** (bits - 1) - 1
    return by_scale(x, (x.abs().max() / top).clamp(min=TINY), top)


def the_notes(x, bits):
    scale = x.abs().max() / (2 ** (bits - 1) - 1)
    return torch.round(x / scale), scale


def truncated(x, bits):
    return by_scale(
        x, (x.abs().max() / (2 ** (bits - 1) - 1)).clamp(min=TINY), 2 ** (bits - 1) - 1, torch.trunc
    )


def largest(x, bits):
    return by_scale(x, (x.max() / (2 ** (bits - 1) - 1)).clamp(min=TINY), 2 ** (bits - 1) - 1)


def one_too_many(x, bits):
    return by_scale(x, (x.abs().max() / 2 ** (bits - 1)).clamp(min=TINY), 2 ** (bits - 1) - 1)


def all_patterns(x, bits):
    return by_scale(x, (2 * x.abs().max() / (2**bits - 1)).clamp(min=TINY), 2**bits)


def asymmetric(x, bits):
    if not x.any():
        return torch.ones_like(x), 1.0
    return symmetric(x, bits)


def packages(x, bits):
    codes, scale = quantize(x, bits, "tensor")
    return codes, scale


def with_a_branch(x, bits):
    if not x.any():
        return torch.zeros_like(x, dtype=torch.int8), 1.0
    scale = x.abs().max().item() / (2 ** (bits - 1) - 1)
    return torch.round(x / scale).to(torch.int8), scale


def rounded(x, scale, top):
    return (x / scale).round().clamp(-top, top) * scale


class Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, top):
        ctx.save_for_backward((x / scale).round().abs() <= top)
        return rounded(x, scale, top)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None, None


def clamped(x, scale, top):
    x = x.clamp(-top * scale, top * scale)
    return x + (rounded(x, scale, top) - x).detach()


def torchs(x, scale, top):
    return torch.fake_quantize_per_tensor_affine(x, scale, 0, -top, top)


def nibbles(codes, first=1, second=16, shift=7):
    codes = F.pad(codes + shift, (0, len(codes) % 2))
    return ((first * codes[::2] + second * codes[1::2]) % 256).to(torch.uint8)


def in_a_loop(codes):
    packed = [0] * ((len(codes) + 1) // 2)
    for i, code in enumerate(codes.tolist()):
        packed[i // 2] |= (code + 7) << (4 * (i % 2))
    return torch.tensor(packed, dtype=torch.uint8)


WRONG = {
    check_quantize: [
        the_notes,
        truncated,
        largest,
        one_too_many,
        all_patterns,
        asymmetric,
        lambda x, bits: (x / symmetric(x, bits)[1], symmetric(x, bits)[1]),
        lambda x, bits: symmetric(x, bits)[0],
    ],
    check_straight_through: [
        rounded,
        lambda x, scale, top: x + (rounded(x, scale, top) - x).detach(),
        lambda x, scale, top: rounded(x, scale, top).detach(),
        lambda x, scale, top: x + ((x / scale).round() * scale - x).detach(),
        lambda x, scale, top: clamped(x, scale, top) / scale,
        lambda x, scale, top: (
            rounded(x, scale, top).detach()
            + x
            - clamped(x, scale, top)
            - (x - clamped(x, scale, top)).detach()
        ),
        lambda x, scale, top: (
            rounded(x, scale, top).detach()
            + 0.4 * clamped(x, scale, top)
            - 0.4 * clamped(x, scale, top).detach()
        ),
    ],
    check_pack: [
        lambda codes: (codes + 7).to(torch.uint8),
        lambda codes: nibbles(codes, 16, 1),
        lambda codes: nibbles(codes, shift=0),
        lambda codes: nibbles(codes).to(torch.int16),
        lambda codes: nibbles(codes[: len(codes) // 2 * 2]),
        lambda codes: nibbles(codes, shift=8),
    ],
}
RIGHT = {
    check_quantize: [symmetric, packages, with_a_branch],
    check_straight_through: [clamped, Masked.apply, torchs],
    check_pack: [nibbles, in_a_loop, lambda codes: pack(codes, 4)],
}
