"""A machine with a pretended GPU: what torch.cuda answers, and the libraries' paths past torch.

pretend(gpus=1, bf16=False)     # a T4, or with bf16 an A100; for the rest of the process
"""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import bitsandbytes  # noqa: F401  (it and PEFT look for CUDA's own parts when they are loaded)
import peft  # noqa: F401
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from lora_course import linears
from tools.pretended.device import CudaTensor, Pretended, apply_to_module, backward_under
from tools.pretended.four_bits import pretend_four_bits

GIB = 2**30


def pretend(gpus: int = 1, bf16: bool = False, memory: int = 15 * GIB) -> TorchFunctionMode:
    """Puts the device in place for the rest of this process. gpus: how many; memory: bytes of each, all of them free."""
    cuda, name = torch.cuda, "a pretended A100" if bf16 else "a pretended T4"
    capability = (8, 0) if bf16 else (7, 5)
    answers = {
        "is_available": True, "device_count": gpus, "current_device": 0, "is_initialized": False, "_lazy_init": None,
        "mem_get_info": (memory, memory), "get_device_name": name, "get_device_capability": capability,
        "get_arch_list": ["sm_75", "sm_80", "sm_86", "sm_90"], "max_memory_allocated": 0, "memory_allocated": 0,
        "max_memory_reserved": 0, "memory_reserved": 0,
        "get_device_properties": types.SimpleNamespace(
            name=name, total_memory=memory, major=capability[0], minor=capability[1], multi_processor_count=40
        ),
    }  # fmt: skip
    nothing = (
        "synchronize", "reset_peak_memory_stats", "empty_cache", "ipc_collect", "reset_max_memory_allocated", "set_device",
        "set_rng_state", "set_rng_state_all", "manual_seed", "manual_seed_all",
    )  # fmt: skip
    for key, value in (answers | dict.fromkeys(nothing)).items():
        setattr(cuda, key, lambda *_, value=value, **__: value)
    cuda.is_bf16_supported = lambda including_emulation=True: bf16
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.get_rng_state_all = cuda.random.get_rng_state_all = lambda: [torch.get_rng_state()]
    cuda.random.set_rng_state_all = lambda *_: None
    cuda.stream = contextlib.nullcontext
    torch.nn.Module._apply = apply_to_module
    linears.PLAIN.add(CudaTensor)
    _pretend_autocast()
    _read_files_on_the_cpu()
    _without_devices(torch.random)
    _without_pinned_memory()
    # What is recomputed in the backward pass runs below Python, where the class is lost.
    kinds = checkpoint._allowed_determinism_checks_to_fns
    kinds["default"] = lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}
    pretend_four_bits()
    mode = Pretended()
    backward_under(mode)
    mode.__enter__()
    return mode


def _pretend_autocast() -> None:
    """Autocast of "cuda" is the CPU's, which does the computing."""

    def on_cpu(kind: str) -> str:
        return "cpu" if str(kind).startswith("cuda") else kind

    start, enabled, dtype = (
        torch.autocast.__init__,
        torch.is_autocast_enabled,
        torch.get_autocast_dtype,
    )

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        start(self, on_cpu(device_type), *args, **kwargs)

    torch.autocast.__init__ = init
    torch.is_autocast_enabled = lambda kind="cuda": enabled(on_cpu(kind))
    torch.get_autocast_dtype = lambda kind: dtype(on_cpu(kind))


def _read_files_on_the_cpu() -> None:
    """safetensors reads into a GPU's memory by itself, past torch; here the tensors are read, then moved."""
    import safetensors

    original = safetensors.safe_open

    class Opened:
        def __init__(self, path: Any, framework: str, device: Any = "cpu", **kwargs: Any) -> None:
            self.file, self.device = original(path, framework, "cpu", **kwargs), device

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            return self.file.get_tensor(name).to(self.device)

        def get_tensors(self) -> dict[str, torch.Tensor]:
            return {name: self.get_tensor(name) for name in self.file.keys()}  # noqa: SIM118

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    for module in list(sys.modules.values()):
        if getattr(module, "safe_open", None) is original:
            module.safe_open = Opened


def _without_devices(random: Any) -> None:
    fork = random.fork_rng
    random.fork_rng = lambda devices=None, *_, **__: fork(devices=[])


def _without_pinned_memory() -> None:
    from torch.utils.data import DataLoader

    start = DataLoader.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs | {"pin_memory": False})

    DataLoader.__init__ = init
