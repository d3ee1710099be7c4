"""The precision of a record on a processor that lacks it: bf16's numbers, computed in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_course.arguments import compute_dtype, computing_in

PRODUCTS = {
    getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "linear")
}


class ProductsInFp32(TorchDispatchMode):
    """Within the block each matrix product of bf16 tensors is computed in fp32 and rounded to bf16.

    bf16's instructions sum in fp32, too, and round once: the numbers differ by the order of a sum. A CPU without them (all
    with AVX2 alone) multiplies bf16 in loops, backwards two hundred times slower than fp32. Fused attention stays the processor's own.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if func not in PRODUCTS or any(t.dtype != torch.bfloat16 for t in tensors):
            return func(*args, **(kwargs or {}))
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        return func(*wide, **(kwargs or {})).bfloat16()


@contextlib.contextmanager
def precision_of(record_dtype: str) -> Iterator[None]:
    """Within the block a CPU computes in "float32" or "bfloat16", as a record's machine did, whether it has bf16 or not."""
    lacks = record_dtype == "bfloat16" and compute_dtype("cpu") != torch.bfloat16
    with computing_in(record_dtype), ProductsInFp32() if lacks else contextlib.nullcontext():
        yield
