"""Quantised LoRA: factors that are stored as small integers, trained so that they bear it.

    y = W₀ x + b + s · Q(B) Q(A) x,     Q(w) = Δ · clamp(round(w / Δ), −q, q),     q = 2^(bits−1) − 1,   Δ = clip · max|w| / q

Δ is the scale (the step of the grid), one for the whole factor, for each of its components, or for each group of numbers in
a component; a component is a row of A and the column of B that belongs to it. The range is symmetric: zero stays zero.
`round` has no useful gradient, so the backward pass takes Q for the identity inside the range (the straight-through
estimator, arXiv 1308.3432): ∂L/∂w := ∂L/∂Q(w), LoRA's own gradient at the quantised factors.

    inject(model, config, layer=QuantizedLoRALinear, bits=4)        # trained quantised: train as ever
    quantize_after_training(model, bits=4)                           # or a plain adapter, quantised when it is done
    save_quantized(model, "adapter"); load_quantized(base, "adapter")   # packed integers and scales on disk

A stored number costs `bits` + 32 / (numbers that share a scale) bits: 4.5 at 4 bits in groups of 64; scales are fp32.
Only files are small: what is loaded computes in fp32, as LoRA does. Related, and not what is done here: QA-LoRA (2309.14717)
and L4Q (2402.04902) quantise the base; LoRAQuant (2510.26690) gives a trained adapter's components different bits.
"""

from lora_course.quantized.files import FILE, load_quantized, save_quantized
from lora_course.quantized.grid import (
    GRANULARITIES,
    FakeQuantize,
    check_grid,
    dequantize,
    fake_quantize,
    grouped,
    pack,
    quantize,
    round_to_grid,
    unpack,
)
from lora_course.quantized.layer import QuantizedLoRALinear, quantize_after_training

__all__ = [
    "FILE",
    "FakeQuantize",
    "GRANULARITIES",
    "QuantizedLoRALinear",
    "check_grid",
    "dequantize",
    "fake_quantize",
    "grouped",
    "load_quantized",
    "pack",
    "quantize",
    "quantize_after_training",
    "round_to_grid",
    "save_quantized",
    "unpack",
]
