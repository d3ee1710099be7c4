"""What shuts a student's process in: its limits, and the bubblewrap command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lora_course

Kind = Literal["bubblewrap", "user", "trust"]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Limits:
    """seconds: of computing, for all calls of a problem together; `patience` times as many may pass on the clock, so that a
    busy machine is no student's fault. memory: of all processes together, bytes. disk: of a file and of each
    writable folder, bytes."""

    seconds: float = 20
    patience: float = 6
    start_seconds: float = 60
    memory: int = 2 << 30
    processes: int = 64
    disk: int = 64 << 20
    reply: int = 64 << 20
    cpu_seconds: int = 300

    def of_process(self) -> dict[str, int]:
        """For setrlimit, by resource. Address space is larger than memory: torch maps far more than it uses."""
        return {
            "NPROC": self.processes, "FSIZE": self.disk, "CPU": self.cpu_seconds, "CORE": 0,
            "NOFILE": 256, "AS": 4 * self.memory,
        }  # fmt: skip


def choose(trust: bool = False) -> Kind:
    """What shuts students' code in on this machine. Raises RuntimeError where nothing does and `trust` is false."""
    if trust:
        return "trust"
    program = shutil.which("bwrap")
    if program is None:
        raise RuntimeError(
            "bubblewrap (the program bwrap) is not installed: install it, grade in a Linux machine that has it, "
            "or give --trust if you would run each submission on this computer by hand."
        )
    probe = subprocess.run(
        [program, *_namespaces(), "--ro-bind", "/", "/", "--proc", "/proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode:
        raise RuntimeError(
            f"bubblewrap doesn't start here ({(probe.stderr.strip().splitlines() or ['no reason given'])[-1]}): "
            "allow user namespaces, or give --trust if you would run each submission on this computer by hand."
        )
    return "bubblewrap"


def _namespaces() -> list[str]:
    """As root no user namespace: inside one, root's limit on processes isn't enforced."""
    if os.geteuid():
        return ["--unshare-all", "--die-with-parent", "--new-session"]
    rest = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    return [*rest, "--unshare-cgroup-try", "--die-with-parent", "--new-session"]


def bubblewrap(limits: Limits) -> list[str]:
    """The command that shuts a process in: system libraries, the interpreter and its packages, read-only; nothing else."""
    root = os.geteuid() == 0
    command = ["bwrap", *_namespaces(), "--clearenv", "--hostname", "sandbox"]
    command += ["--cap-drop", "ALL"]
    if root:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    # What is writable comes first: the interpreter itself may lie under /tmp or /home.
    command += ["--perms", "0755", "--dir", "/home", "--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", "/home/student", "/dev/shm"):
        command += ["--perms", "0777", "--size", str(limits.disk), "--tmpfs", folder]
    package = Path(lora_course.__file__).parent
    paths = sysconfig.get_paths()
    places = dict.fromkeys((sys.base_prefix, sys.prefix, paths["purelib"], paths["platlib"]))
    python = [folder for folder in places if not folder.startswith("/usr/")]
    parents = {parent for folder in python for parent in Path(folder).parents}
    for parent in sorted([*parents, Path("/home"), Path("/judge"), Path("/judge/packages")]):
        if parent != Path("/"):  # bubblewrap itself would make them for its user alone
            command += ["--perms", "0755", "--dir", str(parent)]
    for folder in ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.exists(folder):
            command += ["--ro-bind", folder, folder]
    for folder in python:
        command += ["--ro-bind", os.path.realpath(folder), folder]
    command += ["--ro-bind", str(package), "/judge/packages/lora_course"]
    masked = {"/judge/packages/lora_course/classroom"}
    if any(package.is_relative_to(paths[key]) for key in ("purelib", "platlib")):
        masked.add(str(package / "classroom"))
    for folder in sorted(masked):
        command += ["--perms", "0755", "--tmpfs", folder, "--remount-ro", folder]
    for name in ("runner.py", "wire.py"):
        command += ["--ro-bind", str(HERE / name), f"/judge/{name}"]
    return [*command, "--chdir", "/judge"]
