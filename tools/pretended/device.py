"""A CUDA device pretended on the CPU: tensors that say they are on cuda:0, compute on the CPU, and refuse to be mixed with CPU tensors.

    torch.ones(2, device="cuda") + torch.ones(2)    # RuntimeError, as on a GPU

What it shows: which tensors lie on which device, which precision is chosen, and what more than one GPU changes. What it can't
show: speed, memory, kernels, and how a GPU rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
# Functions that may be given tensors of two devices: copies, indices on the CPU, and torch's own bookkeeping.
MIXING = {
    "copy_", "__getitem__", "__setitem__", "index_put_", "set_", "backward", "__set__", "__get__", "type", "swap_tensors",
    "_make_subclass", "to", "_has_compatible_shallow_copy_type",
}  # fmt: skip
plain = torch._C.DisableTorchFunctionSubclass


class CudaTensor(torch.Tensor):
    """A tensor on the pretended device."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def numpy(self, *_: Any, **__: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> None:
        self.numpy()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    @property
    def grad(self) -> torch.Tensor | None:
        with plain():
            gradient = torch.Tensor.grad.__get__(self)
        return gradient if gradient is None else on_cuda(gradient)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        with plain():
            torch.Tensor.grad.__set__(
                self, value if value is None else value.as_subclass(torch.Tensor)
            )

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]
        with plain(), torch.no_grad():
            copied = torch.Tensor.detach(self).as_subclass(torch.Tensor).clone()
            copied = copied.as_subclass(CudaTensor)
        copied.requires_grad_(self.requires_grad)
        copied.__dict__.update(self.__dict__)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return call(function, args, kwargs or {})


class Pretended(TorchFunctionMode):
    """Makes what is asked for on "cuda" a `CudaTensor`."""

    def __torch_function__(
        self, function: Any, _: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if (
            name in ("to", "cuda", "cpu")
            and args
            and isinstance(args[0], torch.Tensor)
            and not packed(args[0])
        ):
            return move(name, *args, **kwargs)
        if function is torch.device and args and type(args[0]) is int:
            return CUDA  # a number alone means the accelerator
        device = kwargs.get("device")
        if device is not None and is_cuda(device):
            kwargs["device"] = "cpu"
            with plain():
                made = function(*args, **kwargs)
            return all_on_cuda(made)
        return call(function, args, kwargs)


def backward_under(mode: TorchFunctionMode) -> None:
    """Keeps the mode on in backward passes, which are called through it, so that it is off there: what they make on "cuda"
    would be asked of a real device."""
    run = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward


def is_cuda(device: Any) -> bool:
    return (
        isinstance(device, int) and not isinstance(device, bool) or str(device).startswith("cuda")
    )


def packed(tensor: torch.Tensor) -> bool:
    """4-bit weights move themselves."""
    return type(tensor).__name__ == "Params4bit"


def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, CudaTensor):
        return tensor
    with plain():
        return tensor.as_subclass(CudaTensor)


def all_on_cuda(result: Any) -> Any:
    """The plain tensors of a result; a shape stays what it is, of which `tree_map` would make a tuple."""
    if isinstance(result, torch.Size):
        return result
    return tree_map(lambda t: on_cuda(t) if type(t) is torch.Tensor else t, result)


def anywhere(tensor: torch.Tensor) -> bool:
    """Numbers and tensors without memory may meet any device; 4-bit weights don't say where they are."""
    return (
        packed(tensor)
        or type(tensor).__name__ == "FakeTensor"
        or tensor.dim() == 0
        or tensor.device.type == "meta"
    )


def call(function: Any, args: tuple, kwargs: dict) -> Any:
    """Calls a function of torch, after checking that its tensors lie on one device."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    name = getattr(function, "__name__", str(function))
    if name == "__deepcopy__":  # what was copied before, on any device, is handed on with it
        with plain():
            return function(*args, **kwargs)
    cuda = any(isinstance(t, CudaTensor) for t in tensors)
    in_backward = torch._C._current_graph_task_id() != -1  # the engine's own tensors carry no class
    if cuda and not in_backward and name not in MIXING:
        other = [t for t in tensors if not isinstance(t, CudaTensor) and not anywhere(t)]
        if other:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in {name})"
            )
    with plain():
        result = function(*args, **kwargs)
    if cuda and name != "cpu" and (name != "copy_" or isinstance(args[0], CudaTensor)):
        return all_on_cuda(result)
    return result


def move(name: str, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`, `.cuda` and `.cpu`."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    device = {"cuda": CUDA, "cpu": "cpu"}.get(name, device)
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, str | torch.device | int) and not isinstance(value, bool):
            device = value
    if device is None:
        device = tensor.device
    kind = "cuda" if is_cuda(device) else torch.device(device).type
    dtype = dtype or tensor.dtype
    if kind == tensor.device.type and dtype == tensor.dtype and not kwargs.get("copy"):
        return tensor
    with plain():
        if kind == "meta":
            return torch.Tensor.to(tensor, "meta", dtype)
        moved = torch.Tensor.to(tensor, dtype=dtype, copy=True)
        return moved.as_subclass(CudaTensor if kind == "cuda" else torch.Tensor)


def apply_to_module(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """`nn.Module._apply` (so `.to`): torch's own swaps the memory behind a tensor, which here would keep its class."""
    done: dict[int, Any] = {}
    for module in self.modules():
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if old is None:
                    continue
                if id(old) not in done:
                    done[id(old)] = (
                        old,
                        moved_parameter(old, function, table is module._parameters),
                    )
                table[key] = done[id(old)][1]
    return self


def moved_parameter(old: torch.Tensor, function: Any, parameter: bool) -> torch.Tensor:
    if packed(old):
        return function(old)
    with torch.no_grad():
        new = function(old)
    if new is not old and parameter:
        attributes, gradient = dict(old.__dict__), old.grad
        new = torch.nn.Parameter(new.detach(), old.requires_grad and new.is_floating_point())
        new.__dict__.update(attributes)
        if gradient is not None:
            new.grad = function(gradient)
    return new
