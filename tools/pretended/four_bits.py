"""bitsandbytes on the pretended device: 4-bit weights that say cuda:0, and kernels of the CPU that take and give `CudaTensor`s."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch.utils._pytree import tree_map

from tools.pretended.device import CUDA, CudaTensor, is_cuda, on_cuda

KERNELS = ("matmul_4bit", "dequantize_4bit", "quantize_4bit", "gemv_4bit")


def pretended(value: Any) -> bool:
    """Whether a tensor, a packed weight or its quantisation state is on the pretended device."""
    return isinstance(value, CudaTensor) or getattr(value, "__dict__", {}).get("pretended", False)


def plain_tensor(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, CudaTensor) else value


def on_the_cpu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with its tensors taken off the device, and its results put there if one argument was."""

    def run(*args: Any, **kwargs: Any) -> Any:
        cuda = any(map(pretended, (*args, *kwargs.values())))
        with torch._C.DisableTorchFunction():
            args = [plain_tensor(value) for value in args]
            kwargs = {
                name: plain_tensor(value) for name, value in kwargs.items() if name != "device"
            }
            result = kernel(*args, **kwargs)
        if not cuda:
            return result
        for part in result if isinstance(result, tuple) else ():
            if isinstance(part, bnb.functional.QuantState):
                part.pretended = True
        return tree_map(lambda t: on_cuda(t) if type(t) is torch.Tensor else t, result)

    return run


def pretend_four_bits() -> None:
    """Puts it in place, for the rest of this process."""
    weight = bnb.nn.Params4bit
    move = weight.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = kwargs.pop("device", None)
        devices = [value for value in (named, *args) if isinstance(value, str | torch.device | int)]
        others = [value for value in args if not isinstance(value, str | torch.device | int)]
        cuda = is_cuda(devices[0]) if devices else self.__dict__.get("pretended", False)
        with torch._C.DisableTorchFunction():
            moved = move(self, "cpu", *others, **kwargs)
        for part in (moved, moved.quant_state):
            if part is not None:
                part.pretended = cuda
        return moved

    duplicate = weight.__deepcopy__

    def copied(self: Any, memo: dict) -> Any:
        new = duplicate(self, memo)
        new.pretended = pretended(self)
        return new

    weight.to = to
    weight.__deepcopy__ = copied
    weight.cuda = lambda self, *_, **__: to(self, CUDA)
    weight.cpu = lambda self: to(self, "cpu")
    weight.device = property(lambda self: CUDA if pretended(self) else torch.device("cpu"))
    weight.is_cuda = property(pretended)
    for module in list(sys.modules.values()):
        for name in KERNELS:
            kernel = (
                getattr(module, name, None)
                if getattr(module, "__name__", "").startswith("bitsandbytes")
                else None
            )
            if callable(kernel) and kernel.__name__ == name:
                setattr(module, name, on_the_cpu(kernel))
