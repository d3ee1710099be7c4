"""Exercise 1.1-c: the weight as another runtime stores it."""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from lora_course.classroom.exercises import Draw, case, exercise
from lora_course.lora import LoRALinear

dequantize, quantize = bnb.functional.dequantize_4bit, bnb.functional.quantize_4bit


def for_conv1d(layer):
    base = layer.base_layer
    dense = (
        dequantize(base.weight.data, base.weight.quant_state) + layer.scaling * layer.B @ layer.A
    )
    return dense.T, torch.zeros(len(dense)) if base.bias is None else base.bias


def _conv1d(update):
    """The right bias with another weight, [out, in], made of the dense base and the layer."""

    def answer(layer):
        base = layer.base_layer.weight
        return update(dequantize(base.data, base.quant_state), layer).T, for_conv1d(layer)[1]

    return answer


def _again(dense, layer):
    kind = layer.base_layer.weight.quant_state.quant_type
    return dequantize(
        *quantize((dense + layer.delta_weight()).detach(), blocksize=64, quant_type=kind)
    )


CONV1D_MISTAKES = {
    "This is the base alone: the adapter's update is missing.": _conv1d(lambda dense, layer: dense),
    "This is the update alone: the base is missing.": _conv1d(lambda dense, layer: layer.delta_weight()),
    "The scale is missing: the layer's update is scaling · B A.":
        _conv1d(lambda dense, layer: dense + layer.B @ layer.A),
    "You multiplied by α; the scale is what the layer keeps in `scaling`.":
        _conv1d(lambda dense, layer: dense + layer.lora_alpha * layer.B @ layer.A),
    "You divided α by r, which is not the scale under rsLoRA: the layer keeps it in `scaling`.":
        _conv1d(lambda dense, layer: dense + layer.lora_alpha / layer.r * layer.B @ layer.A),
    "The update is subtracted.": _conv1d(lambda dense, layer: dense - layer.delta_weight()),
    "You quantised the sum again: it is rounded to sixteen values a block. Return the dense sum.": _conv1d(_again),
    "The weight is [out, in]; a layer that computes x W + b has [in, out].":
        lambda layer: (for_conv1d(layer)[0].T, for_conv1d(layer)[1]),
    "The bias is in every row of the weight; it is no part of it.":
        _conv1d(lambda dense, layer: dense + layer.delta_weight() + for_conv1d(layer)[1][:, None]),
    "The bias is missing: it is the base layer's.":
        lambda layer: (for_conv1d(layer)[0], torch.zeros(layer.out_features)),
    "The bias is scaled; only the update has a scale.":
        lambda layer: (for_conv1d(layer)[0], layer.scaling * for_conv1d(layer)[1]),
}  # fmt: skip


@exercise(
    "1.1-c",
    points=2,
    right=for_conv1d,
    mistakes=CONV1D_MISTAKES,
    draws=True,
    otherwise="x W + b with your weight and bias is not what the layer computes.",
)
def check_conv1d(draw: Draw):
    """Dense weight and bias of a layer on a 4-bit base, for a runtime that stores weights [in, out]."""
    cases: list[tuple[Any, ...]] = [
        ({}, True, "nf4", ""),
        ({}, True, "fp4", "With a base in FP4 it goes wrong: its `quant_state` knows the codes."),
        ({"use_rslora": True}, True, "nf4", "With an rsLoRA layer it goes wrong: see `scaling`."),
        ({}, False, "nf4", "With a base without a bias it goes wrong: b is zero then."),
        ({"lora_dropout": 0.5}, True, "nf4", "With dropout it goes wrong: it is not merged."),
    ]
    for place, (arguments, bias, kind, hint) in enumerate(cases):
        inputs, outputs = (64 * n for n in draw.sizes(2, 1, 3))
        r = draw.integer(2, 6)
        base = bnb.nn.Linear4bit(
            inputs, outputs, bias=bias, compute_dtype=torch.float32, quant_type=kind,
            compress_statistics=place % 2 == 0,  # NF4 comes with and without double quantisation
        )  # fmt: skip
        state = {"weight": draw.normal(outputs, inputs, std=0.1)}
        base.load_state_dict(state | ({"bias": draw.normal(outputs)} if bias else {}))
        alpha = draw.choice([a for a in range(3, 20) if a not in (r, r * r)])
        layer = LoRALinear(base.to("cpu"), r=r, lora_alpha=alpha, **arguments)
        layer.A = nn.Parameter(draw.normal(r, inputs, std=0.2))
        layer.B = nn.Parameter(draw.normal(outputs, r, std=0.05))
        yield case(
            layer.train(place != 2), hint=hint
        )  # with dropout it trains: there a random mask shows
