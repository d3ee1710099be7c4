"""The exercises of chapter 1.1: plausible wrong answers are rejected, each with its own message; right ones pass."""

import math

import bitsandbytes as bnb
import torch

from lora_course.classroom.chapter_1_1 import check_merged_weight, check_quantizer, check_storage
from tests.first_exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)

dequantize = bnb.functional.dequantize_4bit


def blocks_of(weight, block):
    parts = weight.reshape(-1, block)
    return parts, parts.abs().amax(1, keepdim=True)


def nearest(scaled, codebook):
    return codebook[(scaled[..., None] - codebook).abs().argmin(-1)]


def one_scale(weight, codebook, block=64):
    return nearest(weight / weight.abs().max(), codebook) * weight.abs().max()


def zero_by_zero(weight, codebook, block=64):
    parts, absmax = blocks_of(weight, block)
    return (nearest(parts / absmax, codebook) * absmax).reshape(weight.shape) + parts.reshape(
        weight.shape
    ) / absmax.repeat_interleave(block).reshape(weight.shape) * 0


def not_multiplied_back(weight, codebook, block=64):
    parts, absmax = blocks_of(weight, block)
    return nearest(parts / absmax.clamp(min=1e-9), codebook).reshape(weight.shape)


def next_lower(weight, codebook, block=64):
    parts, absmax = blocks_of(weight, block)
    index = (torch.bucketize(parts / absmax.clamp(min=1e-9), codebook, right=True) - 1).clamp(
        0, len(codebook) - 1
    )
    return (codebook[index] * absmax).reshape(weight.shape)


def by_thresholds(weight, codebook, block=64):
    parts, absmax = blocks_of(weight, block)
    index = torch.bucketize(parts / absmax.clamp(min=1e-12), (codebook[1:] + codebook[:-1]) / 2)
    return (codebook[index] * absmax).reshape(weight.shape)


def base_of(layer):
    return dequantize(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)


def requantised(layer):
    return dequantize(
        *bnb.functional.quantize_4bit(
            base_of(layer) + layer.delta_weight().detach(), blocksize=64, quant_type="nf4"
        )
    )


def column_by_column(layer):
    """Feed the unit vectors through the layer: the weight, whatever the layer is made of; its bias is what zeros give."""
    with torch.no_grad():
        return (layer(torch.eye(layer.in_features)) - layer(torch.zeros(1, layer.in_features))).T


def with_bias(layer):
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T


WRONG = {
    check_storage: [
        lambda n, bits=4, block=64: bits * n + 32 * math.ceil(n / block),
        lambda n, bits=4, block=64: bits * n + 8 * math.ceil(n / block),
        lambda n, bits=4, block=64: (
            bits * n + 8 * math.ceil(n / block) + 32 * math.ceil(n / block / 256)
        ),
        lambda n, bits=4, block=64: bits * n + 8 * (n // block) + 32 * (n // block // 256) + 32,
        lambda n, bits=4, block=64: (
            4 * n + 8 * math.ceil(n / 64) + 32 * math.ceil(n / 64 / 256) + 32
        ),
    ],
    check_quantizer: [
        one_scale,
        zero_by_zero,
        not_multiplied_back,
        next_lower,
        lambda w, c, block=64: blocks_of(by_thresholds(w, c, block), block)[0],
    ],
    check_merged_weight: [
        base_of,
        lambda layer: base_of(layer) + layer.B @ layer.A,
        requantised,
        with_bias,
        lambda layer: (base_of(layer) + layer.delta_weight()).T,
    ],
}
RIGHT = {
    check_storage: [
        lambda n, bits=4, block=64: (
            n * bits - 8 * (-n // block) - 32 * ((-(-n // block) * -1) // 256) + 32
        )
    ],
    check_quantizer: [by_thresholds],
    check_merged_weight: [column_by_column, lambda layer: base_of(layer) + layer.delta_weight()],
}
