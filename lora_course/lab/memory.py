"""How much memory something takes: tensors now, tensors at their peak, and a whole process at its peak."""

import importlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # or the profiler writes its own diary to the error stream

Result = TypeVar("Result")


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are stored; tied weights count once.

    A bitsandbytes 4-bit weight counts with its packed codes and its quantisation constants.
    """
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        tensors += [
            getattr(s, key)
            for s in (state, nested)
            if s is not None
            for key in ("absmax", "code", "offset")
            if torch.is_tensor(getattr(s, key, None))
        ]
    # What is only described ("meta") lies nowhere: there each tensor counts as itself.
    places = [id(t) if t.is_meta else t.untyped_storage().data_ptr() for t in tensors]
    sizes = [t.untyped_storage().nbytes() for t in tensors]
    storages = dict(zip(places, sizes, strict=True))
    return sum(storages.values())


class Kept:
    """A tensor as long as a graph keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, function: Callable[[], object]) -> int:
    """Bytes that the graph of what `function()` returns keeps for its backward pass, each storage once.

    What the model holds anyway is left out, and so are graphs that are dropped on the way (DoRA's of its norms). What a
    checkpoint keeps lies outside of the graph and is not seen.
    """
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    there: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor.detach())  # an output with its graph would hold itself
        there.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = function()
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor for kept in there}
    del result  # which held the graph
    return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in held)


def peak_memory(function: Callable[[], Result]) -> tuple[Result, int]:
    """Runs `function()` and returns its result and the peak, in bytes, of the tensors it allocated on top of what was there.

    It is the GPU's peak if the function allocated anything there (`torch.cuda.max_memory_allocated`), else the CPU's:
    every allocation and release of torch's allocator, from the profiler; the same run gives the same number to the byte,
    which a process's resident memory does not. Memory that is not torch's (Python objects, the allocator's slack) is left
    out: see `process_peak`. The profiler keeps every event, so pass one training step, not a thousand.
    """
    before = 0
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        on_gpu = torch.cuda.max_memory_allocated() - before
        if on_gpu:
            return result, on_gpu
    return result, _cpu_peak(recording)


def _cpu_peak(recording: Any) -> int:
    """Of a profile with memory: the highest sum of what was allocated and not yet released. GPU events are left out."""
    events = [
        event
        for event in recording.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


@dataclass(frozen=True)
class ProcessPeak:
    """Result of `process_peak`, in bytes: `before` is the process after its imports, `peak` its highest point."""

    result: Any
    before: int
    peak: int

    @property
    def grown(self) -> int:
        """What the function added at its highest point."""
        return self.peak - self.before


def process_peak(function: str, *arguments: Any, timeout: float = 600) -> ProcessPeak:
    """Runs `function` in a fresh Python process and measures that process's resident memory at its peak.

    function: "module:function", importable from the current folder or the path (a notebook's own functions are not).
    arguments, and the function's result: what JSON holds. On a machine with a GPU, add `peak_memory` inside the function
    for the GPU's part. Raises RuntimeError with the process's error output when it fails.
    """
    if function.count(":") != 1:
        raise ValueError(
            f"function={function!r}: expected 'module:function', such as 'lora_course.lab.memory:tensor_bytes'"
        )
    path = os.pathsep.join([os.getcwd(), *(entry for entry in sys.path if entry)])
    run = subprocess.run(
        # this file alone (-P: not its folder), so that the process holds no more than torch before the function's imports
        [sys.executable, "-P", __file__, function, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if run.returncode != 0:
        raise RuntimeError(f"{function} failed in its own process:\n{run.stderr.strip()}")
    return ProcessPeak(**json.loads(run.stdout.splitlines()[-1]))


def _resident(key: str) -> int:
    """Bytes of resident memory of this process: key "VmRSS" now, "VmHWM" at its peak. On macOS both are the peak."""
    if sys.platform == "win32":
        memory = psutil.Process().memory_info()
        return memory.rss if key == "VmRSS" else memory.peak_wset
    if sys.platform == "darwin":
        import resource  # Unix only

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss: on Linux a child process's starts from its parent's memory.
    line = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith(key)
    )
    return int(line.split()[1]) * 1024


def _measure(function: str, arguments: str) -> str:
    """JSON of a `ProcessPeak`, measured in this process."""
    module, name = function.split(":")
    target = getattr(importlib.import_module(module), name)
    before = _resident("VmRSS")
    result = target(*json.loads(arguments))
    return json.dumps({"result": result, "before": before, "peak": _resident("VmHWM")})


if __name__ == "__main__":
    print("\n" + _measure(*sys.argv[1:]))
