"""A process for a student's code: inside bubblewrap, as another user, or, for one's own code only, as it is.

    kind = confinement.choose(trust=False)   # "bubblewrap"; "user" where a container shuts everything in already
    with Sandbox(kind, Limits()) as box:
        box.ask({"kind": "open", ...}, box.budget(20))

Raises `Ended` with a plain reason when the process is gone, over a limit, or answers with something unreadable.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lora_course.classroom import wire
from lora_course.classroom.calls import Mistake
from lora_course.classroom.confinement import HERE, Kind, Limits, bubblewrap

FIRST_UID = 61_000
"""Uids of sandboxes started by root: each has its own, so that a limit on processes counts its own alone."""
_uids = itertools.count()


class Ended(Mistake):
    """A student's process is gone, over a limit, or answers with something unreadable; the text says so to the student."""


@dataclass
class Budget:
    """used: seconds of computing at which a problem is over. clock: seconds that may still pass. seconds: as told."""

    used: float
    clock: float
    seconds: float


SLOW = "It was stopped after {:.0f} seconds. Does a loop never end?"


class Sandbox:
    """One submission's process. `ask` sends a message and waits for the answer, within time, memory and size."""

    def __init__(self, kind: Kind, limits: Limits) -> None:
        self.kind, self.limits, self.looked = kind, limits, time.monotonic()
        root = os.geteuid() == 0
        settings: dict[str, Any] = {
            "uid": FIRST_UID + next(_uids) % 4000 if root and kind != "trust" else 0,
            "limits": limits.of_process(),
            "path": ["/judge/packages", "/judge"],
            "home": "/home/student",
        }
        if kind == "trust" or not root:  # other processes of this user count as well
            settings["limits"]["NPROC"] += _processes_of_user()
        self.folder: tempfile.TemporaryDirectory | None = None
        command, script = [], "/judge/runner.py"
        if kind == "bubblewrap":
            command = bubblewrap(limits)
        else:
            self.folder = tempfile.TemporaryDirectory(prefix="submission-")
            home = Path(self.folder.name)
            home.chmod(0o777)
            for name in ("runner.py", "wire.py"):
                (home / name).write_bytes((HERE / name).read_bytes())
                (home / name).chmod(0o444)
            settings |= {"home": str(home), "path": [str(home)]}
            script = str(home / "runner.py")
        python = [os.path.abspath(sys.executable), "-I", "-B", script, json.dumps(settings)]
        process = subprocess.Popen(
            [*command, *python],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HOME": settings["home"], "LANG": "C.UTF-8"}
            if kind != "bubblewrap"
            else None,
        )  # fmt: skip
        assert process.stdin and process.stdout and process.stderr  # they are pipes
        self.process, self.stdin = process, process.stdin
        self.stdout, self.stderr = process.stdout, process.stderr
        os.set_blocking(self.stdin.fileno(), False)
        try:
            self.ask(
                None, Budget(limits.start_seconds, 4 * limits.start_seconds, limits.start_seconds)
            )
        except Ended as ended:
            words = self.stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise RuntimeError(f"no sandbox starts: {(words or [str(ended)])[-1]}") from None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the process and all that it started, and takes its folder away."""
        strays = [] if self.kind == "bubblewrap" else self._family()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in strays:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        for stream in (self.stdin, self.stdout, self.stderr):
            stream.close()
        if self.folder is not None:
            self.folder.cleanup()

    def budget(self, seconds: float) -> Budget:
        """What a problem may take, counted from now."""
        return Budget(self.seconds_used() + seconds, seconds * self.limits.patience, seconds)

    def ask(self, message: Any, budget: Budget) -> Any:
        """Sends a message, if there is one, and returns the answer. Takes the time off the budget."""
        start = time.monotonic()
        try:
            return self._ask(message, budget, start + budget.clock)
        finally:
            budget.clock -= time.monotonic() - start

    def _ask(self, message: Any, budget: Budget, deadline: float) -> Any:
        out = b"" if message is None else wire.encode(message)
        out = len(out).to_bytes(8, "little") + out if out else b""
        got, length = bytearray(), None
        reading, writing = self.stdout.fileno(), self.stdin.fileno()
        while length is None or len(got) < length:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Ended(SLOW.format(budget.seconds))
            ready, free, _ = select.select([reading], [writing] if out else [], [], min(left, 0.1))
            try:
                if free:
                    out = out[os.write(writing, out[: 1 << 16]) :]
                if ready:
                    part = os.read(reading, 1 << 20)
                    if not part:
                        raise Ended("Its process ended: it left, was killed, or used up its time.")
                    got += part
            except BrokenPipeError:
                raise Ended("Its process ended.") from None
            if length is None and len(got) >= 8:
                length = int.from_bytes(got[:8], "little")
                del got[:8]
                if length > self.limits.reply:
                    raise Ended("What it sends is too large, or no answer.")
            if time.monotonic() - self.looked > 0.2:
                self._look(budget)
        if len(got) > length:
            raise Ended("What it sends is no answer.")
        try:
            return wire.decode(bytes(got), wire.TREE)
        except wire.WireError:
            raise Ended("What it sends is no answer.") from None

    def _look(self, budget: Budget) -> None:
        """Raises Ended where its processes are over a limit that the system doesn't hold for all of them together."""
        self.looked, family, held, used = time.monotonic(), self._family(), 0, 0.0
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                held += _held(process)
                used += sum(process.cpu_times()[:4])
        if len(family) > self.limits.processes // 2:
            raise Ended(f"It started more than {self.limits.processes // 2} processes.")
        if held > self.limits.memory:
            raise Ended(f"It used more than {self.limits.memory >> 20} MB of memory.")
        if used > budget.used:
            raise Ended(SLOW.format(budget.seconds))

    def seconds_used(self) -> float:
        """Of computing, by its processes and those of theirs that have ended."""
        total = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])
        return total

    def _family(self) -> list[psutil.Process]:
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _processes_of_user() -> int:
    uid = os.getuid()
    return sum(p.info["uids"] is not None and p.info["uids"].real == uid for p in psutil.process_iter(["uids"]))  # fmt: skip


def _held(process: psutil.Process) -> int:
    """Bytes of a process; what forks share counts once, where the system tells."""
    try:
        return process.memory_full_info().pss
    except psutil.AccessDenied:
        memory = process.memory_info()
        return memory.rss - memory.shared
