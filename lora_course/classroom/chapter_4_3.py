"""Checks of the exercises in chapter 4.3, quantised LoRA."""

import torch
from torch import Tensor

from lora_course.classroom.first_exercises import exercise, mistake
from lora_course.quantized import pack


@exercise("4.3-a", points=1)
def check_quantize(learner):
    """`learner(x, bits)` → codes of x's shape and one scale, symmetric, per tensor."""
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    x[2, 7] = -4.5  # the largest number is negative

    def answer(x: Tensor, bits: int) -> tuple[Tensor, float]:
        found = learner(x.clone(), bits)
        mistake(
            not isinstance(found, tuple) or len(found) != 2,
            "Two things are expected: codes, scale.",
        )
        codes, scale = torch.as_tensor(found[0]).double(), torch.as_tensor(found[1]).double()
        mistake(codes.shape != x.shape or scale.numel() != 1, "codes of shape {} and one scale are expected; yours are {} and {}.",
                list(x.shape), list(codes.shape), list(scale.shape))  # fmt: skip
        return codes, scale.item()

    close = lambda a, b: abs(a - b) < 1e-4 * b  # noqa: E731
    for bits in (8, 4, 2):
        codes, scale = answer(x, bits)
        top = 2 ** (bits - 1) - 1
        mistake(
            bool((codes != codes.round()).any()),
            "The codes are no whole numbers: divide by the scale, then round.",
        )
        mistake(
            close(scale, 4.5 / 2 ** (bits - 1)),
            "Your scale is max|x| / 2^(bits − 1): the largest positive number would need the code {}, which is one more than {}.",
            top + 1,
            top,
        )
        mistake(
            close(scale, x.max().item() / top),
            "Your scale comes from the largest number; the largest in size is {}, a negative one, and falls out of the range.",
            -4.5,
        )
        mistake(
            codes.abs().max() > top,
            "With {} bits the codes run from {} to {}; yours reach {}.",
            bits,
            -top,
            top,
            int(codes.abs().max()),
        )
        mistake(
            not close(scale, 4.5 / top),
            "At {} bits the scale is max|x| / {} = {:.4g}; yours is {:.4g}.",
            bits,
            top,
            4.5 / top,
            scale,
        )
        error = (codes * scale - x).abs().max().item()
        mistake(
            error > 0.51 * scale,
            "A number is off by {:.2f} steps: the nearest code is at most half a step away. Truncating is not rounding.",
            error / scale,
        )
    codes, scale = answer(torch.zeros(3, 4), 4)
    mistake(
        bool(codes.isnan().any()) or not scale > 0,
        "Where all of x is zero (as B is at the start) the codes must be 0 and the scale positive: 0/0 is NaN.",
    )
    mistake(bool(codes.any()), "Zero must stay zero; yours becomes {}.", codes.flatten()[0].item())


@exercise("4.3-b", points=2)
def check_straight_through(learner):
    """`learner(x, scale, top)` → Q(x), whose gradient is 1 inside the range and 0 outside."""
    x = torch.tensor([0.26, -0.61, 1.04, 9.0, -7.5, 0.0, 1.15], requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    expected = (x.detach() / 0.4).round().clamp(-3, 3) * 0.4
    found = learner(x, 0.4, 3)
    mistake(
        not torch.is_tensor(found) or found.shape != x.shape, "A tensor of x's shape is expected."
    )
    mistake(torch.allclose(found.detach(), x.detach()), "The values are x, not rounded.")
    mistake(
        torch.allclose(found.detach(), (x.detach() / 0.4).round() * 0.4),
        "The codes are not cut to −{0} … {0}: {1} gives {2:.1f}.",
        3,
        9.0,
        found[3].item(),
    )
    mistake(
        torch.allclose(found.detach(), expected / 0.4),
        "These are the codes: multiply by the scale again.",
    )
    mistake(
        not torch.allclose(found.detach(), expected, atol=1e-6),
        "Expected {}, got {}.",
        expected.tolist(),
        found.detach().tolist(),
    )
    mistake(
        not found.requires_grad,
        "No gradient can flow: the result does not depend on x any more. x + (Q(x) − x).detach() does.",
    )
    (gradient,) = torch.autograd.grad((found * weight).sum(), x, allow_unused=True)
    gradient = torch.zeros_like(x) if gradient is None else gradient
    inside = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    mistake(
        not gradient.any(),
        "The gradient is zero everywhere, which is round's own: detach what the rounding changes.",
    )
    mistake(
        torch.allclose(gradient, weight),
        "What was cut (9 and −7.5) gets a gradient too: moving it within the cut part changes nothing. Clamp x outside of the detached part.",
    )
    mistake(
        torch.allclose(gradient, weight * (1 - inside)),
        "The mask is the wrong way round: only what was cut gets a gradient.",
    )
    mistake(
        not torch.allclose(gradient, weight * inside, atol=1e-6),
        "Inside the range the gradient is that of Q(x), {}; yours is {}.",
        (weight * inside).tolist(),
        gradient.tolist(),
    )


@exercise("4.3-c", points=2)
def check_pack(learner):
    """`learner(codes)` → uint8, two 4-bit codes a byte, code + 7, the first one in the lower half."""
    generator = torch.Generator().manual_seed(1)
    for count in (8, 9):
        codes = torch.randint(-7, 8, (count,), generator=generator)
        codes[:2] = torch.tensor([-7, 6])
        packed = learner(codes.clone())
        mistake(not torch.is_tensor(packed), "A tensor is expected.")
        mistake(
            packed.dtype != torch.uint8,
            "uint8 is expected, not {}: other types take more bytes, or have a sign.",
            packed.dtype,
        )
        mistake(
            packed.numel() == count,
            "{0} codes take {0} bytes: nothing is packed. Two go into each byte.",
            count,
        )
        mistake(
            packed.numel() != (count + 1) // 2,
            "{} codes take {} bytes; yours are {}. The last byte of an odd number is half empty.",
            count,
            (count + 1) // 2,
            packed.numel(),
        )
        unsigned = codes + 7
        low, high = (
            unsigned[::2],
            torch.cat([unsigned[1::2], torch.zeros(count % 2, dtype=unsigned.dtype)]),
        )
        mistake(
            torch.equal(packed.long(), high + 16 * low),
            "The first code is in the upper half of the byte; the lower half is asked for.",
        )
        signed = torch.cat([codes, torch.zeros(count % 2, dtype=codes.dtype)])
        mistake(
            torch.equal(packed.long(), (signed[::2] + 16 * signed[1::2]) % 256),
            "Negative codes are not shifted, and spill over into the other half: add 7 first, so that they run from 0 to 14.",
        )
        mistake(
            not torch.equal(packed, pack(codes, 4)),
            "Expected {}, got {}.",
            pack(codes, 4).tolist(),
            packed.tolist(),
        )
