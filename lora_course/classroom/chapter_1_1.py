"""Checks of the exercises in chapter 1.1, QLoRA."""

import bitsandbytes as bnb
import torch

from lora_course.classroom.exercises import exercise, mistake
from lora_course.lora import LoRALinear
from lora_course.nf4 import nf4_codebook


@exercise("1.1-a", points=1)
def check_storage(learner):
    """`learner(n, bits=4, block=64)` → bits in all."""
    n = 64 * 256 * 10
    found, codes, constants = learner(n), 4 * n, 8 * (n // 64)
    mistake(
        found == codes + 32 * (n // 64),
        "These are 32 bits a block: without double quantisation. Each block constant is an 8-bit code here.",
    )
    mistake(
        found == codes + constants,
        "The 8-bit constants need something to decode them: one 32-bit constant for every 256 of them, and their mean.",
    )
    mistake(
        found == codes + constants + 320, "The 32-bit mean, one for the whole weight, is missing."
    )
    mistake(
        abs(found - (codes + constants + 352) / n) < 1,
        "This is a number of bits a weight; the bits in all are asked for.",
    )
    mistake(
        found != codes + constants + 352,
        "{} weights take {} bits, not {}: count the codes, 8 bits a block, 32 bits for 256 blocks, 32 bits once.",
        n,
        codes + constants + 352,
        found,
    )
    mistake(
        learner(66) != 4 * 66 + 16 + 32 + 32,
        "66 weights make two blocks and one group of 256: incomplete ones count as whole. Round up.",
    )
    mistake(
        learner(n, bits=3, block=128) != 3 * n + 8 * (n // 128) + 32 * 5 + 32,
        "`bits` and `block` are not used everywhere: try bits=3, block=128.",
    )


@exercise("1.1-b", points=2)
def check_quantizer(learner):
    """`learner(weight, codebook, block)` → the nearest representable weight, of the same shape."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 128, generator=generator) * torch.logspace(-2, 1, 24)[:, None]
    weight[3] = 0
    codes = nf4_codebook()
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    scaled = blocks / absmax.clamp(min=1e-30)
    right = (codes[torch.bucketize(scaled, (codes[1:] + codes[:-1]) / 2)] * absmax).reshape(
        weight.shape
    )
    one_scale = (
        codes[torch.bucketize(weight / weight.abs().max(), (codes[1:] + codes[:-1]) / 2)]
        * weight.abs().max()
    )
    lower = (codes[(torch.bucketize(scaled, codes, right=True) - 1).clamp(0, 15)] * absmax).reshape(
        weight.shape
    )
    before = weight.clone()
    found = learner(weight, codes, 64)
    mistake(
        not torch.equal(weight, before),
        "Your function changed the weight it was given: work on a copy.",
    )
    mistake(
        not isinstance(found, torch.Tensor) or found.shape != weight.shape,
        "A tensor of shape {} is expected, like the weight: reshape the blocks back.",
        list(weight.shape),
    )
    mistake(
        bool(found.isnan().any()),
        "There is a NaN: a block of zeros has the largest magnitude 0, and 0/0 is not a number.",
    )
    found = found.float()
    close = lambda a, b: torch.allclose(a.float(), b, atol=1e-6, rtol=1e-4)  # noqa: E731
    mistake(
        close(found, one_scale),
        "One scale for the whole weight: rows with small weights lose all their detail. Use one a block.",
    )
    mistake(close(found, lower), "You take the next lower code; the nearest may be the one above.")
    mistake(
        bool(found.abs().max() <= 1) and weight.abs().max() > 1,
        "The result is still divided by the block's largest magnitude: multiply it back.",
    )
    mistake(
        not close(found, right),
        "Some weights are not rounded to the nearest entry of the codebook of their block; the largest error is {:.3g}.",
        (found - right).abs().max().item(),
    )
    smaller = learner(weight, torch.tensor([-1.0, 0.0, 1.0]), 32)
    expected = torch.round(
        weight.reshape(-1, 32) / weight.reshape(-1, 32).abs().amax(1, keepdim=True).clamp(min=1e-30)
    )
    expected = (expected * weight.reshape(-1, 32).abs().amax(1, keepdim=True)).reshape(weight.shape)
    mistake(
        not close(smaller, expected),
        "With another codebook and blocks of 32 it goes wrong: use the arguments, not NF4 and 64.",
    )


@exercise("1.1-c", points=2)
def check_merged_weight(learner):
    """`learner(layer)` → the dense weight that computes what the layer computes."""
    generator = torch.Generator().manual_seed(1)
    original = torch.randn(192, 128, generator=generator) / 10
    base = bnb.nn.Linear4bit(128, 192, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict({"weight": original, "bias": torch.linspace(-1, 1, 192)})
    layer = LoRALinear(base.to("cpu"), r=4, lora_alpha=12)
    layer.B.data = torch.randn(192, 4, generator=generator) / 20
    layer.A.data = torch.randn(4, 128, generator=generator) / 5
    before = base.weight.data.clone()
    dense = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    delta = (layer.B @ layer.A).detach()
    found = learner(layer)
    mistake(
        not isinstance(found, torch.Tensor) or found.shape != (192, 128),
        "A tensor of shape [192, 128] is expected, [out, in]; is something transposed, or still packed?",
    )
    found = found.detach().float()
    again, state = bnb.functional.quantize_4bit(dense + 3 * delta, blocksize=64, quant_type="nf4")
    close = lambda a, b: bool((a - b).norm() / b.norm() < 1e-4)  # noqa: E731
    mistake(close(found, dense), "This is the base alone: the adapter's update is missing.")
    mistake(
        close(found, dense + delta),
        "The scale α/r is missing: the layer's update is scaling · B A.",
    )
    mistake(
        close(found, bnb.functional.dequantize_4bit(again, state)),
        "You quantised the sum again: it is rounded to sixteen values a block. Return the dense sum.",
    )
    mistake(
        close(found, dense + 3 * delta + torch.linspace(-1, 1, 192)[:, None]),
        "The bias is in every column: it stays the bias, it is no part of the weight.",
    )
    mistake(
        not close(found, dense + 3 * delta),
        "The layer with your weight computes something else; relative error of the weight {:.2g}.",
        ((found - dense - 3 * delta).norm() / dense.norm()).item(),
    )
    mistake(
        not torch.equal(base.weight.data, before),
        "Your function changed the layer's packed weight: leave the layer as it was.",
    )
