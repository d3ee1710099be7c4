"""What a chapter runs on: four profiles from a laptop's CPU to a 7B model, and the check that one fits before it starts."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from lora_course.arguments import compute_dtype
from lora_course.lab.estimate import MemoryEstimate, Shape, estimate_memory

GIB = 2**30
CUDA_CONTEXT = GIB // 2  # what CUDA itself takes on a GPU before the first tensor
AMOUNTS = ("steps", "batch", "length", "more_logits", "lora_dropout")
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)  # fmt: skip
"""Where a container's limit stands, of version 2 and 1: the limit, what is used, and what of that files left behind."""
DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Profile:
    """Model, precision, device and amounts of one way to run a chapter.

    dtype: of the base's weights (and of the computation, for `quantize`). quantize: the linear layers are in 4 bits.
    batch: rows a step; length: tokens a row; steps: optimiser steps of the chapter's live training.
    copies: bases that the chapter holds at once. lora_dropout: of the adapters; more_logits: sets of logits in fp32 that its loss
    holds beside the model's own (`estimate_memory`). others: the profiles that the chapter could run under instead.
    """

    name: str
    model: str
    shape: Shape
    dtype: torch.dtype
    quantize: bool
    device: str
    batch: int
    length: int
    steps: int
    gradient_checkpointing: bool = False
    copies: int = 1
    lora_dropout: float = 0.0
    more_logits: int = 0
    others: tuple["Profile", ...] = field(default=(), repr=False, compare=False)


def estimate(profile: Profile, r: int = 8) -> MemoryEstimate:
    """`estimate_memory` of a profile's training step with LoRA of rank r on all linear layers."""
    shape = profile.shape
    # A 4-bit base keeps its norms and embeddings, and so what flows between the layers, in fp32.
    size = 4 if profile.quantize else profile.dtype.itemsize
    return estimate_memory(
        shape.linear,
        4.127 if profile.quantize else 8 * size,  # NF4 with double quantisation: arXiv 2305.14314
        adapter_params=shape.adapter(r),
        tokens=profile.batch * profile.length,
        layers=shape.layers,
        width=shape.width,
        intermediate=shape.intermediate,
        vocabulary=shape.vocabulary,
        compute_bytes=size,
        embedding_params=shape.embedding,
        embedding_bytes=size,
        checkpointing=profile.gradient_checkpointing,
        dropout=profile.lora_dropout > 0,
        more_logits=profile.more_logits,
    )


def profiles() -> dict[str, Profile]:
    """The four profiles by name, with the precision of this machine's devices."""
    gpu, full = compute_dtype("cuda"), torch.float32
    nano = Shape.from_config(
        json.loads((DATA / "nano" / "config.json").read_text(encoding="utf-8"))
    )
    smol = Shape(30, 576, 1536, 192, 49152, True)
    half = Shape(24, 896, 4864, 128, 151936, True)  # Qwen2.5-0.5B
    seven = Shape(28, 3584, 18944, 512, 152064, False)  # Qwen2.5-7B
    known = (
        Profile("tiny", "nano", nano, full, False, "cpu", 8, 128, 60),
        Profile("smol", "smol", smol, full, False, "cpu", 4, 128, 40),
        Profile("t4", "Qwen/Qwen2.5-0.5B", half, gpu, False, "cuda", 8, 256, 60),
        Profile("large", "Qwen/Qwen2.5-7B", seven, gpu, True, "cuda", 4, 256, 60, True),
    )
    return {profile.name: profile for profile in known}


def free_memory(device: str) -> int:
    """Bytes free on a device: of the GPU, or of the machine's memory within the limit of the container, if there is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    for folder, most, now, cache in CGROUPS:
        limit = Path(folder) / most
        if limit.exists() and limit.read_text(encoding="utf-8").strip() != "max":
            # What files left in the cache counts as used there, and is given up when memory is asked for.
            counted = dict(
                line.split()
                for line in (Path(folder) / "memory.stat").read_text(encoding="utf-8").splitlines()
            )
            used = int((Path(folder) / now).read_text(encoding="utf-8")) - int(counted[cache])
            free = min(free, int(limit.read_text(encoding="utf-8")) - used)
    return free


def needed_memory(profile: Profile, r: int = 8) -> int:
    """Bytes that a chapter needs on its device: the training step's estimate, the other bases that it holds, and CUDA's own
    share on a GPU."""
    step = estimate(profile, r)
    others = (profile.copies - 1) * (step.weights + step.adapters)
    return step.total + others + (CUDA_CONTEXT if profile.device == "cuda" else 0)


def usable_gpu() -> bool:
    """Whether torch sees an NVIDIA GPU that this build of torch has kernels for: today's have none for a P100 (Kaggle)."""
    if not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability()
    # sm_90a and compute_120 are such kernels, an AMD GPU's gfx942 is none
    names = [re.fullmatch(r"\w+_(\d+)(\d)[a-z]?", name) for name in torch.cuda.get_arch_list()]
    return any(int(name[1]) == major and int(name[2]) <= minor for name in names if name)


