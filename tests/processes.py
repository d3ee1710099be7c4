"""Code in processes of their own: killed ones, and those that change torch for good.

They are forks of one process that has imported the libraries and nothing of the course but its name: an import of PEFT takes
five seconds of computing, and a fork a hundredth of one. What the test itself has imported or changed they don't see.
"""

import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
# `lora_course` comes first: it sees to it that bitsandbytes says nothing at its import.
FORKS.set_forkserver_preload(["lora_course", "peft", "datasets", "matplotlib.pyplot"])


def shot() -> None:
    """Ends this process as a power cut does: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in another process, in the repository's root and in this environment; a signal's number is negative."""
    with TemporaryDirectory() as folder:
        streams = {1: Path(folder) / "out", 2: Path(folder) / "err"}
        process = FORKS.Process(target=_execute, args=(code, streams, dict(os.environ)))
        process.start()
        process.join()
        out, err = (streams[number].read_text() for number in (1, 2))
    assert process.exitcode is not None  # it has been waited for
    return subprocess.CompletedProcess(code, process.exitcode, out, err)


def _execute(code: str, streams: dict[int, Path], environment: dict[str, str]) -> None:
    for number, path in streams.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def run_until_shot(module: str, call: str) -> None:
    """Runs `call`, with all names of a test module and `shot` at hand, in another process, and sees to it that it was shot."""
    process = run(
        f"import torch; from tests.processes import shot; from {module} import *; "
        f"torch.set_num_threads(1); {call}"
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
