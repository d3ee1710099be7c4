"""Runs that are killed, in a process of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def shot() -> None:
    """Ends this process as a power cut does: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_shot(module: str, call: str) -> None:
    """Runs `call`, with all names of a test module and `shot` at hand, in another process, and sees to it that it was shot."""
    code = (
        f"import torch; from tests.processes import shot; from {module} import *; "
        f"torch.set_num_threads(1); {call}"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