def pick_profile(
    name: str | None = None,
    *,
    copies: int | Mapping[str, int] = 1,
    training: Mapping[str, Any] | None = None,
) -> Profile:
    """The profile to run: the one named here or in LORA_COURSE_PROFILE; else, by the GPU and its free memory, `large` where
    it fits and the GPU computes in bf16 (an older one would take hours), or `t4` where that fits; else `tiny`.

    copies: bases that the chapter holds at once, by profile's name where they differ (1 where a name is missing).
    training: `steps`, `batch` and `length` of the chapter's live training, such as a study's settings, and where it has them
    its `lora_dropout` and `more_logits`; what it leaves out is the profile's. Both count in the memory that must be free.
    Raises ValueError for an unknown name, listing the names.
    """
    amounts = {key: value for key, value in (training or {}).items() if key in AMOUNTS}
    known = {
        key: replace(
            profile, copies=copies if isinstance(copies, int) else copies.get(key, 1), **amounts
        )
        for key, profile in profiles().items()
    }
    known = {key: replace(profile, others=tuple(known.values())) for key, profile in known.items()}
    name = name or os.environ.get("LORA_COURSE_PROFILE")
    if name:
        if name not in known:
            raise ValueError(
                f"LORA_COURSE_PROFILE={name!r} is no profile; there are {', '.join(known)}"
            )
        return known[name]
    if usable_gpu():
        candidates = ("large", "t4") if compute_dtype("cuda") == torch.bfloat16 else ("t4",)
        for candidate in (known[name] for name in candidates):
            if needed_memory(candidate) <= free_memory("cuda"):
                return candidate
    return known["tiny"]


def recorded_run(profile: str, chapter: str) -> dict[str, Any] | None:
    """What a chapter was measured to take under a profile: `minutes`, `device` and `date`, `peak_gib` where a GPU counted it,
    and `earlier`, whether its code was another then; None where it was never run. `tools.record_runs` writes these."""
    record = _data(f"runs/{profile}.json")
    run = record.get("chapters", {}).get(chapter)
    if run is None:
        return None
    earlier = run.get("form") is None or run["form"] != _data("forms.json").get(chapter)
    return {"device": record["device"], "date": record["date"], **run, "earlier": earlier}


def preflight(
    profile: Profile,
    minutes: Mapping[str, float],
    r: int = 8,
    chapter: str | None = None,
    seeds: int = 1,
) -> None:
    """Prints what the chapter will run on and what it will take; raises RuntimeError, before any work or download, if that
    can't be.

    minutes: by profile's name, a guess, printed as one where the chapter was never timed under that profile.
    r: rank of the adapters that the estimate counts. chapter: its file's name without the ending, under which times and
    peaks are recorded. seeds: with how many the chapter repeats its live training.
    It is refused when the device is missing, or has less free memory than the estimate; a peak that was measured on the same
    kind of GPU, less than the estimate, is then enough.
    """
    if profile.name not in minutes:
        raise ValueError(
            f"minutes has no entry for the profile {profile.name!r}; it has {', '.join(minutes)}"
        )
    present = profile.device != "cuda" or usable_gpu()
    free = free_memory(profile.device) if present else 0
    device = (
        profile.device if profile.device == "cpu" or not present else torch.cuda.get_device_name()
    )
    run = recorded_run(profile.name, chapter or "") or {}
    # On a larger GPU the allocator keeps more, which counts in a peak.
    measured = "peak_gib" in run and run["device"] == device and not run["earlier"]
    need = estimated = needed_memory(profile, r)
    if measured:
        need = int(run["peak_gib"] * GIB)
    bits = (
        f"4 bits, computing in {_name(profile.dtype)}" if profile.quantize else _name(profile.dtype)
    )
    size = (profile.shape.linear + profile.shape.embedding) / 1e6
    held = f", {profile.copies} at once" if profile.copies > 1 else ""
    count = "one seed" if seeds == 1 else f"{seeds} seeds"
    rows = {
        "profile": profile.name,
        "model": f"{profile.model}, {size:,.1f}M parameters, {bits}{held}",
        "device": device if present else f"{device} (missing)",
        "a training": f"{profile.steps} steps of {profile.batch} × {profile.length} tokens, {count}",
        "takes about": _takes(run, minutes[profile.name]),
        "peak memory": f"{need / GIB:.1f} GiB ({'measured' if measured else 'estimated'}); free: {free / GIB:.1f} GiB",
    }
    print("\n".join(f"{key:<12}  {value}" for key, value in rows.items()))
    if not present:
        raise RuntimeError(
            f"the profile {profile.name!r} needs an NVIDIA GPU that this torch has kernels for, and there is none: "
            "choose a GPU runtime (on Kaggle T4, not P100), or set LORA_COURSE_PROFILE=tiny to run on the CPU"
        )
    # What a peak has over the estimate may be the allocator's, and `pick_profile` goes by the estimate.
    if (need := min(need, estimated)) > free:
        others = [other.name for other in profile.others or profiles().values() if _fits(other, r)]
        instead = f", or set LORA_COURSE_PROFILE to one that fits ({', '.join(others)})"
        raise RuntimeError(
            f"the profile {profile.name!r} needs about {need / GIB:.1f} GiB and {device} has {free / GIB:.1f} GiB free: "
            f"restart other notebooks that hold memory{instead if others else ''}"
        )


def _fits(profile: Profile, r: int) -> bool:
    there = profile.device != "cuda" or usable_gpu()
    return there and needed_memory(profile, r) <= free_memory(profile.device)


def _takes(run: Mapping[str, Any], guess: float) -> str:
    if not run:
        return f"{guess:g} min (a guess)"
    where = f"measured on {run['device']}, {run['date']}"
    how = f"{where} (of an earlier form)" if run["earlier"] else f"as {where}"
    return f"{run['minutes']:.2g} min, {how}"


def _data(name: str) -> dict[str, Any]:
    path = DATA / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
